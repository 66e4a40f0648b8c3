"""Echo Chamber's script: its formats and reward, its decomposition, its judge."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers import echo_chamber as echo
from experiments.worlds import arithmetic, workings


def test_formats_of_a_sum():
    texts = [workings.answer(name, 123, 456) for name in "ABC"] + [workings.answer("C", 905, 98)]
    assert texts == ["A0579", "B9750|0579", "C050709|0579", "C090913|1003"]
    assert [len(text) for text in texts[:3]] == list(workings.lengths().values())
    assert workings.question(7, 31, 2) + workings.answer("C", 7, 31, 2) == "07+31=C0308|038"


def reward_of(text, reward, number):
    ids = arithmetic.encode([text])[0]
    size = workings.sampling().max_new_tokens
    tokens = jnp.zeros((1, size), jnp.int32).at[0, : len(ids)].set(jnp.array(ids))
    mask = (jnp.arange(size) < len(ids))[None]
    return float(reward(tokens, mask, jnp.array([number]))[0])


@pytest.mark.parametrize(
    "text, right, parsed",
    [
        ("A0579\n", 1, 1),
        ("B9750|0579\n", 1, 1),
        ("C050709|0579\n", 1, 1),
        ("B0000|0579\n", 1, 1),  # The working may be wrong.
        ("A0578\n", 0, 1),
        ("A0579", 0, 0),  # It does not end.
        ("A00579\n", 0, 0),
        ("A05=9\n", 0, 0),
        ("B975010579\n", 0, 0),
        ("C9750|0579\n", 0, 0),
        ("B050709|0579\n", 0, 0),
        ("00579\n", 0, 0),
    ],
)
def test_reward_asks_for_the_sum_and_the_length_of_the_format(text, right, parsed):
    totals = np.array([1, 579])
    assert reward_of(text, workings.result_reward(totals), 1) == right
    assert reward_of(text, workings.result_reward(totals), 0) == 0
    some = reward_of(text, workings.result_reward(totals, partial=0.1), 1)
    assert some == pytest.approx(max(right, 0.1 * parsed))


def test_what_was_selected():
    before = {"shares": [0.5, 0.5, 0.0], "accuracy": [0.6, 0.2, 0.0]}
    after = {"shares": [1.0, 0.0, 0.0], "accuracy": [0.8, 0.0, 0.0]}
    # 0.4 -> 0.8, of which 0.6 would come without anything learned.
    np.testing.assert_allclose(echo.selected(before, after), 0.2)


def test_smoke(tmp_path):
    assert echo.main(echo.Config(smoke=True, output_dir=str(tmp_path))) == 0
    runs = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [row["step"] for row in runs[0]["GRPO"]] == [0, 1, 2]
    assert (tmp_path / "echo_chamber.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arm, step, change, fails",
    [
        ("GRPO", 0, {}, []),
        ("GRPO", 40, {"shares": [0.5, 0.5, 0.0]}, [0]),
        ("GRPO", 20, {"shares": [0.55, 0.4, 0.05]}, [1, 2, 3]),
        ("GRPO with KL", 20, {"shares": [0.95, 0.05, 0.0]}, [2]),
        ("Expert Iteration", 20, {"shares": [0.95, 0.05, 0.0]}, [3]),
        ("Expert Iteration", 40, {"shares": [0.1, 0.9, 0.0]}, [3]),
    ],
)
def test_the_judge_can_fail(arm, step, change, fails):
    def measured(share, accuracy, offset):
        shares = [share + offset, 1 - share - offset, 0.0]
        within = [accuracy, 0.1, 0.1]
        return {"shares": shares, "accuracy": within, "pass@1": float(np.dot(shares, within))}

    runs = []
    for offset in (0.0, 0.002, -0.002):
        row = lambda at, share, accuracy, o=offset: measured(share, accuracy, o) | {"step": at}
        run = {"GRPO": [row(0, 0.5, 0.5), row(20, 0.9, 0.55), row(40, 0.98, 0.6)]}
        for other in echo.ARMS[1:]:
            run[other] = [row(0, 0.5, 0.5), row(20, 0.7 + offset, 0.55), row(40, 0.8, 0.6)]
        at = {0: 0, 20: 1, 40: 2}[step]
        run[arm][at] = run[arm][at] | change
        runs.append(run)
    assert [i for i, c in enumerate(echo.judge(echo.Config(), runs)) if not c.holds] == fails
