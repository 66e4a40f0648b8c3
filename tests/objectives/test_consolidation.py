"""Elastic weight consolidation: the Fisher diagonal and the penalty by closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.metrics import Mean
from jaxft.objectives import consolidated, fisher_diagonal

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)).astype(np.float32), RNG.normal(size=12).astype(np.float32)
PARAMS = {"w": jnp.asarray(RNG.normal(size=3), jnp.float32)}


def squares(params, batch, key):
    """½ (w·x - y)², a mean over rows."""
    errors = batch["x"] @ params["w"] - batch["y"]
    loss = Mean.of(0.5 * errors**2, jnp.ones_like(errors))
    return loss.value, {"loss": loss}


def parts(*ends):
    return [{"x": X[a:b], "y": Y[a:b]} for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("batches", [parts(0, 12), parts(0, 4, 8, 12), parts(0, 5, 12)])
def test_the_fisher_diagonal_is_the_mean_of_squared_gradients_of_rows(batches):
    found = fisher_diagonal(squares, PARAMS, batches, jax.random.key(0))
    errors = X @ np.asarray(PARAMS["w"]) - Y
    np.testing.assert_allclose(found["w"], np.mean((errors[:, None] * X) ** 2, axis=0), rtol=1e-5)


def test_the_fisher_information_of_logistic_regression():
    """With labels of the model itself the mean tends to E[x² p (1 - p)]."""
    x = np.random.default_rng(1).normal(size=(40_000, 2)).astype(np.float32)
    w = np.array([0.5, -1.0], np.float32)
    p = 1 / (1 + np.exp(-x @ w))
    y = (np.random.default_rng(2).random(len(p)) < p).astype(np.float32)

    def objective(params, batch, key):
        score = batch["x"] @ params["w"]
        loss = jnp.mean(jnp.logaddexp(0, score) - batch["y"] * score)
        return loss, {"loss": loss}

    found = fisher_diagonal(objective, {"w": jnp.asarray(w)}, [{"x": x, "y": y}], jax.random.key(0))
    np.testing.assert_allclose(
        found["w"], np.mean(x**2 * (p * (1 - p))[:, None], axis=0), rtol=0.03
    )


def test_the_penalty_and_its_gradient():
    anchor = {"w": jnp.array([1.0, 2.0, 3.0])}
    importance = {"w": jnp.array([0.5, 0.0, 4.0])}
    (batch,) = parts(0, 12)
    whole = consolidated(squares, anchor, importance, 3.0)
    (loss, metrics), grads = jax.value_and_grad(whole, has_aux=True)(PARAMS, batch, None)
    plain, slope = jax.value_and_grad(lambda p: squares(p, batch, None)[0])(PARAMS)
    move = PARAMS["w"] - anchor["w"]
    np.testing.assert_allclose(loss, plain + 1.5 * jnp.sum(importance["w"] * move**2), rtol=1e-6)
    np.testing.assert_allclose(grads["w"], slope["w"] + 3.0 * importance["w"] * move, rtol=1e-5)
    np.testing.assert_allclose(metrics["penalty"].value, loss - plain, rtol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_diagonal(squares, PARAMS, [], jax.random.key(0))
    for weight in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="weight"):
            consolidated(squares, PARAMS, PARAMS, weight)
    other = consolidated(squares, {"v": PARAMS["w"]}, PARAMS, 1.0)
    with pytest.raises(ValueError, match="trees like"):
        other(PARAMS, parts(0, 12)[0], None)
