"""Requirements of every transform of jaxft.optim, in the manner of optax's own common test.

To put a transform under it, add a Case. Transforms that ask for extra arguments get those of jaxft's train
step: value, grad, value_fn, grad_fn and distance_fn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.optim import (
    alternating_sam,
    evaluation_params,
    lion,
    look_sam,
    perturb_asam,
    perturb_fisher,
    round_stochastically,
    subspace_gradient,
    with_sam,
    with_tram,
    with_tram_fisher,
    with_trust_region,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A transform as a function of its learning rate, and the rate with which it converges."""

    name: str
    make: Callable[[Any], optax.GradientTransformation]
    learning_rate: float
    needs_params: bool = True
    noise: float = (
        0.0  # relative, by which sharding or jit may move an update (sums in another order)
    )
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    valleys: bool = True  # whether it follows a valley in which gradients hardly vary
    calls: int = 1  # of update for each step of the params


def subspace_sgd(learning_rate, threshold=1e-3):
    return optax.chain(subspace_gradient(2, threshold), optax.sgd(learning_rate, momentum=0.9))


def rounded_adam(learning_rate, b1=0.9):
    return optax.chain(optax.adam(learning_rate, b1=b1), round_stochastically())


def around(wrap, **options):
    return lambda learning_rate: wrap(optax.adam(learning_rate), **options)


def wrapped(name, wrap, calls=1, valleys=True, **options):
    make = around(wrap, **options)
    return Case(name, make, 3e-2, noise=1e-5, calls=calls, valleys=valleys)


# Rosenbrock's walls curve with 1000: across its valley a step sees a gradient of 1000 rho.
RHO = 1e-3
CASES = [
    Case("lion", lion, 1e-2),
    Case("lion_nearest", lion, 1e-2, settings=dict(stochastic_rounding=False)),
    Case("lion_bfloat16", lion, 1e-2, settings=dict(mu_dtype="bfloat16")),
    Case("lion_int8", lion, 1e-2, settings=dict(mu_dtype="int8")),
    Case("rounded_adam", rounded_adam, 3e-2),
    # It takes out directions in which gradients hardly vary: Rosenbrock's valley is one.
    Case("subspace_sgd", subspace_sgd, 1e-3, noise=1e-5, valleys=False),
    wrapped("with_sam", with_sam, rho=RHO),
    wrapped("with_asam", with_sam, perturb=perturb_asam(RHO)),
    wrapped("with_fisher_sam", with_sam, perturb=perturb_fisher(RHO)),
    # The part that it uses again, across the gradient, has 0.7 of its length: it creeps along a valley.
    wrapped("look_sam", look_sam, rho=RHO, valleys=False),
    wrapped("alternating_sam", alternating_sam, calls=2, rho=RHO),
    wrapped("with_tram", with_tram),
    wrapped("with_trust_region", with_trust_region),
    wrapped("with_tram_fisher", with_tram_fisher, gamma=RHO),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
SIZES = {"matrix": (16, 40), "vector": (300,), "few": (3,)}  # of which int8 takes the first two


def make(case, learning_rate=None):
    return case.make(learning_rate or case.learning_rate, **case.settings)


def tree(seed, dtype=jnp.float32):
    # From numpy: inside a program, drawing would be most of what there is to compile.
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SIZES.items()}


TARGET = tree(7)


def parabola(params):
    square = lambda name: jnp.sum((params[name].astype(jnp.float32) - TARGET[name]) ** 2)
    return sum(map(square, TARGET))


def rosenbrock(params):
    x, y = params["few"][0], params["few"][1]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def distance(target, params):
    square = lambda t, p: jnp.sum((t.astype(jnp.float32) - p.astype(jnp.float32)) ** 2)
    return sum(jax.tree.leaves(jax.tree.map(square, target, params)))


# What asks for functions gets those of the parabola.
EXTRA = dict(grad_fn=lambda p, *_: jax.grad(parabola)(p), distance_fn=distance, noised_fn=parabola)


def update_of(optimizer):
    update = optax.with_extra_args_support(optimizer).update
    return lambda grads, state, params: update(grads, state, params, **EXTRA)


