"""Measures of flatness and of representations against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.analysis import epsilon_sharpness, filter_normalised, linear_cka, loss_along

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5], [0.0]])}
flat = lambda tree: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_sharpness_of_linear_and_quadratic_losses(key, epsilon):
    box = epsilon * (jnp.abs(flat(PARAMS)) + 1)
    slope = jnp.array([3.0, -1.0, 0.5, 2.0])
    linear = lambda p: 10 + flat(p) @ slope
    here = float(linear(PARAMS))
    expected = 100 * float(box @ jnp.abs(slope)) / (1 + here)
    got = epsilon_sharpness(key, linear, PARAMS, epsilon=epsilon)
    np.testing.assert_allclose(got, expected, rtol=1e-3)  # a difference of two losses of about 10
    # At the minimum, where no gradient tells where to go; any corner is the maximum.
    curvature = jnp.array([4.0, 1.0, 0.5, 2.0])
    bowl = lambda p: 0.5 * jnp.sum(curvature * (flat(p) - flat(PARAMS)) ** 2)
    expected = 100 * float(0.5 * curvature @ box**2)
    got = epsilon_sharpness(key, bowl, PARAMS, epsilon=epsilon, steps=3)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_sharpness_finds_the_best_corner_of_a_coupled_bowl(key):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    matrix = jnp.asarray(root @ root.T, jnp.float32)
    loss = lambda p: 0.5 * (flat(p) - flat(PARAMS)) @ matrix @ (flat(p) - flat(PARAMS))
    box = np.asarray(0.1 * (jnp.abs(flat(PARAMS)) + 1))
    corners = np.stack(np.meshgrid(*[[-1, 1]] * 4), -1).reshape(-1, 4) * box
    best = max(0.5 * c @ np.asarray(matrix) @ c for c in corners)
    found = [
        float(epsilon_sharpness(k, loss, PARAMS, epsilon=0.1)) for k in jax.random.split(key, 8)
    ]
    assert max(found) <= 100 * best * (1 + 1e-4)  # a lower bound
    np.testing.assert_allclose(max(found), 100 * best, rtol=1e-4)


def test_cka_is_invariant_to_rotation_and_scale_and_tells_features_apart():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 50, 6)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    np.testing.assert_allclose(linear_cka(x, 3 * x @ rotation + 7), 1.0, rtol=1e-5)
    u, v = x - x.mean(0), z[:, :4] - z[:, :4].mean(0)
    k, l = u @ u.T, v @ v.T  # noqa: E741
    expected = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())  # by kernels: HSIC's form
    np.testing.assert_allclose(linear_cka(x, z[:, :4]), expected, rtol=1e-4)
    assert expected < 0.5
    assert linear_cka(x, jnp.ones((50, 2))) == 0


def test_the_loss_along_directions_is_the_loss_there(key):
    loss = lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(jnp.sin(p["b"]))
    keys = jax.random.split(key)
    ways = [jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), PARAMS) for k in keys]
    radii = [-1.0, 0.0, 0.5]
    one = loss_along(loss, PARAMS, ways[:1], radii)
    grid = jax.jit(lambda p: loss_along(loss, p, ways, radii))(PARAMS)
    assert one.shape == (3,) and grid.shape == (3, 3)
    for i, r in enumerate(radii):
        for j, s in enumerate(radii):
            point = jax.tree.map(lambda p, d, e, r=r, s=s: p + r * d + s * e, PARAMS, *ways)
            np.testing.assert_allclose(grid[i, j], loss(point), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one, grid[:, 1], rtol=1e-6)


def test_directions_have_the_lengths_of_the_filters(key):
    params = {"kernel": jnp.arange(1.0, 13.0).reshape(4, 3), "conv": jnp.ones((2, 2, 3, 5)),
              "bias": jnp.ones(3)}  # fmt: skip
    d = filter_normalised(key, params)
    np.testing.assert_allclose(
        jnp.linalg.norm(d["kernel"], axis=0), jnp.linalg.norm(params["kernel"], axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(jnp.sqrt(jnp.sum(d["conv"] ** 2, (0, 1, 2))), 12**0.5, rtol=1e-5)
    assert not d["bias"].any()
    # A rescaled filter: the same way, as much longer.
    longer = filter_normalised(key, params | {"kernel": params["kernel"] * 7})
    np.testing.assert_allclose(longer["kernel"], 7 * d["kernel"], rtol=1e-5)


def test_bad_input(key):
    with pytest.raises(ValueError, match="needs epsilon > 0"):
        epsilon_sharpness(key, jnp.sum, jnp.ones(2), epsilon=0.0)
    with pytest.raises(ValueError, match="of the same N inputs"):
        linear_cka(jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="needs directions"):
        loss_along(jnp.sum, jnp.ones(2), [], [0.0])
