"""Evaluation uses the records that the user brought, and every number names its records."""

import pytest

from experiments import preference, reinforce, sft
from experiments.cli import flags, held_out, models, preference_data, rewards
from jaxft import data

SCRIPTS = (sft, preference, reinforce)


def ask(record):
    return record["prompt"]


def records(number, questions=None):
    return [{"id": i, "prompt": f"question {i % (questions or number)}"} for i in range(number)]


def config_of(script, path=None, **given):
    own = {} if path is None else {"data": path if script is reinforce else (path,)}
    return flags.replace(script.Config(), **own, **given)


@pytest.mark.parametrize(
    "number, share, most, expected",
    [(40, None, 1.0, 4), (5000, None, 0.04, 200), (3, None, 1.0, 1), (40, 0.5, 0.01, 20)],
)
def test_a_part_is_a_tenth_at_most_200_or_the_share(number, share, most, expected):
    training, held = held_out.part(records(number), ask, share, most)
    assert (len(training), len(held)) == (number - expected, expected)
    # The same whatever the order, and spread over the file.
    again = held_out.part(records(number)[::-1], ask, share, most)[1]
    assert sorted(r["id"] for r in again) == sorted(r["id"] for r in held)
    assert share is None or {r["id"] for r in held} != set(range(number - expected, number))


def test_records_that_ask_the_same_lie_on_one_side():
    training, held = held_out.part(records(60, questions=6), ask, 0.3)
    assert len(held) == 20 and {ask(r) for r in training}.isdisjoint(map(ask, held))
    assert held_out.part(records(5, questions=1), ask, None) == (records(5, questions=1), [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_own_data_are_evaluated_on_a_part_of_themselves(script, capsys):
    loaded = []
    load = lambda spec: loaded.append(spec) or records(44)[36:]
    parts = held_out.with_held_out(config_of(script, "dir/own.jsonl"), [records(40)], load, ask)
    assert parts.name == "4 held-out records of own.jsonl" and not loaded
    said = "training on 36 records of own.jsonl; evaluated on 4 held-out records of own.jsonl"
    assert said in capsys.readouterr().out
    # The default task has a separate held-out task, unless a part is asked for.
    parts = held_out.with_held_out(config_of(script), [records(40)], load, ask)
    assert loaded == [held_out.EVAL] and parts.name == "4 records of rg:needle_haystack"
    for more in ({"eval_data": ""}, {"validation": 0.25}):
        held_out.with_held_out(config_of(script, **more), [records(40)], load, ask)
    assert loaded == [held_out.EVAL]
    config = config_of(script, "own.jsonl", eval_data="other.jsonl")
    parts = held_out.with_held_out(config, [records(40)], load, ask)
    assert (
        parts.name == "4 records of other.jsonl" and "4 more also occur" in capsys.readouterr().out
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_smoke_with_own_data_does_not_evaluate_the_default_task(script):
    small = script.shared.start(config_of(script, "own.jsonl", smoke=True), script.SMALL)
    assert small.eval_data is None
    assert script.shared.start(config_of(script, smoke=True), script.SMALL).eval_data


def test_what_cannot_be_split_is_an_error():
    load = lambda spec: records(4)
    for given, said in (
        (
            {"validation": 0.5, "eval_data": "x"},
            "--validation 0.5 has no effect with --eval-data x",
        ),
        ({"validation": 1.5}, "--validation must lie between 0 and 1, got 1.5"),
        ({}, "own.jsonl: 1 records cannot be split"),
        ({"eval_data": "x"}, "every held-out record is also in the training data"),
    ):
        several = records(4) if given.get("eval_data") else records(1)
        with pytest.raises((ValueError, data.DataError), match=said):
            held_out.with_held_out(config_of(sft, "own.jsonl", **given), [several], load, ask)


def test_labels_that_are_all_the_same_are_told(capsys):
    preference_data._labelled_and_told([{"label": True}, {"label": True}])
    assert "all 2 training records have the label True" in capsys.readouterr().out
    preference_data._labelled_and_told([{"label": True}, {"label": False}])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "limit, message", [("timeout", "timeout > 0, got 2 and 0"), ("workers", "workers >= 1")]
)
def test_a_limit_of_zero_is_not_the_default(limit, message):
    settings = flags.Rewards(judge="os:getcwd", **{limit: 0})
    with pytest.raises(ValueError, match=message), rewards.opened(settings, flags.Model(), []):
        pass


def test_records_left_out_are_told_and_few_left_are_an_error(capsys):
    bad = data.BadRecords()
    held_out.tell_of(bad, 10, 10)
    assert not capsys.readouterr().out
    bad.dropped["too_long"] += 9
    held_out.tell_of(bad, 3, 12)
    said = "training records left out or cut: 9 too_long; 3 of 12 are left"
    assert said in capsys.readouterr().out
    with pytest.raises(data.DataError, match="only 1 of 100 training records are left .9 too_long"):
        held_out.tell_of(bad, 1, 100)


def test_an_adapter_of_another_base_model_is_noted(tmp_path, capsys):
    tell = lambda model: models.tell_base(str(tmp_path), model) or capsys.readouterr().err
    assert tell("smollm2") == ""  # no file that names one
    for content in ("[]", "{}", '{"base_model_name_or_path": null}', "{"):
        (tmp_path / "adapter_config.json").write_text(content)
        assert tell("smollm2") == ""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "tiny"}')
    assert tell("tiny") == tell("./tiny") == ""
    said = tell("smollm2")
    assert "names 'tiny' as its base model" in said and "give --model tiny\n" in said
