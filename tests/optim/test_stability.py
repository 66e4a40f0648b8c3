"""Every public part of jaxft.optim in plain loops and optax wrappers: data types, x64, odd trees, zeros."""

import functools
from typing import NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft.optim
from jaxft import optim
from jaxft.losses.divergences import (
    gaussian_kernel,
    kl_divergence,
    l2_distance,
    reverse_kl_divergence,
    symmetric_kl_divergence,
)
from jaxft.metrics import Mean
from jaxft.objectives.trust_regions import function_distance, noise_distance, sample_distance
from jaxft.optim import parameter_distance

RATE = 1e-2
adam = lambda: optax.adam(RATE, eps=1e-4)  # which float16 can hold

TRANSFORMS = {
    "lion": lambda: optim.lion(RATE),
    "lion/nearest": lambda: optim.lion(RATE, stochastic_rounding=False),
    "lion/bfloat16": lambda: optim.lion(RATE, mu_dtype="bfloat16", weight_decay=0.1),
    "lion/int8": lambda: optim.lion(RATE, mu_dtype="int8"),
    "scale_by_lion": lambda: optim.scale_by_lion(mu_dtype="bfloat16"),
    "round_stochastically": lambda: optax.chain(adam(), optim.round_stochastically()),
    "subspace_gradient": lambda: optax.chain(optim.subspace_gradient(2), adam()),
    "with_sam": lambda: optim.with_sam(adam()),
    "with_sam/perturb_asam": lambda: optim.with_sam(adam(), perturb=optim.perturb_asam()),
    "with_sam/perturb_fisher": lambda: optim.with_sam(adam(), perturb=optim.perturb_fisher()),
    "look_sam": lambda: optim.look_sam(adam(), period=2),
    "alternating_sam": lambda: optim.alternating_sam(adam()),
    "with_tram": lambda: optim.with_tram(adam()),
    "with_tram/parameter_distance": lambda: optim.with_tram(adam(), 0.9, parameter_distance),
    "with_tram_fisher": lambda: optim.with_tram_fisher(adam()),
    "with_trust_region": lambda: optim.with_trust_region(adam()),
    "with_trust_region/parameter_distance": lambda: optim.with_trust_region(
        adam(), 0.1, 0.9, parameter_distance
    ),
    "with_trust_region/anchor": lambda: optim.with_trust_region(
        adam(), 0.1, 1.0, parameter_distance
    ),
}
zeroth = functools.partial(optim.rge, 1e-3, 2, two_sided=True)
ESTIMATORS = {
    "sam": optim.sam,
    "asam": optim.asam,
    "fisher_sam": optim.fisher_sam,
    "m_sam": optim.m_sam,
    "in_groups": lambda: optim.in_groups(jax.value_and_grad, 2),
    "sharpness_aware": lambda: optim.sharpness_aware(optim.perturb_sam(), ascent_steps=2),
    "tram": lambda: optim.tram(lambda params, *_: bowl(params)),
    "tram_fisher": lambda: lambda fun, **options: optim.tram_fisher(fun)(fun, **options),
    "rge": lambda: optim.rge(samples=2),
    "rge/sphere": lambda: zeroth(direction=optim.sphere),
    "spsa": lambda: optim.spsa(samples=2),
    "coordinate_differences": optim.coordinate_differences,
}
ELSEWHERE = {
    "AlternatingSamState": "state",
    "LionState": "state",
    "evaluates": "tests/train/test_step.py",
    "evaluates_at_params": "tests/train/test_step.py",
    "LookSamState": "state",
    "MezoRecord": "record of mezo_step",
    "Perturbation": "type alias",
    "TrustRegionState": "state",
    "evaluation_params": "reads a state: test_sharpness.py",
    "global_norm": "in parameter_distance and each perturbation here",
    "lion_apply": "test_lion_apply_and_mezo_keep_data_types",
    "maml": "tests/optim/test_meta.py, with LoRA in make_step too",
    "mezo_replay": "test_lion_apply_and_mezo_keep_data_types",
    "mldg": "tests/optim/test_meta.py",
    "mezo_step": "test_lion_apply_and_mezo_keep_data_types",
    "normal": "the direction of rge",
    "parameter_distance": "DISTANCES",
    "perturb_asam": "in with_sam/perturb_asam",
    "perturb_fisher": "in with_sam/perturb_fisher",
    "perturb_sam": "in sharpness_aware",
    "rademacher": "the direction of spsa",
    "reptile": "tests/optim/test_meta.py",
    "sphere": "in rge/sphere",
}


