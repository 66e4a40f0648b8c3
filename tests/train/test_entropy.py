"""The weight of an entropy bonus that follows the entropy, as in TRL's GRPOTrainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import token_mean
from jaxft.rl.token_losses import clipped
from jaxft.train import adaptive_entropy, fit
from tests.rl.rl_task import model_and_params
from tests.rl.test_groups import experience, thinned


def trl(entropies, target, weight, delta, highest):
    """(weight applied in each step, weight after it), as TRL's _compute_loss has it in train mode."""
    last, found = float("inf"), []
    for entropy in entropies:
        applied = weight if last <= target else 0.0
        if entropy <= target:
            weight = min(weight + delta, highest)
        else:
            weight = max(weight - delta, 0.0)
        last = entropy
        found.append((applied, weight))
    return found


@pytest.mark.parametrize("settings", [dict(weight=0.0, delta=0.3), dict(weight=0.9, delta=0.7)])
def test_the_weight_is_that_of_trl(settings):
    entropies = np.float32([3, 2, 2.5, 1, 1, 1, 4, 4, 4, 2, 2])
    book = adaptive_entropy(2.2, highest=1.1, **settings)
    entry, found = book.start(None), []
    for entropy in entropies:
        applied = book.give(entry, None, {})["entropy_weight"]
        entry = book.update(entry, None, {"entropy": jnp.asarray(entropy)})
        found.append((float(applied), float(entry[0])))
    wanted = trl(entropies, 2.2, highest=1.1, **settings)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert {applied > 0 for applied, _ in wanted} == {True, False}


def test_a_run_has_the_bonus_of_its_weight_in_slices_too():
    """The second step has the loss of a constant weight, which the first step's entropy has set."""
    model, params = model_and_params()
    batch = experience() | {"advantages": np.zeros(12, np.float32)}
    build = lambda weight=0.0: policy_gradient(
        model.forward, clipped(), token_mean, entropy_weight=weight
    )
    book = {"entropy": adaptive_entropy(50.0, weight=0.25, delta=0.5)}
    take = lambda objective, **more: fit(
        params, objective, optax.sgd(0.0), [batch] * 2, steps=2, **more
    )
    state, rows = take(build(), books=book, microbatches=2)
    _, constant = take(build(0.75))
    assert [row["entropy_weight"] for row in rows] == [0.0, 0.75]
    assert rows[0]["loss"] == 0 and rows[1]["loss"] == pytest.approx(constant[0]["loss"], rel=1e-5)
    assert float(state.carry["entropy"][0]) == pytest.approx(1.0)
    assert constant[0]["loss"] == pytest.approx(-0.75 * constant[0]["entropy"], rel=1e-5)


def test_what_has_no_meaning_is_refused():
    for wrong in (dict(target=0.0), dict(target=1.0, delta=0.0), dict(target=1.0, lowest=2.0)):
        with pytest.raises(ValueError, match="adapted_entropy_weight: needs target > 0"):
            adaptive_entropy(**wrong)
    with pytest.raises(ValueError, match="no metric 'entropy' among"):
        adaptive_entropy(1.0).update((jnp.zeros(()), jnp.zeros(())), None, {"loss": 0.0})
    objective = policy_gradient(model_and_params()[0].forward, clipped(), token_mean)
    absent = thinned(experience()) | {"entropy_weight": jnp.zeros(())}
    with pytest.raises(ValueError, match="but an adapted entropy_weight has a gradient in them"):
        jax.eval_shape(objective, model_and_params()[1], absent, None)
