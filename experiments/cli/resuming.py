"""--resume with other flags than before: refused where the result would be wrong, else told."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from experiments.cli import choices, flags
from jaxft import train

# What changes nothing that a run computes: where things go, how they are laid out and shown.
FREE = frozenset(
    "output_dir save_steps logging_steps report_to profile_dir resume debug preview remat data_axis fsdp "
    "tensor context slices distributed workers timeout eval_steps accuracy push_dir push_every push_to_hub "
    "public".split()
)
# What the place in the data and the saved arrays are of: with others they would mean something else.
FIXED = frozenset(
    "model template adapter d rank alpha target quantise start scan_layers data eval_data validation "
    "fields weights weights_by batch_size max_length packing mask train_on too_long max_bad seed loss "
    "algorithm prompts_per_step group_size updates epochs turns optimizer sharpness smoke".split()
)


def settings(config: Any) -> dict[str, Any]:
    """The flags that are saved with each checkpoint, as JSON gives them back."""
    found = {name: value for name, value in flags.flat(config).items() if name not in FREE}
    return json.loads(json.dumps(found, default=str))


def check(config: Any, output: pathlib.Path) -> None:
    """Compares the flags with those of the run in `output`, and prints in one line what has changed.

    Raises:
        ValueError: for a change with which the result would be that of neither run.
    """
    earlier = train.saved_settings(output / "checkpoints")
    if earlier is None:
        return
    step, before = earlier
    changed = _changed(config, before)
    if fixed := [text for name, text in changed.items() if name in FIXED]:
        raise ValueError(
            f"--resume: {output} was begun with other flags: {', '.join(fixed)}. Its place in the data and "
            "its arrays would mean something else; give the old ones, or another --output-dir."
        )
    steps = config.optimisation.max_steps
    if steps < step:
        raise ValueError(
            f"--resume: {output} is at step {step}, beyond --max-steps {steps}; give more steps, or another "
            "--output-dir."
        )
    if not before:
        print(f"resumed at step {step}; the run does not say with which flags it was begun")
    if changed:
        text = ", ".join(changed.values())
        print(
            f"resumed at step {step} with other flags than before, which hold from here on: {text}"
        )


def note(config: Any, output: pathlib.Path) -> train.Callback:
    """A callback that writes what has changed into the first row after a checkpoint, and so into the logs."""
    _, before = train.saved_settings(output / "checkpoints") or (0, {})
    changed = _changed(config, before)
    left = [{"resumed_with": ", ".join(changed.values())}] if changed else []
    return train.Callback(on_step=lambda step, state: left.pop() if left else None)


def _changed(config, before):
    """{flag: "--flag before -> now"}"""
    text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    now = settings(config)
    names = sorted(name for name in now if name in before and now[name] != before[name])
    return {
        name: f"{choices.option(name)} {text(before[name])} -> {text(now[name])}" for name in names
    }
