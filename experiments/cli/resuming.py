"""Checks --resume with changed flags or data: refuses if the result would be wrong, else reports it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

from experiments.cli import choices, flags
from jaxft import data, train

# Flags that do not change what a run computes: paths, sharding and output.
FREE = frozenset(
    "output_dir save_steps logging_steps report_to profile_dir resume debug preview remat data_axis fsdp "
    "tensor expert context slices distributed workers timeout eval_steps accuracy push_dir push_every "
    "push_to_hub public".split()
)
# Flags that determine the meaning of the data position and the saved arrays.
FIXED = frozenset(
    "model template adapter d rank alpha target quantise start scan_layers data eval_data validation "
    "fields weights weights_by batch_size max_length packing mask train_on too_long max_bad seed loss "
    "algorithm max_staleness prompts_per_step group_size updates epochs turns share_prompts "
    "entropy_target "
    "optimizer sharpness smoke teacher".split()
)

# The name under which digests of local data files are saved with the flags.
FILES = "data_files"
WHOLE = 64 * 2**20  # bytes of a file to hash; of a larger file, half from each end


def settings(config: Any) -> dict[str, Any]:
    """Returns the flags that each checkpoint saves, as read back from JSON, and digests of data files."""
    found = {name: value for name, value in flags.flat(config).items() if name not in FREE}
    specs = [found.get("data") or (), found.get("eval_data") or ()]
    names = [name for spec in specs for name in ([spec] if isinstance(spec, str) else spec)]
    held = {name: _contents(name) for name in names}
    return json.loads(json.dumps(found, default=str)) | {
        FILES: {k: v for k, v in held.items() if v}
    }


def check(config: Any, output: pathlib.Path) -> None:
    """Compares the flags with those of the run in `output`, and prints the changes in one line.

    Raises:
        ValueError: for a change after which the result would belong to neither setting.
    """
    earlier = train.saved_settings(output / "checkpoints")
    if earlier is None:
        return
    step, before = earlier
    changed = _changed(config, before)
    if fixed := [text for name, text in changed.items() if name in FIXED]:
        raise ValueError(
            f"--resume: {output} was begun with other flags: {', '.join(fixed)}. Its data position and its "
            "arrays would have another meaning; use the old flags, or another --output-dir."
        )
    files = settings(config)[FILES]
    for name, then in before.get(FILES, {}).items():
        if files.get(name, then) != then:
            raise ValueError(
                f"--resume: {name} is not the file that {output} was begun with ({then}; now {files[name]}). "
                "Its data position would refer to other records; restore the old file, or use another "
                "--output-dir."
            )
    steps = config.optimisation.max_steps
    if steps < step:
        raise ValueError(
            f"--resume: {output} is at step {step}, beyond --max-steps {steps}; give more steps, or another "
            "--output-dir."
        )
    if not before:
        print(f"resumed at step {step}; the run has no record of its original flags")
    if changed:
        text = ", ".join(changed.values())
        print(f"resumed at step {step} with changed flags, which apply from here on: {text}")


def note(config: Any, output: pathlib.Path) -> train.Callback:
    """Returns a callback that adds the changes to the first row after a checkpoint, and so to the logs."""
    _, before = train.saved_settings(output / "checkpoints") or (0, {})
    changed = _changed(config, before)
    left = [{"resumed_with": ", ".join(changed.values())}] if changed else []
    return train.Callback(on_step=lambda step, state: left.pop() if left else None)


def _contents(spec):
    """Returns size and digest of the local files of a source; "" if there are none."""
    files = data.local_files(spec)
    digest, size = hashlib.sha256(), 0
    for path in files:
        size += (own := path.stat().st_size)
        digest.update(f"{path.name} {own}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(WHOLE if own <= WHOLE else WHOLE // 2))
            if own > WHOLE:
                file.seek(own - WHOLE // 2)
                digest.update(file.read())
    return f"{size} bytes, sha256 {digest.hexdigest()[:12]}" if files else ""


def _changed(config, before):
    """{flag: "--flag before -> now"}"""
    text = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    now = settings(config)
    names = sorted(name for name in now if name in before and now[name] != before[name])
    names = [name for name in names if name != FILES]
    return {
        name: f"{choices.option(name)} {text(before[name])} -> {text(now[name])}" for name in names
    }
