"""Reptile, MAML and MLDG against numbers computed by hand, their limits, and the step of jaxft."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.adapters import adapt, lora, partition
from jaxft.metrics import Mean
from jaxft.optim import in_groups, maml, mldg, reptile
from jaxft.train import init_state, make_step
from jaxft.weights import matmul

PHI = {"phi": jnp.zeros(())}
C = jnp.array([1.0, 3.0])  # two tasks, ½ (φ - c)²
quadratic = lambda params, c, *_: jnp.mean(0.5 * (params["phi"] - c) ** 2)
whole = lambda batch: (batch, batch)  # support and query are the same


def number(estimator, batch, fun=quadratic):
    return float(jax.jit(estimator(fun))(PHI, batch)[1]["phi"])


def test_reptile_moves_towards_what_the_tasks_reach():
    # From 0 with rate .1, two steps end at .19 c: 0.19 and 0.57; φ + ½ mean = .19.
    steps = reptile(optax.sgd(0.1), 2)
    for c in C:
        np.testing.assert_allclose(number(steps, c), -0.19 * c, rtol=1e-6)
    alternating = jnp.array([1.0, 3.0, 1.0, 3.0])  # two rows of each task
    np.testing.assert_allclose(0.5 * number(in_groups(steps, 2), alternating), -0.19, rtol=1e-6)
    # One step of one task is SGD, and the value is that before the step.
    value, grads = reptile(optax.sgd(0.1), 1)(quadratic)(PHI, C)
    np.testing.assert_allclose(grads["phi"], 0.1 * jax.grad(quadratic)(PHI, C)["phi"], rtol=1e-6)
    assert value == quadratic(PHI, C)


def test_reptile_s_steps_have_their_own_rows_and_any_optimizer():
    inner, rows = optax.adam(0.1), jnp.array([1.0, 5.0, 2.0, -3.0, 0.0, 1.0])
    point, state = PHI, inner.init(PHI)
    for i in range(3):
        updates, state = inner.update(jax.grad(quadratic)(point, rows[i::3]), state, point)
        point = optax.apply_updates(point, updates)
    np.testing.assert_allclose(number(reptile(inner, 3), rows), -point["phi"], rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be split into 4 equal parts"):
        number(reptile(inner, 4), rows)


@pytest.mark.parametrize("first_order, expected", [(False, -1.62), (True, -1.80)])
def test_maml_of_two_quadratics(first_order, expected):
    task = maml(0.1, first_order=first_order, split=whole)
    np.testing.assert_allclose(number(in_groups(task, 2), C), expected, rtol=1e-6)
    # By default the rows of a task alternate between support and query.
    batch = jnp.array([1.0, 3.0, 1.0, 3.0])
    alternating = in_groups(maml(0.1, first_order=first_order), 2)
    np.testing.assert_allclose(number(alternating, batch), expected, rtol=1e-6)
    # Two steps: φ' = .19 c, and (1 - a)² in front.
    twice = maml(0.1, 2, first_order=first_order, split=whole)
    factor = 1.0 if first_order else 0.81
    np.testing.assert_allclose(number(in_groups(twice, 2), C), -0.81 * 2 * factor, rtol=1e-6)


@pytest.mark.parametrize("first_order, expected", [(False, -3.61), (True, -3.90)])
def test_mldg_trains_on_one_domain_and_tests_on_the_other(first_order, expected):
    np.testing.assert_allclose(number(mldg(0.1, first_order=first_order), C), expected, rtol=1e-6)


def network(params, batch, *_):
    x = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    loss = jnp.mean((x.sum(axis=1) - batch["y"]) ** 2)
    return loss, {"mean": x.mean()}


def problem(rows=8):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (3, 2)), "b": jnp.array([0.1, -0.2])}
    return params, {
        "x": jax.random.normal(keys[1], (rows, 3)),
        "y": jax.random.normal(keys[2], (rows,)),
    }


def test_limits():
    params, batch = problem()
    even, odd = ({k: x[i::2] for k, x in batch.items()} for i in range(2))
    gradient = lambda part: jax.grad(network, has_aux=True)(params, part)
    close = lambda found, expected: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
    run = lambda estimator: estimator(network, has_aux=True)(params, batch)
    close(run(maml(0.0))[1], gradient(odd)[0])
    (value, aux), grads = run(mldg(0.3, 0.0))
    close((grads, aux, value), (*gradient(even), network(params, even)[0]))
    # Second derivatives against finite differences of the adapted loss.
    inner = lambda p: jax.tree.map(
        lambda a, g: a - 0.3 * g, p, jax.grad(network, has_aux=True)(p, even)[0]
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, batch))
        even, odd = ({k: x[i::2] for k, x in wide[1].items()} for i in range(2))
        (value, _), grads = maml(0.3)(network, has_aux=True)(*wide)
        moved = lambda e: wide[0] | {"b": wide[0]["b"] + jnp.array([e, 0.0])}
        after = lambda e: network(inner(moved(e)), odd)[0]
        np.testing.assert_allclose(value, after(0.0))
        np.testing.assert_allclose((after(1e-5) - after(-1e-5)) / 2e-5, grads["b"][0], rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: reptile(optax.sgd(0.1), 2), lambda: maml(0.1), lambda: mldg(0.1)]
)
def test_they_train_an_adapter_in_jaxft_s_step(make):
    _, batch = problem()
    params = {"w": jax.random.normal(jax.random.key(1), (3, 2))}
    params = adapt(jax.random.key(0), params, {"w": lora(rank=1)})

    def objective(params, batch, key):
        error = (matmul(batch["x"], params["w"]).sum(axis=1) - batch["y"]) ** 2
        loss = Mean.of(error, jnp.ones(error.shape))
        return loss.value, {"loss": loss}

    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(objective, optimizer, gradient=in_groups(make(), 2)))
    state = init_state(params, optimizer, jax.random.key(0))
    new, metrics = step(state, batch)
    assert metrics["good"] and metrics["grad_norm"] > 0
    before, after = partition(state.params), partition(new.params)
    changed = lambda i: [
        bool((a != b).any())
        for a, b in zip(*(jax.tree.leaves(side[i]) for side in (before, after)), strict=True)
    ]
    assert any(changed(0)) and not any(changed(1))
