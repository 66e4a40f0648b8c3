"""Direct coverage optimization of a model: its limits, and a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.losses import coverage_weight
from jaxft.objectives import coverage, step_coverage
from tests.small_models import LLAMA, base, jitted

MODEL, PARAMS = base(LLAMA)
LENGTHS = (3, 5, 1)


def batch_of(width=9):
    tokens = np.random.default_rng(0).integers(0, 29, (4, width))
    mask = np.zeros((4, width))
    for row, length in zip(mask, LENGTHS, strict=False):
        row[2 : 2 + length] = 1
    tokens[:3, 2] = 5  # The last row has no completion.
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask, jnp.float32)}


def slow(params, batch):
    """[(log p, tokens)] of the rows with a completion, one token after the other."""
    table = jax.nn.log_softmax(jitted(MODEL)({"params": params}, batch["tokens"]).logits)
    tokens, found = np.asarray(batch["tokens"]), []
    for i, length in enumerate(LENGTHS):
        found.append((sum(table[i, t - 1, tokens[i, t]] for t in range(2, 2 + length)), length))
    return found


@pytest.mark.parametrize("num_samples", [1, 10**6])
def test_loss_is_weighted_cross_entropy_of_rows(num_samples):
    batch = batch_of()
    run = jax.jit(jax.value_and_grad(coverage(MODEL.forward, num_samples), has_aux=True))
    (loss, metrics), grads = run(PARAMS, batch, None)
    rows = slow(PARAMS, batch)
    weights = [float(coverage_weight(log_p, num_samples)) for log_p, _ in rows]
    expected = np.mean([-w * p / n for w, (p, n) in zip(weights, rows, strict=True)])
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["weight"].value, np.mean(weights), rtol=1e-4)
    np.testing.assert_allclose(metrics["log_prob"].value, np.mean([p for p, _ in rows]), rtol=1e-4)
    assert metrics["loss"].weight == 3
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(grads))
    # The one-token row is likely to be solved by a million samples, and then weighs nothing.
    assert (min(weights) < 1e-3) == (num_samples > 1)


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        coverage(MODEL.forward, 0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        step_coverage(MODEL.forward, 0, 2)


def test_a_step_counts_by_itself():
    batch = batch_of() | {"steps": jnp.full((4, 9), -1).at[:2, 2].set(0).at[:2, 3:5].set(1)}
    loss, metrics = jax.jit(step_coverage(MODEL.forward, 10**6, 2))(PARAMS, batch, None)
    table = jax.nn.log_softmax(jitted(MODEL)({"params": PARAMS}, batch["tokens"]).logits)
    log_p = lambda i, *places: [float(table[i, t - 1, batch["tokens"][i, t]]) for t in places]
    steps = [log_p(0, 2), log_p(0, 3, 4), log_p(1, 2), log_p(1, 3, 4)]
    slow = [-float(coverage_weight(jnp.float32(sum(s)), 10**6)) * np.mean(s) for s in steps]
    np.testing.assert_allclose(loss, np.mean(slow), rtol=1e-4)
    assert metrics["loss"].weight == 4
