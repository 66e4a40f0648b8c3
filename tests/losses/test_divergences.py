"""Divergences against closed forms, scipy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from jaxft.losses import (
    gaussian_kernel,
    inverse_multiquadric_kernel,
    kl_divergence,
    l2_distance,
    maximum_mean_discrepancy,
    reverse_kl_divergence,
    symmetric_kl_divergence,
)

DRAWS = np.random.default_rng(0).normal(size=(2, 2, 3, 5)).astype(np.float32)


def test_two_classes():
    # p = [.5, .5], q = [.9, .1]: .5 log(.5/.9) + .5 log(.5/.1)
    p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    np.testing.assert_allclose(kl_divergence(p, q), 0.5108256, rtol=1e-6)
    backward = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    np.testing.assert_allclose(reverse_kl_divergence(p, q), backward, rtol=1e-5)
    np.testing.assert_allclose(symmetric_kl_divergence(p, q), 0.5108256 + backward, rtol=1e-5)
    np.testing.assert_allclose(l2_distance(jnp.array([1.0, 2.0]), jnp.array([4.0, 6.0])), 5.0)


def test_kl_is_scipys_and_torchs_for_each_token():
    x, y = map(jnp.asarray, DRAWS)
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    expected = stats.entropy(softmax(x), softmax(y), axis=-1)
    np.testing.assert_allclose(kl_divergence(x, y), expected, rtol=1e-5, atol=1e-6)
    log = lambda z: torch.log_softmax(torch.tensor(np.asarray(z)), -1)
    expected = torch.nn.functional.kl_div(log(y), log(x), log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(kl_divergence(x, y), expected, rtol=1e-5, atol=1e-6)
    # A constant on all logits of a token is nothing.
    np.testing.assert_allclose(kl_divergence(x + 3, y - 2), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_torch_on_both_sides():
    x, y = map(jnp.asarray, DRAWS)
    total = lambda x, y: jnp.sum(symmetric_kl_divergence(x, y))
    ours = jax.grad(total, (0, 1))(x, y)
    a, b = (torch.tensor(z, requires_grad=True) for z in DRAWS)
    log = lambda z: torch.log_softmax(z, -1)
    kl = lambda p, q: (log(p).exp() * (log(p) - log(q))).sum()
    (kl(a, b) + kl(b, a)).backward()
    for mine, theirs in zip(ours, (a.grad, b.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_equal_and_impossible_tokens_stay_finite():
    x = jnp.array([[1.0, -jnp.inf, 0.5]])
    for divergence in (kl_divergence, symmetric_kl_divergence):
        value, grads = jax.value_and_grad(lambda y, d=divergence: jnp.sum(d(x, y)))(x)
        assert value == 0
        np.testing.assert_allclose(grads, 0.0, atol=1e-7)
    same = jnp.ones((1, 3))
    value, grads = jax.value_and_grad(lambda y: jnp.sum(l2_distance(same, y)))(same)
    assert value == 0 and not grads.any()
    low = kl_divergence(same.astype(jnp.bfloat16), 2 * same.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("name", ["imq", "rbf"])
def test_mmd_is_the_double_sum(name):
    x, y = map(jnp.asarray, DRAWS)
    weights = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.5]])
    bands = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    if name == "imq":
        kernel, k = None, lambda s: sum((b**2 + s) ** -0.5 for b in bands)
    else:
        kernel, k = gaussian_kernel(), lambda s: sum(np.exp(-0.5 * s / b) for b in bands)
    values = maximum_mean_discrepancy(x, y, weights, kernel)
    w = np.asarray(weights).ravel() / weights.sum()
    a, b = (z.reshape(6, 5).astype(np.float64) for z in DRAWS)
    square = lambda u, v: ((u[:, None] - v[None]) ** 2).sum(-1)
    total = w @ (k(square(a, a)) + k(square(b, b)) - 2 * k(square(a, b))) @ w
    np.testing.assert_allclose((values * weights).sum() / weights.sum(), total, rtol=1e-4)
    assert values.shape == weights.shape
    # Far from the origin too, and nothing between equal samples; what has no weight does not count.
    far = maximum_mean_discrepancy(x + 100, y + 100, weights, kernel)
    np.testing.assert_allclose(far, values, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(maximum_mean_discrepancy(x, x, weights, kernel), 0, atol=1e-5)
    other = y.at[0, 1].add(5.0)
    moved = maximum_mean_discrepancy(x, other, weights, kernel)
    counted = weights > 0
    np.testing.assert_allclose(moved[counted], values[counted], rtol=1e-4, atol=1e-5)
    assert not maximum_mean_discrepancy(x, y, 0 * weights, kernel).any()


def test_kernels_by_hand():
    np.testing.assert_allclose(inverse_multiquadric_kernel((3.0,))(jnp.float32(16.0)), 0.2)
    np.testing.assert_allclose(gaussian_kernel((2.0,))(jnp.float32(4.0)), np.exp(-1), rtol=1e-6)