def make_step(optimizer, objective):
    update = optax.with_extra_args_support(optimizer).update

    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = update(
            grads, state, params, value=value, grad=grads, value_fn=objective,
            grad_fn=lambda p, *_: jax.grad(objective)(p), distance_fn=distance,
            noised_fn=objective,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def stepper(case):
    """(the optimizer, its compiled step on the parabola): compiled once for all tests."""
    optimizer = make(case)
    return optimizer, jax.jit(make_step(optimizer, parabola))


@pytest.mark.parametrize(
    "case, objective",
    [(case, parabola) for case in CASES] + [(case, rosenbrock) for case in CASES if case.valleys],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_it_converges(case, objective):
    steps = 2000 * case.calls
    optimizer = make(case, optax.linear_schedule(case.learning_rate, 0.0, 2000))
    step = make_step(optimizer, objective)
    params = {"few": jnp.zeros(3)} if objective is rosenbrock else tree(0)
    loop = jax.jit(lambda *c: jax.lax.scan(lambda c, _: (step(*c), None), c, length=steps)[0])
    params, state = loop(params, optimizer.init(params))
    params = evaluation_params(state, params)
    if objective is rosenbrock:
        np.testing.assert_allclose(params["few"][:2], 1.0, atol=3e-2)
    else:
        chex.assert_trees_all_close(params, tree(7), atol=3e-2)


@every_case
def test_jit_changes_nothing(case):
    (optimizer, step), params = stepper(case), tree(0)
    state = optimizer.init(params)
    chex.assert_trees_all_equal(jax.jit(optimizer.init)(params), state)
    eager, jitted = make_step(optimizer, parabola)(params, state), step(params, state)
    chex.assert_trees_all_close(eager, jitted, rtol=1e-5, atol=1e-6)


@every_case
def test_steps_compile_once(case):
    (optimizer, step), params = stepper(case), tree(0)
    state = jax.jit(optimizer.init)(params)
    params, state = step(params, state)
    programs = step._cache_size()
    for _ in range(2):
        params, state = step(params, state)
    assert step._cache_size() == programs


@every_case
def test_hyperparameters_can_be_injected(case):
    params = tree(0)
    factory = lambda learning_rate: case.make(learning_rate, **case.settings)
    plain, step = stepper(case)
    expected, _ = step(params, plain.init(params))
    injected = optax.inject_hyperparams(factory)(case.learning_rate)
    whole = optax.inject_hyperparams(case.make)(case.learning_rate, **case.settings)
    for optimizer in (injected, whole) if case.settings else (injected,):
        after, state = jax.jit(make_step(optimizer, parabola))(params, optimizer.init(params))
        chex.assert_trees_all_close(after, expected, rtol=1e-5, atol=1e-6)
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
    expected, _ = jax.jit(update_of(optimizer))(mean, optimizer.init(params), params)
    state = several.init(params)
    update = jax.jit(lambda grads, state: several.update(grads, state, params, **EXTRA))
    updates, state = update(grads[0], state)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(grads[1], state)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_data_types_stay(case, dtype):
    optimizer, params = make(case), tree(0, dtype)
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(update_of(optimizer), tree(1, dtype), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    moved = jax.eval_shape(optax.apply_updates, params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)


@every_case
def test_sharded_is_unsharded(case):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {
        "matrix": PartitionSpec(None, "fsdp"),
        "vector": PartitionSpec(),
        "few": PartitionSpec(),
    }
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    (optimizer, step), params = stepper(case), tree(0)
    spread = jax.device_put(params, shardings)
    state, plain = optimizer.init(spread), optimizer.init(params)
    for leaf in jax.tree.leaves(state):
        if leaf.shape == SIZES["matrix"]:
            assert leaf.sharding.is_equivalent_to(shardings["matrix"], leaf.ndim)
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
    updates, _ = update_of(optimizer)(tree(1) | {"frozen": None}, optimizer.init(holes), holes)
    assert updates["frozen"] is None
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    jax.jit(make_step(clipped, parabola))(params, clipped.init(params))


WRAPPERS = {
    "apply_if_finite": lambda o: optax.apply_if_finite(o, 3),
    "conditionally_transform": lambda o: optax.conditionally_transform(o, lambda step: step > 1),
    "conditionally_mask": lambda o: optax.conditionally_mask(o, lambda step: step > 1),
    "MultiSteps": lambda o: optax.MultiSteps(o, 2),
    "masked": lambda o: optax.masked(o, {"matrix": True, "vector": True, "few": False}),
    "partition": lambda o: optax.partition(
        {"a": o, "b": optax.sgd(0.1)}, {"matrix": "a", "vector": "a", "few": "b"}
    ),
}


PLAIN = ("lion", "lion_int8", "rounded_adam")


@pytest.mark.parametrize(
    "case, name",
    [(c, n) for c in CASES for n in WRAPPERS if c.name in PLAIN or n == "apply_if_finite"],
    ids=lambda value: getattr(value, "name", value),
)
def test_bfloat16_inside_optax_s_wrappers(case, name):
    """Both branches of a wrapper's cond have the types of the gradients, and the state keeps its own."""
    optimizer, params = WRAPPERS[name](make(case)), tree(0, jnp.bfloat16)
    state = jax.eval_shape(optimizer.init, params)
    run = optimizer.update if name == "MultiSteps" else update_of(optimizer)
    updates, after = jax.eval_shape(run, tree(1, jnp.bfloat16), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
