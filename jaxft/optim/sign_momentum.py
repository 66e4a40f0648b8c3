"""Lion, with momentum in float32, bfloat16 or int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.kernels.lion import lion_direction, lion_step
from jaxft.kernels.rounding import Int8Blocks, block_shape, fills_a_block
from jaxft.optim.perturbations import wide
from jaxft.optim.rounding import MOMENT_STREAM, PARAM_STREAM, round_stochastically, step_seeds

ScalarOrSchedule = float | jax.Array | optax.Schedule
Mask = Any | Callable[[optax.Params], Any]


class LionState(NamedTuple):
    """The state of `scale_by_lion`."""

    count: jax.Array  # [] int32
    mu: optax.Updates  # momentum m, like the params: arrays, or Int8Blocks


def lion(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: Any | None = None,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    *,
    stochastic_rounding: bool = True,
    key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """θ - η (sign(β1 m + (1 - β1) g) + λ θ), then m = β2 m + (1 - β2) g.

    Lion: Chen et al., 2023, arxiv.org/abs/2302.06675, algorithm 2. Equal to optax.lion to the last
    bit in float32 (optax's weight decay defaults to 1e-3; the default here is 0, as in the paper's
    code). η is usually 3 to 10 times smaller than AdamW's and λ as much larger.

    Under jit, with the params and the state donated, the step reads gradients, params and momentum once
    and writes the last two in place, on TPUs and GPUs (int8 on TPUs: see `lion_apply`). XLA for CPUs does
    so for float32 in a process with XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion.

    Args:
        learning_rate: η.
        b1: β1 in [0, 1); 0.95 for language models.
        b2: β2 in [0, 1); 0.98 for language models.
        mu_dtype: data type of the momentum: "float32", "bfloat16", or "int8" (blocks of 256; leaves
            whose last two axes hold fewer numbers stay float32). None: the params' type.
        weight_decay: λ, multiplied by η.
        mask: where weight decay acts: a tree of bools that is a prefix of the params, or a function
            of the params that returns one. None: everywhere.
        stochastic_rounding: round bfloat16 params, and bfloat16 and int8 momentum, up or down at
            random so that the mean is exact. Rounding to nearest loses steps below half a unit in
            the last place: a bfloat16 momentum of 1 never moves towards a gradient of 1.1. This
            transform must then be the last of a chain.
        key: for the rounding; default jax.random.key(0).

    Raises:
        ValueError: for b1 or b2 outside [0, 1), or an unknown mu_dtype.
    """
    steps = optax.chain(
        scale_by_lion(b1, b2, mu_dtype, stochastic_rounding=stochastic_rounding, key=key),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
        round_stochastically(key) if stochastic_rounding else optax.identity(),
    )
    if not stochastic_rounding:
        return steps

    def update(updates, state, params=None, **extra):
        # Intermediate values are float32: in bfloat16, 1 + λ θ would be 1.
        new, state = steps.update(jax.tree.map(wide, updates), state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(steps.init, update)


def scale_by_lion(
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: Any | None = None,
    *,
    stochastic_rounding: bool = True,
    key: jax.Array | None = None,
) -> optax.GradientTransformation:
    """sign(β1 m + (1 - β1) g), then m = β2 m + (1 - β2) g; see `lion`."""
    _check(b1, b2)
    dtype = None if mu_dtype is None else _moment_dtype(mu_dtype)

    def init(params):
        mu = jax.tree.map(lambda p: _zero_moment(p, dtype), params)
        return LionState(jnp.zeros([], jnp.int32), mu)

    def update(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        moments = treedef.flatten_up_to(state.mu)
        draws = [None] * len(leaves)
        if stochastic_rounding:
            draws = step_seeds(key, len(leaves), MOMENT_STREAM, state.count)
        new = [
            lion_direction(g, m, seed, b1, b2)
            for g, m, seed in zip(leaves, moments, draws, strict=True)
        ]
        directions = [d.astype(g.dtype) for (d, _), g in zip(new, leaves, strict=True)]
        mu = treedef.unflatten([m for _, m in new])
        count = optax.safe_increment(state.count)
        return treedef.unflatten(directions), LionState(count, mu)

    return optax.GradientTransformation(init, update)


def lion_apply(
    params: optax.Params,
    grads: optax.Updates,
    state: LionState,
    learning_rate: ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    stochastic_rounding: bool = True,
    key: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[optax.Params, LionState]:
    """(params, state) after a step of `lion`, with no tree of updates in between.

    Equals `lion` and optax.apply_updates, for float32 params bit for bit; the state is that of
    `scale_by_lion(mu_dtype=...).init(params)`. Jit it with donate_argnums=(0, 2). An optax
    transform returns updates, and with int8 momentum XLA reads gradients and codes twice; here a
    TPU kernel reads them once: see `implementation` of jaxft.kernels.lion.lion_step. Other
    arguments as for `lion`.
    """
    _check(b1, b2)
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    leaves, treedef = jax.tree.flatten(params)
    decayed = jax.tree.leaves(_full_mask(mask, params))
    draws = [None] * len(leaves)
    if stochastic_rounding:
        streams = (MOMENT_STREAM, PARAM_STREAM)
        draws = jnp.stack(
            [step_seeds(key, len(leaves), stream, state.count) for stream in streams], axis=1
        )
    new = [
        lion_step(
            p, g, m, seed,
            learning_rate=rate, b1=b1, b2=b2,
            weight_decay=weight_decay if decays else 0.0,
            implementation=implementation,
        )
        for p, g, m, seed, decays in zip(
            leaves, treedef.flatten_up_to(grads), treedef.flatten_up_to(state.mu), draws, decayed,
            strict=True,
        )
    ]  # fmt: skip
    params, mu = (treedef.unflatten(part) for part in zip(*new, strict=True))
    return params, LionState(optax.safe_increment(state.count), mu)


def _full_mask(mask, params):
    mask = mask(params) if callable(mask) else mask
    return jax.tree.broadcast(True if mask is None else mask, params)


def _zero_moment(param, dtype):
    if dtype != jnp.int8:
        return jnp.zeros_like(param, dtype)
    if not fills_a_block(param.shape):
        return jnp.zeros_like(param, jnp.float32)
    sides = block_shape(param.shape)
    shape = tuple(-(-n // side) for n, side in zip(param.shape, sides, strict=True))
    sharding = _scale_sharding(getattr(param, "sharding", None), shape)
    return Int8Blocks(
        jnp.zeros_like(param, jnp.int8), jnp.zeros(shape, jnp.float32, device=sharding)
    )


def _scale_sharding(sharding, shape):
    """The param's sharding, without axes along which blocks cannot be split evenly."""
    if not isinstance(sharding, NamedSharding) or isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        return None
    spec = (*sharding.spec, *(None,) * len(shape))[: len(shape)]

    def parts(axes):
        names = axes if isinstance(axes, tuple) else (axes,)
        return jnp.prod(jnp.array([sharding.mesh.shape[name] for name in names]))

    kept = [
        axes if axes is not None and n % int(parts(axes)) == 0 else None
        for axes, n in zip(spec, shape, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _moment_dtype(dtype):
    dtype = jnp.dtype(dtype)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"lion: mu_dtype must be a float type or int8, got {dtype}.")
    return dtype


def _check(b1, b2):
    for name, value in (("b1", b1), ("b2", b2)):
        # Values traced under optax.inject_hyperparams cannot be checked.
        if isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"lion: {name} must be in [0, 1), got {value}.")
