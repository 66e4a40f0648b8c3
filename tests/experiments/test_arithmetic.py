"""The small task of reinforcement learning: exact measures against samples and loops, and the demo."""

import json

import jax
import numpy as np
import pytest

from experiments import demo_rl
from experiments.worlds import arithmetic
from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.metrics import pass_at_k

SUMS = arithmetic.Sums(["1+2=", "10+7=", "9+9="], ["3", "17", "18"])


@pytest.fixture(scope="module")
def small():
    model, params = arithmetic.small_model(jax.random.key(0), width=32)
    # A start of some steps, whose answers end.
    rows = arithmetic.layout(*SUMS)
    measure = lambda p: float(arithmetic.answer_probabilities(model)(p, rows).mean())
    return model, arithmetic.warm_start(
        model, params, rows, 0, until=0.3, measure=measure, learning_rate=3e-3, batch_size=3
    )[0]


def test_probabilities_are_those_of_the_sampler(small):
    model, params = small
    prompts = arithmetic.encode(SUMS.questions)
    config = SamplingConfig(4, stop_ids=(0,))
    tokens, mask = rl.sample_on_device(model, params, prompts, jax.random.key(1), config, 4000)
    reward = rl.equals(arithmetic.encode_answers(SUMS.answers), 4)
    flat = lambda x: x.reshape(12_000, 4)
    share = reward(flat(tokens), flat(mask), np.repeat(np.arange(3), 4000)).reshape(3, 4000)
    rows = arithmetic.layout(*SUMS)
    exact = np.asarray(arithmetic.answer_probabilities(model)(params, rows))
    assert ((exact > 0.05) & (exact < 0.95)).any()
    errors = np.abs(np.asarray(share).mean(axis=1) - exact)
    assert (errors < 4 * np.sqrt(exact * (1 - exact) / 4000) + 1e-6).all(), (share, exact)


def test_rows_are_laid_out_as_experience():
    rows = arithmetic.layout(SUMS.questions, SUMS.answers)
    text = lambda ids: "".join(arithmetic.ALPHABET[i] for i in ids)
    for i, (question, answer) in enumerate(zip(*SUMS, strict=True)):
        seen = rows["segment_ids"][i] > 0
        assert text(rows["tokens"][i][seen]) == question + answer + "\n"
        assert rows["positions"][i][seen].tolist() == list(range(seen.sum()))
        assert text(rows["tokens"][i][rows["loss_mask"][i] > 0]) == answer + "\n"
        size = rows["completion_mask"].shape[1]
        assert text(rows["tokens"][i, -size:][rows["completion_mask"][i]]) == answer + "\n"


def test_pass_at_k_of_probabilities_is_the_mean_of_their_estimates():
    rng = np.random.default_rng(0)
    p = np.array([0.0, 0.1, 0.7, 1.0])
    counts = rng.binomial(16, p, (20_000, 4))

    estimate = pass_at_k(counts, 16, 4).mean()
    np.testing.assert_allclose(estimate, arithmetic.pass_at(p, 4), atol=2e-3)


def test_held_out_sums_are_new():
    spec = arithmetic.TASK + "&size=3000&seed="
    known, new, records = arithmetic.chain_sums(spec + "1", spec + "100000")
    assert not set(known.questions) & set(new.questions)
    assert len(set(new.questions)) == len(new.questions) == len(records) > 100
    assert all(eval(q[:-1]) == int(a) for q, a in zip(*new, strict=True))


def test_a_start_that_is_never_reached_is_an_error(small):
    model, params = small
    rows = arithmetic.layout(*SUMS)
    with pytest.raises(RuntimeError, match="0.9 was not reached in 2 steps"):
        arithmetic.warm_start(
            model, params, rows, 0, until=0.9, measure=lambda p: 0.1, batch_size=2, check=1, most=2
        )


def test_demo_rl_smoke(tmp_path):
    assert demo_rl.main(demo_rl.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    still = metrics["runs"][0]["learning rate 0"]
    assert still["before"] == still["after"]
    moved = metrics["runs"][0]["GRPO"]
    assert [step for step, _ in moved["curve"]] == [0, 1, 2]
    assert (tmp_path / "demo_rl.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arm, change, fails",
    [
        ("GRPO", {}, []),
        ("GRPO", {"pass@1": 0.39}, [0]),
        ("GRPO", {"verified": 0.5}, [1]),
        ("GRPO", {"pass@8": 0.7}, [2]),
        ("GRPO", {"pass@1": 0.401}, [0]),
        ("verdicts of others", {"pass@1": 0.5}, [3]),
        ("learning rate 0", {"pass@1": 0.41}, [4]),
    ],
)
def test_the_demo_s_judge_can_fail(arm, change, fails):
    before = {"pass@1": 0.4, "pass@8": 0.8, "verified": 0.6}
    after = {"pass@1": 0.6, "pass@8": 0.8, "verified": 0.7}
    run = {
        "GRPO": {"before": before, "after": after},
        "verdicts of others": {"before": before, "after": before | {"pass@1": 0.3}},
        "learning rate 0": {"before": before, "after": before},
    }
    run[arm] = {"before": before, "after": run[arm]["after"] | change}
    # Seeds that differ a little, so that there is an interval.
    shifted = [
        {a: {w: {k: v + (w == "after") * (a != "learning rate 0") * d for k, v in m.items()}
             for w, m in r.items()} for a, r in run.items()}
        for d in (0.0, 0.002, -0.002)
    ]  # fmt: skip
    holds = [claim.holds for claim in demo_rl.judge(shifted)]
    assert [i for i, h in enumerate(holds) if not h] == fails
