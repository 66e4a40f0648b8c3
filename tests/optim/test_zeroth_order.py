"""Zeroth-order estimators against closed forms: means, variances, replay, and the subspace."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.metrics import Mean
from jaxft.optim import (
    coordinate_differences,
    mezo_replay,
    mezo_step,
    normal,
    rademacher,
    rge,
    sphere,
    spsa,
    subspace_gradient,
)
from jaxft.optim.subspace import low_variance_directions
from jaxft.train import fit
from jaxft.weights import Frozen, matmul, quantised_weight

D = 10
SLOPE = jnp.linspace(-1.0, 2.0, D)
CURVATURE = jnp.linspace(0.5, 3.0, D)
START = jnp.linspace(1.0, -1.0, D)
linear = lambda p, key: jnp.sum(p["x"] * SLOPE)
quadratic = lambda p, key: 0.5 * jnp.sum(CURVATURE * p["x"] ** 2)
ESTIMATORS = {
    "rge": rge(0.1, 2),
    "rge_two_sided": rge(0.1, 2, two_sided=True),
    "rge_sphere": rge(0.1, 2, two_sided=True, direction=sphere),
    "spsa": spsa(0.1),
    "mezo": rge(0.1, two_sided=True),
}


def draw(estimator, fun, number, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    run = lambda key: estimator(fun)({"x": START}, key)[1]["x"]
    return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys, batch_size=1000))(keys))


@pytest.mark.parametrize("fun", [linear, quadratic], ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_is_the_gradient(name, fun):
    # Even for mu = 0.1: exact for linear and quadratic functions. A one-sided estimate of a quadratic has
    # an error of order mu in each draw, whose mean is 0 as e is symmetric.
    grads = draw(ESTIMATORS[name], fun, 20_000)
    exact = jax.grad(fun)({"x": START}, None)["x"]
    z = (grads.mean(0) - exact) / (grads.std(0) / np.sqrt(len(grads)))
    assert np.abs(z).max() < 4.5
    assert np.sum(z**2) < D + 5 * np.sqrt(2 * D)


@pytest.mark.parametrize("direction, gain", [(normal, 1), (rademacher, -1), (sphere, -1)])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_variance_is_that_of_the_specification(direction, gain, samples):
    # E|g|² = (d + n + 1) / n |a|² for normal directions: 6.5 for d = 10, n = 2. For those of length
    # sqrt(d), E[(a e)² |e|²] = d |a|², hence (d + n - 1) / n.
    grads = draw(rge(1.0, samples, direction=direction), linear, 40_000)
    squares = np.sum(grads**2, axis=1) / float(jnp.sum(SLOPE**2))
    wanted = (D + samples + gain) / samples
    assert abs(squares.mean() - wanted) < 4.5 * squares.std() / np.sqrt(len(squares))


def test_directions_have_unit_covariance():
    params = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4), "c": jnp.zeros(())}
    flat = lambda e: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(e)])
    keys = jax.random.split(jax.random.key(0), 20_000)
    for direction in (normal, rademacher, sphere):
        e = np.asarray(jax.vmap(lambda key, d=direction: flat(d(key, params)))(keys))
        covariance = e.T @ e / len(e)
        assert np.abs(covariance - np.eye(11)).max() < 5 * np.sqrt(2 / len(e))
        assert np.abs(e.mean(0)).max() < 4.5 / np.sqrt(len(e))
    from scipy import stats

    e = np.asarray(normal(jax.random.key(1), jnp.zeros(200_000)))
    assert stats.kstest(e, "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", ["rge", "spsa"])
def test_replay_from_the_key_is_the_stored_direction(name):
    # The estimate spelt out, with its directions kept.
    from jaxft.optim.zeroth_order import direction_key

    key, mu, params = jax.random.key(9), 0.01, {"x": START}
    two_sided = name == "spsa"
    direction = rademacher if two_sided else normal
    fun = lambda p, key: jnp.sum(jnp.sin(p["x"]) * SLOPE) + jnp.prod(p["x"])
    keys = jax.random.split(direction_key((key,)), 3)
    stored = [direction(k, params)["x"] for k in keys]
    loss = lambda x: fun({"x": x}, key)
    other = [loss(START - mu * e) if two_sided else loss(START) for e in stored]
    width = 2 * mu if two_sided else mu
    expected = (
        sum((loss(START + mu * e) - o) / width * e for e, o in zip(stored, other, strict=True)) / 3
    )
    estimator = spsa(mu, 3) if two_sided else rge(mu, 3)
    value, grads = estimator(fun)(params, key)
    np.testing.assert_allclose(grads["x"], expected, rtol=2e-3, atol=2e-4)
    if not two_sided:
        np.testing.assert_allclose(value, loss(START), rtol=1e-6)


def test_coordinates_are_exact_on_a_quadratic():
    params = {"x": START, "y": jnp.ones((2, 3))}
    fun = lambda p, key: quadratic(p, key) + jnp.sum(p["y"] ** 2 * p["x"][0])
    (loss, aux), grads = coordinate_differences(0.1)(
        lambda p, key: (fun(p, key), {"l": 1.0}), has_aux=True
    )(params, jax.random.key(0))
    exact = jax.grad(fun)(params, None)
    chex.assert_trees_all_close(grads, exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, fun(params, None), rtol=1e-6)
    assert aux == {"l": 1.0}


def test_metrics_of_both_sides_are_averaged_and_draws_are_common():
    seen = lambda p, batch, key: (
        jnp.sum(p["x"] * batch) + jax.random.normal(key),
        {"loss": Mean(jnp.sum(p["x"] * batch), jnp.float32(4)), "count": jnp.int32(3)},
    )
    key = jax.random.key(0)
    (loss, metrics), grads = spsa(0.5)(seen, has_aux=True)({"x": START}, SLOPE, key)
    # The noise is that of the key in both evaluations, and cancels in the difference.
    np.testing.assert_allclose(loss, jnp.sum(START * SLOPE) + jax.random.normal(key), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].total, jnp.sum(START * SLOPE), rtol=1e-5, atol=1e-5)
    assert metrics["loss"].weight == 4 and metrics["count"] == 3
    assert metrics["count"].dtype == jnp.int32
    # g = (a e) e: along a it is (a e)² >= 0.
    assert jnp.sum(grads["x"] * SLOPE) >= 0


def test_mezo_step_is_the_estimate_applied_in_place_and_can_be_replayed():
    params, key = {"x": START, "y": jnp.ones((3, 2))}, jax.random.key(4)
    fun = lambda p, batch, key: quadratic(p, key) + jnp.sum(jnp.cos(p["y"]) * batch)
    step = jax.jit(mezo_step(fun, 1e-2))
    new, loss, record = step(params, 0.1, 0.5, key)
    e = normal(record.key, params)
    rebuilt = jax.tree.map(lambda p, e: p - record.scale * e, params, e)
    chex.assert_trees_all_close(new, rebuilt, atol=3e-7)
    plus, minus = (
        fun(jax.tree.map(lambda p, e, s=s: p + s * e, params, e), 0.5, key) for s in (1e-2, -1e-2)
    )
    np.testing.assert_allclose(record.scale, 0.1 * (plus - minus) / 2e-2, rtol=1e-2)
    np.testing.assert_allclose(loss, (plus + minus) / 2, rtol=1e-5)
    # No learning rate: back where it was, to the last place.
    still, _, _ = step(params, 0.0, 0.5, key)
    chex.assert_trees_all_close(still, params, atol=2.4e-7)
    records, current = [], params
    for number in range(20):
        current, _, record = step(current, 0.02, 0.5, jax.random.key(number))
        records.append(record)
    log = jax.tree.map(lambda *r: jnp.stack(r), *records)
    chex.assert_trees_all_close(mezo_replay(params, log), current, atol=20 * 2.4e-7)
    assert float(fun(current, 0.5, key)) < float(fun(params, 0.5, key))
    bad, _, record = mezo_step(lambda p, key: jnp.nan * linear(p, key))({"x": START}, 1.0, key)
    assert record.scale == 0 and jnp.isfinite(bad["x"]).all()


def test_mezo_trains_in_the_memory_of_inference():
    layers, width = 6, 256
    params = {str(i): jnp.zeros((width, width)) for i in range(layers)}

    def fun(params, x, key):
        for i in range(layers):
            x = jnp.tanh(x @ params[str(i)])
        return jnp.mean(x)

    args = (jnp.zeros((64, width)), jax.random.key(0))

    def peak(run, *args):
        memory = run.lower(*args).compile().memory_analysis()
        return (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes
        )  # fmt: skip

    inference = peak(jax.jit(fun), params, *args)
    step = jax.jit(mezo_step(fun), donate_argnums=0)
    assert peak(step, params, 1e-3, *args) <= 1.05 * inference
    # The saving: the gradient by itself is another set of params.
    assert peak(jax.jit(jax.grad(fun)), params, *args) > 1.9 * inference


def test_fit_trains_the_float_part_of_an_int8_model(key):
    target = jax.random.normal(key, (8, 4))
    rows = jax.random.normal(jax.random.key(1), (32, 8))
    params = {
        "base": quantised_weight(target, "int8", block=8),
        "scale": Frozen(jnp.ones(4)),
        "bias": jnp.full((4,), 2.0),
    }

    def objective(params, batch, key):
        y = matmul(batch, params["base"]) * params["scale"].to_dense()[None] + params["bias"][None]
        square = jnp.sum((y - batch @ target) ** 2)
        loss = Mean(square, jnp.float32(y.size))
        return loss.value, {"loss": loss}

    state, history = fit(params, objective, optax.adam(3e-2), [rows] * 400, gradient=spsa(1e-2))
    assert history[-1]["loss"] < 0.01 * history[0]["loss"]
    chex.assert_trees_all_equal(state.params["base"], params["base"])
    _, halves = fit(
        params, objective, optax.adam(3e-2), [rows] * 2, gradient=spsa(1e-2), microbatches=2
    )
    # The mean over microbatches is that over the batch, up to the moves of order mu.
    np.testing.assert_allclose(halves[0]["loss"], history[0]["loss"], rtol=1e-2)


def test_nothing_is_transposed():
    w = jnp.zeros((4, 3), jnp.int8)
    fun = lambda p, key: jnp.sum((p["x"][:4] @ w.astype(jnp.float32)) ** 2)
    text = str(jax.make_jaxpr(spsa()(fun))({"x": START}, jax.random.key(0)))
    assert "transpose" not in text and text.count("dot_general") == 1


def spectrum(values, d=12):
    """Rows whose columns have mean 0 and standard deviation 1, with these squares of singular values."""
    # Hadamard columns: orthogonal, of mean 0; rows of V too, so that every coordinate has the same spread.
    from scipy.linalg import hadamard

    u = hadamard(8)[:, 1 : len(values) + 1] / np.sqrt(8)
    v = hadamard(16)[: len(values)] / 4
    b = u * np.sqrt(values) @ v
    return jnp.asarray(b, jnp.float32), jnp.asarray(v, jnp.float32)


def test_the_subspace_of_the_specification():
    # 9, .9, .09, .01 and nu = .02: .9, .99 > .98, hence i* = 2, and rows 3 and 4 go.
    b, v = spectrum([9, 0.9, 0.09, 0.01])
    scaled = b / jnp.std(b, axis=0, keepdims=True)
    singular = np.linalg.svd(np.asarray(scaled), compute_uv=False)[:4] ** 2
    expected = int(np.argmax(np.cumsum(singular) / singular.sum() > 1 - 0.02)) + 1
    p = low_variance_directions(b, 0.02)
    kept = jnp.any(p != 0, axis=1)
    assert not kept[:expected].any() and kept[expected:8].all()
    p = p[kept]
    np.testing.assert_allclose(p @ p.T, np.eye(len(p)), atol=1e-5)
    # Off the rows that stay, standardised or not.
    left = np.linalg.svd(np.asarray(scaled))[2][:expected]
    np.testing.assert_allclose(p @ left.T, 0, atol=1e-4)
    assert not low_variance_directions(b, 0.0).any()
    assert not low_variance_directions(jnp.ones((4, 6)), 0.5).any()


def test_subspace_gradient_waits_for_its_window_then_projects():
    tau, d = 4, 9
    optimizer = subspace_gradient(tau, 0.3)
    rng = np.random.default_rng(0)
    params = {"x": jnp.zeros(d)}
    state = optimizer.init(params)
    visited = []
    for number in range(2 * tau + 2):
        grads = {"x": jnp.asarray(rng.standard_normal(d), jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        if number < tau:
            chex.assert_trees_all_equal(updates, grads)
        else:
            start = number // tau * tau - tau
            p = low_variance_directions(jnp.stack(visited[start : start + tau]), 0.3)
            assert p.any()
            np.testing.assert_allclose(p @ updates["x"], 0, atol=1e-5)
            np.testing.assert_allclose(updates["x"], grads["x"] - p.T @ (p @ grads["x"]), atol=1e-5)
        params = {"x": jnp.asarray(rng.standard_normal(d), jnp.float32)}  # after this update
        visited.append(params["x"])
    scaled = subspace_gradient(tau, 0.3, samples=2)
    updates, _ = scaled.update(grads, scaled.init(params), params)
    np.testing.assert_allclose(updates["x"], grads["x"] / np.sqrt((d + 1) / 2), rtol=1e-6)


def test_bad_input():
    run = lambda e, fun: e(fun)({"x": START}, jax.random.key(0))
    for call in (lambda: rge(0.0), lambda: spsa(samples=0), lambda: mezo_step(linear, -1.0)):
        with pytest.raises(ValueError, match="mu"):
            call()
    with pytest.raises(ValueError, match="must be a scalar, got shape"):
        run(spsa(), lambda p, key: p["x"])
    with pytest.raises(ValueError, match="last argument must be a key"):
        spsa()(lambda p, batch: 0.0)({"x": START}, jnp.ones(3))
    with pytest.raises(ValueError, match="window >= 1"):
        subspace_gradient(0)
    with pytest.warns(UserWarning, match="may take out every direction"):
        subspace_gradient(8).init({"x": jnp.zeros(5)})


def test_importing_needs_little_beside_jax_and_optax():
    code = "import sys, jaxft.optim; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    modules = set(result.stdout.split())
    assert not {m.split(".")[0] for m in modules} & {
        "flax",
        "transformers",
        "jaxtyping",
        "orbax",
        "rich",
    }
    ours = {m for m in modules if m.startswith("jaxft.")}
    assert {m.split(".")[1] for m in ours} == {"kernels", "keys", "optim"}
