"""What follows a run and changes no update: against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import tree_utils

from jaxft.metrics import Mean
from jaxft.optim import moving_reference, running_mean

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}


def run(optimizer, steps):
    """(references, params) after each step of minimising a bowl."""

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(lambda x: 2 * x, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state, seen = PARAMS, optimizer.init(PARAMS), []
    for _ in range(steps):
        params, state = step(params, state)
        seen.append((tree_utils.tree_get(state, "reference"), params))
    return seen


@pytest.mark.parametrize("alpha, every", [(0.6, 1), (0.3, 3), (1.0, 2)])
def test_a_moving_reference_is_a_loop(alpha, every):
    plain = optax.adam(0.1)
    found = run(optax.chain(plain, moving_reference(alpha, every)), 7)
    reference, params, state = PARAMS, PARAMS, plain.init(PARAMS)
    for number, (ref, now) in enumerate(found, 1):
        updates, state = plain.update(jax.tree.map(lambda x: 2 * x, params), state, params)
        params = optax.apply_updates(params, updates)
        if number % every == 0:
            mix = lambda new, old: alpha * new + (1 - alpha) * old
            reference = jax.tree.map(mix, params, reference)
        for name in PARAMS:
            np.testing.assert_allclose(now[name], params[name], rtol=1e-6)
            np.testing.assert_allclose(ref[name], reference[name], rtol=1e-6)
            # A hard move is the params themselves, bit for bit.
            assert alpha < 1 or number % every or (ref[name] == now[name]).all()


def test_a_running_mean_is_that_of_all_updates():
    optimizer = running_mean("reward")
    state, rng, values = optimizer.init(PARAMS), np.random.default_rng(0), []
    for size in (3, 1, 0, 5):
        values.append(rng.normal(100.0, 1.0, size))
        part = Mean(jnp.sum(jnp.asarray(values[-1])), jnp.float32(size))
        updates, state = optimizer.update(PARAMS, state, metrics={"reward": part}, value=0.0)
        assert updates is PARAMS
        everything = np.concatenate(values)
        assert float(state.running_mean) == pytest.approx(everything.mean(), rel=1e-6)
        assert float(state.running_weight) == len(everything)


def test_mistakes_are_explained():
    for wrong in ((0.0, 1), (1.5, 1), (0.5, 0)):
        with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\]"):
            moving_reference(*wrong)
    with pytest.raises(ValueError, match="params=None"):
        reference = moving_reference(0.5, 1)
        reference.update(PARAMS, reference.init(PARAMS))
