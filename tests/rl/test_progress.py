"""Progress of episodes: splitting, regret and credit, by hand and against plain loops."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.objectives import policy_gradient
from jaxft.rl import progress
from jaxft.rl.advantages import grpo_advantages
from tests.rl.rl_task import model_and_params

TEXT = "\n\n".join(["Wait, a", "Wait, b", "c", "d", "e", "Alternatively, f", "g"])


def test_episodes_begin_at_markers_that_are_far_enough():
    found = rl.split_episodes(TEXT)
    assert [part[:4] for part in found] == ["Wait", "Alte"] and "".join(found) == TEXT
    assert len(rl.split_episodes(TEXT, min_gap=0)) == 3
    assert len(rl.split_episodes(TEXT, min_gap=4)) == 2
    assert len(rl.split_episodes(TEXT, min_gap=5)) == 1
    assert rl.split_episodes("a\n\nb\n\n") == ["a\n\nb\n\n"] and rl.split_episodes("") == []
    many = "\n\n".join(f"Wait {i}" for i in range(10))
    merged = rl.split_episodes(many, min_gap=0, merge=4)
    assert [part.count("Wait") for part in merged] == [4, 4, 2] and "".join(merged) == many
    for wrong in (dict(min_gap=-1), dict(merge=0)):
        with pytest.raises(ValueError, match="min_gap must be at least 0 and merge at least 1"):
            rl.split_episodes(TEXT, **wrong)


def batch_of(tokens, mask):
    """Responses behind prompts of two tokens that are not theirs."""
    return {"tokens": np.pad(tokens, ((0, 0), (2, 0)), constant_values=7), "completion_mask": mask}


def test_ends_of_prefixes():
    tokens = np.array([[5, 7, 5, 5, 7, 9, 7], [5, 5, 9, 7, 7, 7, 7], [7, 7, 7, 5, 0, 0, 0]])
    mask = np.array([[1] * 6 + [0], [1] * 3 + [0] * 4, [1] * 4 + [0] * 3], bool)
    ends = rl.separator_ends(batch_of(tokens, mask), separator=7, most=3)
    assert ends.tolist() == [[0, 2, 5, -1], [0, -1, -1, -1], [0, 1, 2, 3]]
    assert rl.separator_ends(batch_of(tokens, mask), 7, 2).tolist()[2] == [0, 1, 2]
    own = progress.episode_of(ends, 7).tolist()
    assert own[0] == [0, 0, 1, 1, 1, 2, 2] and own[1] == [0] * 7 and own[2][:4] == [0, 1, 2, 3]


def test_ends_in_text_are_tokens_that_complete_an_episode():
    pieces = ["Wait a", "\n", "\nb\n\nc", "\n\nd\n\nW", "ait e", "\n\nf</th", "ink> Wait", "."]
    decode = lambda ids: "".join(pieces[i] for i in ids)
    tokens, mask = np.arange(8)[None], np.ones((1, 8), bool)
    # The second episode begins within the fourth token, which completes the first episode.
    assert rl.text_ends(batch_of(tokens, mask), decode, 3).tolist() == [[0, 4, 6, -1]]
    assert rl.text_ends(batch_of(tokens, mask), decode, 1).tolist() == [[0, 4]]
    assert rl.text_ends(batch_of(tokens, mask), decode, 3, close="none").tolist() == [[0, 4, 8, -1]]


def test_regret_of_worked_curves():
    regret = rl.normalised_regret
    assert regret([50, 100], [0.5, 1.0], 100) == pytest.approx(0.5)
    assert regret([50, 100], [0.5, 1.0], 200) == pytest.approx(0.25)
    assert regret([1], [1.0], 100) == pytest.approx(0.005)
    assert regret([10, 50], [0.0, 0.0], 40) == 1.0
    assert regret([50, 100], [0.5, 1.0], 25) == pytest.approx(1 - 0.125)  # within the first line
    assert regret([], [], 10) == 1.0
    rng = np.random.default_rng(0)
    x, y = np.cumsum(rng.integers(1, 9, 12)), rng.random(12)
    fine = np.linspace(0, 60, 600_001)
    area = np.interp(fine, np.append(0, x), np.append(0, y)).mean()
    assert regret(x, y, 60) == pytest.approx(1 - area, abs=1e-5)
    for wrong in (([0, 1], [1.0, 1.0], 5), ([2, 1], [0.0, 1.0], 5)):
        with pytest.raises(ValueError, match="tokens must increase from above 0"):
            regret(*wrong)
    for wrong in (([1], [1.0, 1.0], 5), ([1], [1.0], 0)):
        with pytest.raises(ValueError, match="positive budget"):
            regret(*wrong)


GROUP, SIZE = 3, 9
ENDS = np.array(
    [[0, 2, 5, -1], [0, 3, -1, -1], [0, -1, -1, -1], [0, 1, 4, 8], [0, 2, 4, 6], [0, 9, -1, -1]]
)


def drawn(seed=0):
    chances = np.random.default_rng(seed).random(ENDS.shape).astype(np.float32)
    return np.where(ENDS >= 0, chances, np.nan)


def test_progress_telescopes_and_never_falls_with_the_chances():
    chances = drawn()
    made = np.asarray(progress.progress(chances))
    for row, p in zip(chances, made, strict=True):
        there = row[~np.isnan(row)]
        np.testing.assert_allclose(np.nansum(p), there[-1] - there[0], atol=1e-6)
    assert (np.asarray(progress.progress(np.sort(chances, axis=1)[:, ::1]))[3:5] >= 0).all()


def test_progress_is_credited_to_the_tokens_of_its_own_episode():
    chances, outcome = drawn(), jnp.arange(6.0)
    got = np.asarray(
        progress.episode_advantages(outcome, jnp.asarray(chances), ENDS, SIZE, GROUP, 0.7)
    )
    made, expected = np.diff(chances, axis=1), np.zeros((6, SIZE))
    for row in range(6):
        group = made[row // GROUP * GROUP :][:GROUP]
        known = group[~np.isnan(group)]
        for t in range(SIZE):
            expected[row, t] = row
            for j in range(3):
                if ENDS[row, j + 1] >= 0 and ENDS[row, j] <= t < ENDS[row, j + 1]:
                    scaled = (made[row, j] - known.mean()) / (known.std(ddof=1) + 1e-4)
                    expected[row, t] += 0.7 * scaled
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert (got[0, 5:] == 0).all() and (got[2] == 2).all() and (got[3, :8] != 3).all()


def algorithms():
    model, _ = model_and_params()
    build = functools.partial(policy_gradient, model.forward)
    return model, build


def test_without_alpha_the_online_form_is_grpo_bit_for_bit():
    _, build = algorithms()
    rewards = jnp.asarray([1.0, 0, 0, 1, 1, jnp.nan])
    batch = {"answer_chances": drawn(), "episode_ends": ENDS, "completion_mask": np.ones((6, SIZE))}
    given = rl.mrt_online(build, GROUP, alpha=0.0).credit(rewards, batch)
    plain = rl.grpo(build, GROUP).credit(rewards, batch)["advantages"]
    assert (np.asarray(given["advantages"]) == np.asarray(plain)[:, None]).all()
    total = np.nanmax(np.where(ENDS >= 0, np.arange(4), np.nan), axis=1)
    assert given["stats"]["episodes"].tolist() == total.tolist()
    ahead = rl.mrt_online(build, GROUP).credit(rewards, batch)["advantages"]
    assert not np.allclose(ahead, given["advantages"])
    with pytest.raises(ValueError, match="no answer_chances; pass rl.add_chances"):
        rl.mrt_online(build, GROUP).credit(rewards, {})


def test_equal_progress_is_no_credit():
    chances = jnp.tile(jnp.arange(4) * 0.1, (6, 1))
    ends = np.tile([0, 2, 4, 6], (6, 1))
    got = progress.episode_advantages(jnp.zeros(6), chances, ends, SIZE, GROUP, 1.0)
    np.testing.assert_allclose(got, 0, atol=1e-3)  # ε = 1e-4 divides rounding errors of 1e-8


def test_stopping_is_the_baseline_of_going_on():
    rewards = jnp.array([1.0, 0, 1, 0, 1, 1, 0, jnp.nan])
    stopped = jnp.array([False, False, True, True] * 2)
    got = progress.termination_advantages(rewards, stopped, 4)
    assert got.tolist() == [0.5, -0.5, 0.5, -0.5, 1.0, 1.0, 0.0, 0.0]
    # Without rollouts that stop, or if none of them is right, it is REINFORCE.
    none = progress.termination_advantages(rewards, jnp.zeros(8, bool), 4)
    assert none.tolist() == [1, 0, 1, 0, 1, 1, 0, 0]
    zero = progress.termination_advantages(jnp.array([1.0, 0, 0, 0]), stopped[:4], 4)
    assert zero.tolist() == [1, 0, 0, 0]
    # The other form is GRPO's over both kinds.
    assert not np.allclose(grpo_advantages(rewards, 4), got)


def test_what_follows_the_most_progress_is_cut():
    tokens = np.array([[1, 7, 2, 7, 3, 7, 8, 9, 0], [1, 7, 8, 9, 0, 0, 0, 0, 0]])
    mask = tokens > 0
    ends = rl.separator_ends(batch_of(tokens, mask), 7, 3)
    nan = np.nan
    chances = np.array([[0.1, 0.2, 0.9, 0.9], [0.5, 0.2, nan, nan]])
    batch = batch_of(tokens, mask) | {"episode_ends": ends, "answer_chances": chances}
    kept = progress.shortened(batch)
    assert kept == [[1, 7, 2, 7, 8, 9], [8, 9]]
