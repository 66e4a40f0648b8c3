"""The survey's script: its world, what its verifiers learn from, its curves and its judge."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers.reasoning_survey import main as survey
from experiments.papers.reasoning_survey import methods, smollm2, worlds
from experiments.worlds import arithmetic, running_sums
from jaxft.generation import Path
from jaxft.models import Decoder, tiny_config


def test_a_sum_is_written_as_its_running_totals():
    assert running_sums.question([7, 5, 9]) == "7+5+9="
    assert running_sums.chain([7, 5, 9]) == "2;1"
    assert running_sums.length(3) == len("7+5+9=2;1") + 1
    for text, total in (("2;1", "1"), ("2;", None), ("1", None), ("2;=", None)):
        assert running_sums.result(text, 3) == total
    rng = np.random.default_rng(0)
    numbers = running_sums.drawn(rng, 60, 3)
    assert len(set(map(tuple, numbers.tolist()))) == 60
    with pytest.raises(ValueError, match="too few"):
        running_sums.drawn(rng, 50, 2)
    rows = running_sums.rows_of(numbers)
    for tokens, mask, asked in zip(
        rows["tokens"], rows["loss_mask"], numbers.tolist(), strict=True
    ):
        text = "".join(arithmetic.ALPHABET[i] for i in tokens)
        answer = running_sums.chain(asked) + arithmetic.STOP
        assert text == running_sums.question(asked) + answer
        assert "".join(arithmetic.ALPHABET[i] for i in tokens[mask > 0]) == answer


def test_rewards_on_the_device_are_those_of_text():
    numbers = np.array([[7, 5, 9]])
    reward = running_sums.total_reward(numbers)
    for text, value in (
        ("2;1", 1), ("3;1", 1), ("2;2", 0), ("2;", 0), ("1", 0),
    ):  # fmt: skip
        tokens, mask = np.zeros((1, 4), np.int32), np.zeros((1, 4), bool)
        ids = arithmetic.encode_answers([text])[0]
        tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
        assert reward(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(1, int)) == value, text


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("survey")
    assert survey.main(survey.Config(smoke=True, output_dir=str(output))) == 0
    assert (output / "reasoning_survey.png").stat().st_size > 1000
    return json.loads((output / "metrics.json").read_text())["runs"][0]


def test_smoke(smoke):
    curves = smoke["curves"]
    assert {
        "greedy", "majority", "best of N", "weighted vote", "oracle", "step beam search", "DVTS",
        "MCTS", "adaptive consistency", "self-refine", "debate", "generator and evaluator",
    } <= set(curves)  # fmt: skip
    assert all(0 <= row["accuracy"] <= 1 for rows in curves.values() for row in rows)
    # A chain of one sample is its own vote, its own best and its own weighted vote.
    first = {curves[name][0]["accuracy"] for name in ("majority", "best of N", "weighted vote")}
    assert len(first) == 1
    for name in ("majority", "best of N"):
        assert curves[name][0]["flops"] < curves[name][1]["flops"]
    assert curves["majority"][1]["flops"] < curves["best of N"][1]["flops"]
    assert set(smoke["learned"]) == {"start", "RFT", "GRPO"}


def test_votes_break_ties_by_log_probability():
    world = worlds.World(*[None] * 16)._replace(read=lambda ids: ids[-1] if ids[-1] else None)
    paths = [Path((1,), ((a,),), log_prob) for a, log_prob in ((5, -2.0), (6, -1.0), (0, 0.0))]
    choose = methods.voted(world, lambda paths, answers: methods.majority_vote(answers))
    assert choose(paths).answer == (6,) and choose([*paths, paths[0]]).answer == (5,)
    assert choose(paths[2:]) is None


def test_padded_rows_hold_prompts_and_answers():
    rows = worlds.padded([((5, 6), (7,)), ((8,), (9, 1, 2))])
    assert rows["tokens"].tolist() == [[5, 6, 7, 0], [8, 9, 1, 2]]
    assert rows["loss_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert rows["positions"].tolist() == [[0, 1, 2, 2], [0, 1, 2, 3]]


def test_smollm2_s_answer_is_the_last_number():
    assert smollm2.stated("5 - 9 is\n-4.") == "-4" and smollm2.stated("None.") is None
    row = {"question": "4 + 3 =", "answer": "7", "metadata": {"a": 1}}
    record = smollm2.record_of(row, None)
    assert [turn["role"] for turn in record["prompt"]] == ["system", "user"]
    assert record["prompt"][1]["content"] == "4 + 3 =" and record["metadata"] == {"a": 1}


@pytest.fixture(scope="module")
def states():
    """(Makes the states of a small model, its task)."""
    model = Decoder(tiny_config(16, 64))
    params = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 1), np.int32))["params"]
    settings = types.SimpleNamespace(trained_at_once=4)
    task = types.SimpleNamespace(model=model, params=params, settings=settings, mesh=None)
    return lambda: smollm2.states(task), task


def test_states_of_prefixes_are_those_of_each_alone(states):
    make, task = states
    rows = [(1, 2, 3, 4, 5), (1, 2), (7, 8, 9), (1, 2, 3), (1, 2)]
    found = make()(rows)
    batch = {"tokens": np.array([rows[0]]), "segment_ids": np.ones((1, 5), np.int32)}
    batch["positions"] = np.arange(5)[None]
    hidden = jax.jit(lambda params, batch: task.model.forward(params, batch, None).hidden)
    whole = np.asarray(hidden(task.params, batch))[0]
    np.testing.assert_allclose(found[[0, 1, 3, 4]], whole[[4, 1, 2, 1]], atol=1e-5)
    later = make()
    later(rows[:1]), later(rows[2:3])
    np.testing.assert_allclose(later(rows), found, atol=1e-5)


def test_a_linear_verifier_learns_labels_at_the_ends_of_steps():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (200, 1, 6))
    # The state of a prefix is its last token; labels are whether that is above 4.
    of = lambda prefixes: np.array([[p[-1], rng.normal()] for p in prefixes], np.float32)
    ends = np.stack([np.full(200, 2), np.where(rng.random(200) < 0.5, 5, -1)], axis=1)
    labels = np.take_along_axis(tokens[:, 0], np.maximum(ends, 0), axis=1) > 4
    rows = {"tokens": tokens, "step_ends": ends, "step_labels": labels.astype(np.float32)}
    config = types.SimpleNamespace(learning_rate=0.1, verifier_steps=60)
    verifier = smollm2.reward_model(config, of, rows, 0)
    low, middle, high = verifier([(8, 0), (0, 4), (0, 8)])
    assert low < 0.1 < middle < high > 0.9


def test_bad_settings_are_found_before_any_work():
    for change, message in (
        (dict(most=24), "most must be a power of two"),
        (dict(sizes=(64,)), "no size above it"),
        (dict(sizes=(1, 4)), "sizes: must be at least 2"),
        (dict(terms=2), "terms: must lie in 3..10"),
        (dict(depth=3), "--depth 3 has no effect without --preset"),
        (dict(preset="smollm2", terms=4), "--terms 4 has no effect with --preset smollm2"),
    ):
        with pytest.raises(ValueError, match=message):
            survey.main(survey.Config(**change))


def row(n, accuracy, flops):
    return {"n": n, "accuracy": accuracy, "flops": flops}


def run(d, **change):
    curve = lambda one, many, factor=1.0: [row(1, one, 1e6), row(16, many + d, 1.6e7 * factor)]
    curves = {
        "greedy": [row(1, 0.5 + d, 1e6)],
        "majority": [row(1, 0.4, 1e6), row(16, 0.6 + d, 1.6e7), row(32, 0.62 + d, 3.2e7)],
        "best of N": curve(0.4, 0.65, 2),
        "weighted vote": curve(0.4, 0.7, 2),
        "best of N, random verifier": curve(0.4, 0.4, 2),
        "oracle": curve(0.4, 0.9),
        "step beam search": curve(0.4, 0.75),
        "DVTS": curve(0.4, 0.7),
        "MCTS": curve(0.4, 0.7),
        "self-refine": curve(0.4, 0.45, 0.5),
        "debate": curve(0.4, 0.5),
        "adaptive consistency": curve(0.4, 0.6, 0.5),
    }
    for name, accuracy in change.items():
        if name in curves:
            curves[name][-1]["accuracy"] = accuracy
    passes = {"start": [0.4 + d, 0.9], "RFT": [0.5, 0.91], "GRPO": [0.6, 0.91]}
    passes |= {name: value for name, value in change.items() if name in passes}
    return {
        "curves": curves,
        "learned": {name: {"pass": value} for name, value in passes.items()},
        "verifier": {"brier": 0.1, "brier of the mean": 0.25},
    }


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, []),
        ({"greedy": 0.61}, [0]),
        ({"weighted vote": 0.5}, [1, 4]),
        ({"best of N, random verifier": 0.66}, [2]),
        ({"oracle": 0.72}, [3]),
        ({"weighted vote": 0.62}, [4]),
        ({"step beam search": 0.55}, [5]),
        ({"debate": 0.7}, [6]),
        ({"adaptive consistency": 0.5}, [7]),
        ({"RFT": [0.39, 0.9]}, [8]),
        ({"GRPO": [0.5, 0.7]}, [9]),
    ],
)
def test_the_judge_can_fail(change, fails):
    runs = [run(d, **change) for d in (0.0, 0.002, -0.002)]
    claims = survey.judge(survey.Config(sizes=(4, 16)), runs)
    assert [i for i, claim in enumerate(claims) if not claim.holds] == fails


def test_one_run_of_smollm2_is_judged_by_its_estimates():
    config = survey.Config(preset="smollm2", sizes=(16,))
    judged = lambda **change: [
        claim.holds for claim in survey.judge(config, [learned_only_start(run(0.0, **change))])
    ]
    assert judged() == [True] * 5
    # With one run, "some of the interval" would hold whatever was measured.
    assert judged(**{"weighted vote": 0.5})[1] is False


def learned_only_start(run):
    searches = ("step beam search", "DVTS", "MCTS", "self-refine", "debate", "adaptive consistency")
    chains = {name: rows for name, rows in run["curves"].items() if name not in searches}
    return run | {"curves": chains, "learned": {"start": run["learned"]["start"]}}
