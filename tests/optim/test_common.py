"""What every transform of jaxft.optim must do, in the manner of optax's own common test.

To put a transform under it, add a Case. Transforms that ask for extra arguments get those of jaxft's train
step: value, grad, value_fn and grad_fn.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.optim import lion, round_stochastically, subspace_gradient


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform as a function of its learning rate, and the rate with which it converges."""

    name: str
    make: Callable[[Any], optax.GradientTransformation]
    learning_rate: float
    rounds: bool = False  # updates of bfloat16 params are float32
    needs_params: bool = True
    noise: float = (
        0.0  # relative, by which sharding or jit may move an update (sums in another order)
    )
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    valleys: bool = True  # whether it follows a valley in which gradients hardly vary


def subspace_sgd(learning_rate, threshold=1e-3):
    return optax.chain(subspace_gradient(2, threshold), optax.sgd(learning_rate, momentum=0.9))


def rounded_adam(learning_rate, b1=0.9):
    return optax.chain(optax.adam(learning_rate, b1=b1), round_stochastically())


CASES = [
    Case("lion", lion, 1e-2, rounds=True),
    Case("lion_nearest", lion, 1e-2, settings=dict(stochastic_rounding=False)),
    Case("lion_bfloat16", lion, 1e-2, rounds=True, settings=dict(mu_dtype="bfloat16")),
    Case("lion_int8", lion, 1e-2, rounds=True, settings=dict(mu_dtype="int8")),
    Case("rounded_adam", rounded_adam, 1e-2, rounds=True),
    # It takes out directions in which gradients hardly vary: Rosenbrock's valley is one.
    Case("subspace_sgd", subspace_sgd, 1e-3, noise=1e-5, valleys=False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SIZES = {"matrix": (16, 40), "vector": (300,), "few": (3,)}  # of which int8 takes the first two


def make(case, learning_rate=None):
    return case.make(learning_rate or case.learning_rate, **case.settings)


def tree(seed, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SIZES))
    return {
        name: jax.random.normal(k, shape).astype(dtype)
        for k, (name, shape) in zip(keys, SIZES.items(), strict=True)
    }


def parabola(params):
    targets = tree(7)
    squares = jax.tree.map(lambda p, t: jnp.sum((p.astype(jnp.float32) - t) ** 2), params, targets)
    return sum(jax.tree.leaves(squares))


def rosenbrock(params):
    x, y = params["few"][0], params["few"][1]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def make_step(optimizer, objective):
    update = optax.with_extra_args_support(optimizer).update

    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = update(
            grads, state, params, value=value, grad=grads, value_fn=objective,
            grad_fn=lambda p, *_: jax.grad(objective)(p),
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize(
    "case, objective",
    [(case, parabola) for case in CASES] + [(case, rosenbrock) for case in CASES if case.valleys],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_it_converges(case, objective):
    steps = 8000
    optimizer = make(case, optax.linear_schedule(case.learning_rate, 0.0, steps))
    step = make_step(optimizer, objective)
    params = {"few": jnp.zeros(3)} if objective is rosenbrock else tree(0)
    loop = jax.jit(lambda *c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=steps)[0])
    params, _ = loop(params, optimizer.init(params))
    if objective is rosenbrock:
        np.testing.assert_allclose(params["few"][:2], 1.0, atol=3e-2)
    else:
        chex.assert_trees_all_close(params, tree(7), atol=3e-2)


@every_case
def test_jit_changes_nothing(case):
    optimizer, params = make(case), tree(0)
    state = optimizer.init(params)
    chex.assert_trees_all_equal(jax.jit(optimizer.init)(params), state)
    step = make_step(optimizer, parabola)
    eager, jitted = step(params, state), jax.jit(step)(params, state)
    chex.assert_trees_all_close(eager, jitted, rtol=1e-5, atol=1e-6)


@every_case
def test_steps_compile_once(case):
    optimizer, params = make(case), tree(0)
    step, state = jax.jit(make_step(optimizer, parabola)), jax.jit(optimizer.init)(params)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1


@every_case
def test_hyperparameters_can_be_injected(case):
    params = tree(0)
    factory = lambda learning_rate: case.make(learning_rate, **case.settings)
    injected, plain = optax.inject_hyperparams(factory)(case.learning_rate), make(case)
    whole = optax.inject_hyperparams(case.make)(case.learning_rate, **case.settings)
    states = [o.init(params) for o in (plain, injected, whole)]
    results = [
        jax.jit(make_step(o, parabola))(params, s)
        for o, s in zip((plain, injected, whole), states, strict=True)
    ]
    for params, state in results[1:]:
        chex.assert_trees_all_close(params, results[0][0], rtol=1e-5, atol=1e-6)
        rate = optax.tree.get(
            state, "learning_rate", filtering=lambda _, x: isinstance(x, jax.Array)
        )
        np.testing.assert_allclose(rate, case.learning_rate, rtol=1e-6)


@every_case
def test_multi_steps_is_a_step_with_the_mean_gradient(case):
    optimizer, params = make(case), tree(0)
    several = optax.MultiSteps(optimizer, 2)
    grads = [tree(1), tree(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    expected, _ = jax.jit(optimizer.update)(mean, optimizer.init(params), params)
    state = several.init(params)
    update = jax.jit(several.update)
    updates, state = update(grads[0], state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(grads[1], state, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_data_types_stay(case, dtype):
    optimizer, params = make(case), tree(0, dtype)
    state = optimizer.init(params)
    updates, after = optimizer.update(tree(1, dtype), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    wanted = jnp.float32 if case.rounds else dtype
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(wanted)}
    chex.assert_trees_all_equal_shapes_and_dtypes(optax.apply_updates(params, updates), params)


@every_case
def test_sharded_is_unsharded(case):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {
        "matrix": PartitionSpec(None, "fsdp"),
        "vector": PartitionSpec(),
        "few": PartitionSpec(),
    }
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    optimizer, params = make(case), tree(0)
    spread = jax.device_put(params, shardings)
    state, plain = optimizer.init(spread), optimizer.init(params)
    for leaf in jax.tree.leaves(state):
        if leaf.shape == SIZES["matrix"]:
            assert leaf.sharding.is_equivalent_to(shardings["matrix"], leaf.ndim)
    step = jax.jit(make_step(optimizer, parabola))
    for _ in range(3):
        spread, state = step(spread, state)
        params, plain = step(params, plain)
    assert spread["matrix"].sharding.is_equivalent_to(shardings["matrix"], 2)
    # Nothing is summed over an array unless the case says so: the same bits, random ones included.
    chex.assert_trees_all_close((spread, state), (params, plain), rtol=case.noise, atol=case.noise)


@every_case
def test_without_params(case):
    optimizer = make(case)
    state = optimizer.init(tree(0))
    if case.needs_params:
        with pytest.raises(ValueError, match="params"):
            optimizer.update(tree(1), state)
    else:
        optimizer.update(tree(1), state)


@every_case
def test_what_optax_offers_works_on_it(case):
    optimizer, params = make(case), tree(0)
    state = optimizer.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(optimizer, lambda v: v, state), state)
    # jaxft.adapters.partition leaves None where nothing trains.
    holes = params | {"frozen": None}
    updates, _ = optimizer.update(tree(1) | {"frozen": None}, optimizer.init(holes), holes)
    assert updates["frozen"] is None
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    jax.jit(make_step(clipped, parabola))(params, clipped.init(params))
