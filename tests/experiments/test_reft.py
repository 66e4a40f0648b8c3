"""ReFT's script: its reward on the device and on text, self-training's rows, its judge."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers.reft import main as reft
from experiments.papers.reft import worlds
from experiments.worlds import arithmetic, reranker, workings
from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.rewards import answer_reward, numbers_equal


def test_rewards_on_the_device_are_those_of_text():
    texts = ["A139", "B931|139", "C0513|139", "C0000|139", "A138", "B931|138", "C05=3|139", "C0513139",
             "B9310139", "A13", "A0139", "A1=9", "", "139"]  # fmt: skip
    size = workings.sampling(2).max_new_tokens
    ids = arithmetic.encode_answers(texts)
    tokens = np.zeros((len(texts), size), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, seen, text in zip(tokens, mask, ids, strict=True):
        row[: len(text)], seen[: len(text)] = text, True
    device = workings.result_reward([139], 2, partial=0.1)
    given = device(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros(len(texts), jnp.int32))
    reward = answer_reward(lambda text: workings.result(text, 2), numbers_equal)
    wanted = [reward(text, {"answer": 139}) for text in texts]
    np.testing.assert_allclose(given, wanted, rtol=1e-6)
    assert wanted[:6] == [1, 1, 1, 1, 0.1, 0.1] and sum(wanted[7:]) == 0


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("reft")
    assert reft.main(reft.Config(smoke=True, output_dir=str(output))) == 0
    assert (output / "reft.png").stat().st_size > 1000
    return json.loads((output / "metrics.json").read_text())["runs"][0]


def test_smoke(smoke):
    assert {name: [row["step"] for row in rows] for name, rows in smoke.items()} == {
        name: [0, 4] for name in reft.SMOKE["algo"]
    }
    assert all(0 <= row[m] <= 1 for rows in smoke.values() for row in rows for m in reft.MEASURES)
    assert 0 <= smoke["reft"][1]["reward"] <= 1


def test_bad_settings_are_found_before_any_work():
    for change, message in (
        (dict(algo=("sft",)), "algo: sft, reft and others"),
        (dict(partial_reward=1.5), "partial_reward: must lie in"),
        (dict(kinds="AX"), "kinds: some of ABC"),
        (dict(steps=10), "steps must be a multiple of 4"),
        (dict(held_out=10_000), "there are 10000 sums of 2 digits"),
    ):
        with pytest.raises(ValueError, match=message):
            reft.main(reft.Config(**change))


def test_own_right_workings_stand_beside_the_annotated_ones():
    config, pairs = reft.Config(kinds="BC"), np.array([[12, 34], [50, 60]])
    rows = workings.rows_of(pairs, "BC", 2)
    made = workings.Start(None, None, 0, pairs, rows, pairs)
    said = [["C0406|046", "B640|046", "C0406|047", "C0406|046"], ["x", "A110", "B011|110", "A11"]]
    world = worlds.sums(config, made)._replace(answers=lambda *_: said)
    kept = reft.own_rows(config, world, None, 0)
    texts = [
        arithmetic.decode(tokens, seen > 0)
        for tokens, seen in zip(kept["tokens"], kept["segment_ids"], strict=True)
    ]
    assert texts == [
        "12+34=B640|046", "50+60=C1100|110", "12+34=C0406|046", "50+60=A110", "50+60=B011|110",
    ]  # fmt: skip


def test_gold_workings_are_those_of_the_questions_that_are_sampled():
    model, params = arithmetic.small_model(jax.random.key(0), 32)
    gold = {"tokens": np.arange(10)[:, None]}
    prompts = rl.Prompts([[i % 8 + 1] for i in range(10)], 4, seed=7)
    credit = lambda rewards, batch: {"correct": rewards}
    own = rl.collect_on_device(
        model, prompts, lambda tokens, mask, numbers: numbers * 1.0, credit,
        SamplingConfig(2), group_size=1,
    )  # fmt: skip
    batches = reft.with_gold(own, prompts, gold)
    carry = batches.carry
    for draw in range(3):
        batch, carry = batches(params, carry, jax.random.key(draw))
        assert batch["samples"]["correct"].tolist() == batch["gold"]["tokens"][:, 0].tolist()


def test_a_reranker_learns_which_workings_are_right():
    model, params = arithmetic.small_model(jax.random.key(0), 32)
    questions = [workings.question(a, 5, 2) for a in range(8)]
    # Right ones are those of kind A.
    texts = [[workings.answer(k, a, 5, 2) for k in "ABAC"] for a in range(8)]
    correct = [[True, False, True, False]] * 8
    trained = reranker.train_reranker(
        model,
        params,
        questions,
        texts,
        correct,
        steps=30,
        batch_size=16,
        learning_rate=3e-3,
        seed=0,
    )
    scores = reranker.scores(
        model, trained, questions[:3], [texts[0], texts[1][:2], texts[2]], chunk=6
    )
    assert [len(part) for part in scores] == [4, 2, 4]
    assert (
        min(scores[0][0], scores[1][0], scores[2][2])
        > 0
        > max(scores[0][1], scores[1][1], scores[2][3])
    )
    assert scores[2][0] == pytest.approx(scores[2][2], abs=1e-5)


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, []),
        ({"greedy": 0.55, "vote": 0.7}, [1]),
        ({"greedy": 0.5, "vote": 0.7}, [0, 1]),
        ({"vote": 0.6}, [2]),
    ],
)
def test_the_judge_can_fail(change, fails):
    runs = []
    for d in (0.0, 0.002, -0.002):
        row = lambda greedy, vote, d=d: {"greedy": greedy + d, "vote": vote}
        sft = [row(0.4, 0.4), row(0.55, 0.5), row(0.5, 0.5)]
        last = row(0.6, 0.65) | {k: v + (k == "greedy") * d * 0.5 for k, v in change.items()}
        runs.append({"sft": sft, "reft": [row(0.4, 0.4), last]})
    assert [i for i, c in enumerate(reft.judge(runs)) if not c.holds] == fails
