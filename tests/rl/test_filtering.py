"""Filters of prompts by success, and why prompts that are solved always or never teach nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.rl.filtering import learnable, only


def test_prompts_with_a_right_rollout_are_kept():
    rates = np.array([0, 3, 8]) / 8
    assert learnable(rates).tolist() == [False, True, True]
    assert learnable(rates, at_most=7 / 8).tolist() == [False, True, False]
    assert learnable(rates, above=3 / 8).tolist() == [False, False, True]


@pytest.mark.parametrize("rates", [[0.0, 0.0], [], [1.1], [-0.1], [np.nan], [[0.5]]])
def test_nothing_left_and_bad_rates_are_refused(rates):
    with pytest.raises(ValueError, match="sorting: of|learnable: rates"):
        learnable(np.array(rates), task="sorting")


def test_only_the_kept_prompts_are_drawn():
    prompts = rl.Prompts(
        [[i] for i in range(6)], 2, [{"id": i} for i in range(6)], {"x": np.arange(6)}, seed=3
    )
    kept = np.array([True, False, True, True, False, False])
    left = only(prompts, kept)
    drawn = [left.pick(i) for i in range(9)]
    assert {ids[0] for one in drawn for ids in one.ids} == {0, 2, 3}
    assert [r["id"] for r in drawn[0].records] == [i[0] for i in drawn[0].ids]
    assert drawn[0].columns["x"].tolist() == [i[0] for i in drawn[0].ids]
    assert (left.per_step, left.seed) == (2, 3)
    with pytest.raises(ValueError, match="mask of 6"):
        only(prompts, kept[:5])


def test_the_policy_gradient_vanishes_where_all_or_no_answers_are_right():
    """Σ_y π(y) (r(y) - p) ∇log π(y) by enumeration, against -∇log π(y*) of supervised fine-tuning."""
    rewards = jnp.zeros(6).at[0].set(1.0)

    def norms(logit):
        logits = jnp.zeros(6).at[0].set(logit)
        p = jax.nn.softmax(logits)
        expected = jax.grad(lambda x: jax.nn.softmax(x) @ rewards)(logits)
        scores = jax.jacobian(jax.nn.log_softmax)(logits)
        enumerated = (p * (rewards - p @ rewards)) @ scores
        np.testing.assert_allclose(enumerated, expected, atol=1e-6)
        bound = jnp.sqrt(p[0] * (1 - p[0]) * (p @ jnp.sum(scores**2, axis=1)))
        assert jnp.linalg.norm(expected) <= bound + 1e-6
        return p[0], jnp.linalg.norm(expected), jnp.linalg.norm(scores[0])

    p, reinforced, supervised = np.array([norms(x) for x in np.linspace(-8.0, 12.0, 41)]).T
    assert p[0] < 1e-3 and p[-1] > 0.999
    assert reinforced[0] < 1e-3 > reinforced[-1] and 0.3 < p[np.argmax(reinforced)] < 0.7
    assert np.all(np.diff(supervised) < 0)


def test_groups_without_contrast_have_advantage_0():
    given = rl.grpo(lambda *args, **more: None, 4).credit(jnp.array([1.0] * 4 + [0.0] * 4), {})
    assert not np.any(given["advantages"])