def test_every_public_name_is_in_the_family():
    tested = {name.split("/")[0] for name in (*TRANSFORMS, *ESTIMATORS)}
    assert not tested & set(ELSEWHERE)
    assert tested | set(ELSEWHERE) == set(jaxft.optim.__all__)


f32 = jnp.float32
DTYPES = {  # x64 or not, then the types of the leaves in turn
    "float32": (False, [f32]),
    "bfloat16": (False, [jnp.bfloat16]),
    "x64 float32": (True, [f32]),
    "x64 bfloat16": (True, [jnp.bfloat16]),
    "x64 float64": (True, ["float64"]),
    "x64 mixed": (True, ["float64", f32, jnp.bfloat16, jnp.float16]),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)
every_dtype = pytest.mark.parametrize("dtypes", DTYPES)
quiet = pytest.mark.filterwarnings("ignore:subspace_gradient. a window")


def tree(seed, dtypes=(f32,)):
    """int8 blocks (16, 17), a vector, a scalar, a hole; a matrix first, so that all types of a mix occur."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (16, 17), "b": (3,), "c": (), "d": (2, 2)}
    draw = lambda i, shape: jnp.asarray(rng.normal(size=shape), dtypes[i % len(dtypes)])
    leaves = {name: draw(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    return {"inner": leaves, "frozen": None}


def bowl(params):
    return sum((jnp.sum(optim.perturbations.wide(x) ** 2) for x in jax.tree.leaves(params)), 0.0)


def squared(target, params):
    return bowl(jax.tree.map(lambda t, p: p - t, target, params))


def extra():
    return dict(
        grad_fn=lambda params, *_: jax.grad(bowl)(params), distance_fn=squared, noised_fn=bowl,
        metrics={"loss": Mean(jnp.asarray(3.0), jnp.asarray(2.0))},
    )  # fmt: skip


def train(optimizer, params, grads, steps=3):
    """(updates, params, state) after `steps` in a scan, whose carry must keep its structure and types."""
    update = optax.with_extra_args_support(optimizer).update

    def step(carry, _):
        params, state = carry
        updates, state = update(grads, state, params, **extra())
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)


@quiet
@every_transform
@every_dtype
def test_a_scan_keeps_structure_and_data_types(name, dtypes):
    x64, leaves = DTYPES[dtypes]
    with jax.enable_x64(x64):
        optimizer, params = TRANSFORMS[name](), tree(0, leaves)
        (after, _), _ = jax.eval_shape(functools.partial(train, optimizer), params, tree(1, leaves))
        chex.assert_trees_all_equal_shapes_and_dtypes(after, params)


# gradient_transformation() of MultiSteps drops what update is given beside params.
with_extra = lambda steps: optax.GradientTransformationExtraArgs(steps.init, steps.update)
WRAPPERS = {
    "apply_if_finite": lambda make: optax.apply_if_finite(make(), 3),
    "conditionally_transform": lambda make: optax.conditionally_transform(make(), lambda n: n > 1),
    "conditionally_mask": lambda make: optax.conditionally_mask(make(), lambda n: n > 1),
    "MultiSteps": lambda make: with_extra(optax.MultiSteps(make(), 2)),
    "masked": lambda make: optax.masked(
        make(), lambda p: jax.tree.map_with_path(lambda path, _: "b" not in str(path), p)
    ),
    "partition": lambda make: optax.partition(
        {"ours": make(), "theirs": optax.sgd(RATE)},
        lambda p: jax.tree.map(lambda x: "ours" if jnp.ndim(x) > 1 else "theirs", p),
    ),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make()),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(
        lambda scale: optax.chain(optax.scale(scale), make())
    )(2.0),
    "flatten": lambda make: optax.flatten(make()),
}


# Every transform in every wrapper, and each of the two with both types: not all three at once.
TYPES = ("bfloat16", "x64 float64")
WRAPPED = [
    (name, wrapper, TYPES[(i + j) % 2])
    for i, name in enumerate(TRANSFORMS)
    for j, wrapper in enumerate(WRAPPERS)
]


@quiet
@pytest.mark.parametrize("name, wrapper, dtypes", WRAPPED)
def test_optax_wrappers_keep_structure_and_data_types(name, wrapper, dtypes):
    x64, leaves = DTYPES[dtypes]
    with jax.enable_x64(x64):
        optimizer = WRAPPERS[wrapper](TRANSFORMS[name])
        params, grads = tree(0, leaves)["inner"], tree(1, leaves)["inner"]
        jax.eval_shape(functools.partial(train, optimizer), params, grads)


def compiled(name, steps=3):
    return jax.jit(functools.partial(train, TRANSFORMS[name](), steps=steps))


# subspace_gradient is not among them: which directions of no variance it removes is rounding.
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "subspace_gradient"])
def test_x64_is_float32_with_more_digits(name):
    plain, updates = compiled(name)(tree(0), tree(1))
    with jax.enable_x64(True):
        leaves = ["float64"]
        wide = lambda t: jax.tree.map(lambda x: x.astype("float64"), t)
        params, grads = wide(tree(0)), wide(tree(1))
        found, wide_updates = compiled(name)(params, grads)
        chex.assert_trees_all_close(wide_updates, wide(updates), rtol=1e-3, atol=1e-5)
        chex.assert_trees_all_equal_dtypes(found[0], tree(0, leaves))


@quiet
@every_transform
def test_zeros_give_no_nan(name):
    _, leaves = DTYPES["x64 mixed"]  # all of them, float16 of the smallest range too
    with jax.enable_x64(True):
        run, params = compiled(name), tree(0, leaves)
        zeros = jax.tree.map(jnp.zeros_like, params)
        # At the anchor with no gradient; and params that are 0, where ASAM's ball has no size.
        for start in (params, zeros):
            out = run(start, zeros)
            assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


@quiet
@every_transform
@pytest.mark.parametrize("empty", [{}, {"frozen": None}], ids=str)
def test_empty_trees(name, empty):
    (params, _), updates = compiled(name, steps=2)(empty, empty)
    assert params == empty and updates == empty


@every_transform
@quiet
def test_donated_params_and_state_are_no_aliases(name):
    optimizer, params, grads = TRANSFORMS[name](), tree(0), tree(1)
    update = optax.with_extra_args_support(optimizer).update

    def step(params, state):
        updates, state = update(grads, state, params, **extra())
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    params, state = step(params, state)  # eager: what it returns must not be what it was given
    donating = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        params, state = donating(params, state)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((params, state)))


def logits(params, batch, key, noise=None):
    """(logits [B, V], weights [B]) of a linear model of the rows."""
    del key
    rows = batch if noise is None else noise(batch)
    kernel = params["kernel"]
    return rows.astype(kernel.dtype) @ kernel, jnp.ones(len(batch))


ROWS = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
at_rows = lambda d: lambda *trees: d(*trees, jnp.asarray(ROWS), jax.random.key(0)).value
DISTANCES = {
    "parameter_distance": parameter_distance,
    "kl": at_rows(function_distance(logits, kl_divergence)),
    "reverse_kl": at_rows(function_distance(logits, reverse_kl_divergence)),
    "symmetric_kl": at_rows(function_distance(logits, symmetric_kl_divergence)),
    "l2": at_rows(function_distance(logits, l2_distance)),
    "imq": at_rows(sample_distance(logits)),
    "gaussian": at_rows(sample_distance(logits, gaussian_kernel())),
}
NOISE = {
    "noise": at_rows(noise_distance(logits)),
    "no noise": at_rows(noise_distance(logits, 0.0)),
    "no noise, l2": at_rows(noise_distance(logits, 0.0, divergence=l2_distance)),
}


# Each in float32, and in one of the others in turn; at each decay with one of the two wrappers.
MEASURED = [
    (distance, dtypes)
    for i, distance in enumerate([*DISTANCES, *NOISE])
    for dtypes in ("float32", TYPES[i % 2])
]


@pytest.mark.parametrize("distance, dtypes", MEASURED)
def test_distances_from_the_point_itself(distance, dtypes):
    x64, (dtype,) = DTYPES[dtypes]
    with jax.enable_x64(x64):
        params = {"kernel": jnp.asarray(np.random.default_rng(4).normal(size=(4, 3)), dtype)}
        grads = jax.tree.map(jnp.zeros_like, params)
        if distance in DISTANCES:
            measure, decays = DISTANCES[distance], (0.0, 0.9, 1.0)
            slope = lambda p: jax.grad(measure, argnums=1)(params, p)
        else:
            measure, decays = NOISE[distance], (None,)
            slope = jax.grad(measure)

        def at(params):
            wraps = (optim.with_trust_region, optim.with_tram)
            pairs = [(wraps[i % 2], decay) for i, decay in enumerate((*decays, decays[-1]))]
            moves = [wrap(optax.sgd(1.0), decay=decay, distance=measure) for wrap, decay in pairs]
            of = lambda o: o.update(grads, o.init(params), params, grad_fn=lambda p, _: grads)[0]
            return [of(o) for o in moves]

        # Not compiled: the compiler may round the two equal models apart, where l2's slope is a unit vector.
        found = slope(params)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((found, jax.jit(at)(params))))
        if distance != "noise":
            # The narrowest multiquadric's slope is 500 times what its squared distances are rounded by.
            atol = 1e-2 if dtype == jnp.bfloat16 else 500 * jnp.finfo(f32).eps
            chex.assert_trees_all_close(found, grads, atol=atol)


class Pair(NamedTuple):
    kernel: jax.Array
    rest: tuple


STRUCTURES = {
    "dict": lambda a, b, c: {"a": {"b": a}, "c": [b, c]},
    "tuple": lambda a, b, c: (a, (b, c)),
    "NamedTuple": lambda a, b, c: Pair(a, (b, c)),
    "FrozenDict": lambda a, b, c: flax.core.freeze({"a": a, "b": {"c": b, "d": c}}),
    "None": lambda a, b, c: (a, None, {"b": b, "c": c}),
}


every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
loss = lambda p, x, key: bowl(p) + 0 * jnp.sum(x)
with_aux = lambda p, x, key: (loss(p, x, key), {"n": jnp.int32(4), "loss": loss(p, x, key)})


def three_leaves(kinds):
    leaves = tree(0, [kinds[-1], kinds[0]])["inner"]
    return [leaves["b"], leaves["c"], leaves["d"]]


def estimate(name, params):
    value, grads = ESTIMATORS[name]()(loss)(params, jnp.ones((4, 1)), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    return value, jax.tree.leaves(grads)


def estimate_with_aux(name, params):
    estimator = ESTIMATORS[name]()(with_aux, has_aux=True)
    (value, aux), grads = estimator(params, jnp.ones((4, 1)), jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    assert aux["n"].dtype == jnp.int32 and aux["loss"].dtype == value.dtype
    return value, jax.tree.leaves(grads)


@every_estimator
def test_estimators_take_any_tree(name):
    every = lambda leaves: [estimate(name, pack(*leaves)) for pack in STRUCTURES.values()]
    first, *others = jax.jit(every)(three_leaves([f32]))
    for other in others:
        chex.assert_trees_all_close(other, first, rtol=1e-5)


@every_estimator
@every_dtype
def test_estimators_take_any_type_with_and_without_aux(name, dtypes):
    x64, kinds = DTYPES[dtypes]
    with jax.enable_x64(x64):
        both = lambda params: [f(name, params) for f in (estimate, estimate_with_aux)]
        params = STRUCTURES["None"](*three_leaves(kinds))
        # Compiled for two types: the others are traced, which is where types clash.
        if dtypes not in ("float32", "x64 float64"):
            jax.eval_shape(both, params)
            return
        run = jax.jit(both)
        plain, other = run(params)
        chex.assert_trees_all_close(other[0], plain[0], rtol=1e-6)
        chex.assert_trees_all_close(other[1], plain[1], rtol=1e-5)
        zeros = jax.tree.map(jnp.zeros_like, params)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(run(zeros)))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_argnums_are_refused(name):
    # As a second position they would be taken for has_aux.
    with pytest.raises(TypeError, match="positional"):
        ESTIMATORS[name]()(bowl, (0, 1))
    with pytest.raises(TypeError, match="argnums"):
        ESTIMATORS[name]()(bowl, argnums=(0, 1))


@every_dtype
def test_lion_apply_and_mezo_keep_data_types(dtypes):
    x64, leaves = DTYPES[dtypes]
    with jax.enable_x64(x64):
        params, key = tree(0, leaves), jax.random.key(0)
        for mu_dtype in (None, "bfloat16", "int8"):
            state = optim.scale_by_lion(mu_dtype=mu_dtype).init(params)
            step = lambda c, _: (optim.lion_apply(c[0], params, c[1], RATE), None)
            jax.eval_shape(lambda c, s=step: jax.lax.scan(s, c, length=2), (params, state))
        mezo = optim.mezo_step(lambda p, key: bowl(p))
        keys = jax.random.split(key, 2)

        def both(params):
            move = lambda p, key: (lambda p, _, record: (p, record))(*mezo(p, RATE, key))
            after, records = jax.lax.scan(move, params, keys)
            return after, optim.mezo_replay(params, records)

        for after in jax.eval_shape(both, params):
            chex.assert_trees_all_equal_shapes_and_dtypes(after, params)
