"""--resume says what has changed, and refuses what would make another run of it."""

import json

import jax.numpy as jnp
import optax
import pytest

from experiments import preference, reinforce, sft
from experiments.cli import flags, resuming
from jaxft import train
from jaxft.metrics import Mean


def config_of(output, script=sft, **given):
    return flags.replace(script.Config(), output_dir=str(output), resume=True, **given)


def run(config, output, steps):
    """A few steps of a parabola, saved with the flags of a script."""

    def objective(params, batch, key):
        loss = Mean(jnp.sum((params["w"] - batch) ** 2), jnp.float32(1))
        return loss.value, {"loss": loss}

    settings = resuming.settings(config)
    return train.fit(
        {"w": jnp.ones(2)},
        objective,
        optax.sgd(0.1),
        [jnp.zeros(2)] * 9,
        steps=steps,
        callbacks=[resuming.note(config, output), train.jsonl_log(output / "metrics.jsonl")],
        checkpoints=train.Checkpoints(output / "checkpoints", resume=True, settings=settings),
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The directory of a run of three steps."""
    output = tmp_path_factory.mktemp("run")
    run(config_of(output, data=("a.jsonl",)), output, 3)
    return output


def test_the_same_flags_and_those_that_change_nothing_say_nothing(begun, capsys):
    same = config_of(begun, data=("a.jsonl",))
    for config in (same, flags.replace(same, fsdp=2, save_steps=7, remat="full", debug=True)):
        resuming.check(config, begun)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change, said",
    [
        ({"batch_size": 4}, "--batch-size 2 -> 4"),
        ({"data": ("b.jsonl", "c.jsonl")}, "--data a.jsonl -> b.jsonl c.jsonl"),
        ({"alpha": 8.0, "seed": 1}, "--alpha 32.0 -> 8.0, --seed 0 -> 1"),
        ({"max_steps": 2}, "is at step 3, beyond --max-steps 2"),
    ],
)
def test_what_would_be_wrong_is_refused(begun, change, said):
    config = flags.replace(config_of(begun, data=("a.jsonl",)), **change)
    with pytest.raises(ValueError) as caught:
        resuming.check(config, begun)
    assert said in str(caught.value) and "another --output-dir" in str(caught.value)


def test_a_data_file_that_changed_under_its_name_is_refused(tmp_path, monkeypatch):
    file, output = tmp_path / "a.jsonl", tmp_path / "run"
    file.write_text('{"text": "old"}\n' * 9)
    config = config_of(output, data=(str(file), "rg:chain_sum"), eval_data=None)
    before = resuming.settings(config)
    assert list(before[resuming.FILES]) == [str(file)]
    monkeypatch.setattr(train, "saved_settings", lambda path: (1, before))
    resuming.check(config, output)
    monkeypatch.setattr(train, "saved_settings", lambda path: (1, {"seed": 0}))
    resuming.check(config, output)  # A run that was begun before files were saved.
    monkeypatch.setattr(train, "saved_settings", lambda path: (1, before))
    for text in ('{"text": "new"}\n' * 9, '{"text": "old"}\n' * 8):  # also of the same length
        file.write_text(text)
        with pytest.raises(ValueError, match="a.jsonl is not the file that .*another --output-dir"):
            resuming.check(config, output)
    monkeypatch.setattr(resuming, "WHOLE", 8)  # The first and the last four bytes of a larger file.
    before = resuming.settings(config)
    file.write_text(file.read_text()[:-2] + " \n")
    assert resuming.settings(config) != before


def test_another_schedule_is_told_on_the_screen_and_in_the_log(begun, capsys):
    config = config_of(begun, data=("a.jsonl",), max_steps=120, learning_rate=0.5)
    resuming.check(config, begun)
    changed = "--learning-rate 0.001 -> 0.5, --max-steps 60 -> 120"
    said = f"resumed at step 3 with changed flags, which apply from here on: {changed}\n"
    assert capsys.readouterr().out == said
    run(config, begun, 5)
    rows = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("resumed_with") for row in rows] == [None, None, None, changed, None]


def test_every_name_is_a_flag():
    known = set().union(*(flags.flat(s.Config()) for s in (sft, preference, reinforce)))
    assert (resuming.FREE | resuming.FIXED) - known <= {"fields"}
    assert resuming.FREE.isdisjoint(resuming.FIXED)


def test_nothing_is_compared_where_nothing_is_saved(tmp_path, capsys):
    resuming.check(config_of(tmp_path), tmp_path)
    assert capsys.readouterr().out == "" and train.saved_settings(tmp_path / "none") is None
