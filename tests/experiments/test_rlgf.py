"""RLGF's script: who writes in each method, references of the right questions, its judge can fail."""

import json

import jax
import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers import rlgf
from experiments.worlds import words
from jaxft import rl


def test_smoke(tmp_path):
    config = flags.replace(
        rlgf.Config(), smoke=True, reference_weight=0.1, output_dir=str(tmp_path)
    )
    assert rlgf.main(config) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert list(run["methods"]) == ["PPO", "D2LOLS"]
    shares = {name: row["guide_tokens"] for name, row in run["methods"].items()}
    assert shares["PPO"] == 0 < shares["D2LOLS"] < 1
    assert all(row["curve"][-1][0] == 2 for row in run["methods"].values())
    assert all(0 <= row["pass@1"] <= 1 for row in run["methods"].values())
    assert (tmp_path / "rlgf.png").stat().st_size > 1000


def test_a_reward_is_1_only_for_the_whole_answer():
    world = rlgf.reversal(flags.replace(rlgf.Config(), **rlgf.SMOKE), 0)
    word, answer = world.known.ids[3][1:], world.known.records[3]["answer"]
    assert answer == [*word[::-1], words.END] and len(word) == words.LENGTH
    given = [answer, answer[:-1], [*answer[:-2], answer[-2] ^ 1, words.END], []]
    assert world.judge(given, [world.known.records[3]] * 4) == [1.0, 0.0, 0.0, 0.0]
    row = world.references["tokens"][3]
    assert row.tolist() == world.known.ids[3] + answer
    assert world.references["loss_mask"][3].tolist() == [0.0] * words.SIZE + [1.0] * words.SIZE


def test_references_are_those_of_the_questions_that_are_sampled():
    ids = [[i, i] for i in range(10)]
    prompts = rl.Prompts(ids, 4, seed=1)
    sample = lambda params, asked, key: {"asked": np.array(asked.ids)}
    both = rlgf.with_answers(sample, prompts, {"tokens": np.array(ids) + 100})
    for draw in range(5):
        found = both(None, prompts.pick(draw), jax.random.key(0))
        np.testing.assert_array_equal(found["references"]["tokens"], found["asked"] + 100)


@pytest.mark.parametrize(
    "name, change, fails",
    [
        (None, {}, []),
        ("PPO", {"pass@1": 0.75}, [1, 2]),
        ("LOLS", {"pass@1": 0.3}, [2]),
        ("AggreVaTeD", {"pass@1": 0.95}, [4]),
        ("PPO++", {"pass@1": 0.65}, [5]),
    ],
)
def test_the_judge_can_fail(name, change, fails):
    rates = dict(zip(rlgf.METHODS, (0.5, 0.8, 0.7, 0.7, 0.9), strict=True))
    methods = {method: {"pass@1": rate} for method, rate in rates.items()}
    if name:
        methods[name] = methods[name] | change
    start, guide = {"pass@1": 0.02}, {"pass@1": 0.7}
    runs = [{"start": start, "guide": guide, "methods": methods} for _ in range(3)]
    assert [i for i, c in enumerate(rlgf.judge(runs)) if not c.holds] == fails


@pytest.mark.parametrize(
    "name, tokens, fails",
    [
        ("PPO", [0.9] * 6, []),
        ("PPO++", [0.8, 0.5, 0.5, 0.5, 0.4, 1.0], [1]),
        ("PPO++", [0.95, 0.5, 0.5, 0.5, 0.9, 1.0], [1]),
        ("AggreVaTeD", [0.8, 0.5, 0.5, 0.5, 0.4, 0.2], [2]),
        ("AggreVaTeD", [0.95, 0.5, 0.5, 0.5, 0.4, 1.0], [2]),
    ],
)
def test_the_mechanism_is_judged_by_token(name, tokens, fails):
    start = [0.9, 0.5, 0.5, 0.5, 0.8, 0.98]
    found = dict.fromkeys(rlgf.METHODS, [0.9] * 6)
    found |= {"PPO++": [0.7, 0.5, 0.5, 0.5, 0.9, 1.0]}
    found |= {"AggreVaTeD": [0.95, 0.5, 0.5, 0.5, 0.3, 0.2], name: tokens}
    noise = np.random.default_rng(0).normal(0, 0.001, (3, 6))
    row = lambda rate, x, noise: {"pass@1": rate, "tokens": (np.array(x) + noise).tolist()}
    runs = [
        {
            "start": row(0.1, start, 0),
            "methods": {m: row(0.5 + n[0], x, n) for m, x in found.items()},
        }
        for n in noise
    ]
    claims = rlgf.mechanism(runs)
    assert [i for i, claim in enumerate(claims) if not claim.holds] == fails
    assert claims[0].detail.startswith("by token 0.90 0.50 0.50 0.50 0.80 0.98 -> 0.90")
