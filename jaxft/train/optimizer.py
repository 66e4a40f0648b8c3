"""AdamW with warm-up, decay and clipping, as an optax chain."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxft.optim.perturbations import global_norm
from jaxft.parallel import LAYERS, path_name, stacked_axes

Decay = Callable[[jax.Array], jax.Array]  # progress in 0..1 -> factor of the learning rate

NOT_DECAYED = frozenset(
    {"scale", "bias", "sinks", "correction", "embedding", "layer_scale", "gains"}
)


def make_optimizer(
    learning_rate: float | jax.Array,
    *,
    total_steps: int,
    schedule: Decay | None = None,
    warmup_ratio: float = 0.03,
    weight_decay: float | jax.Array = 0.0,
    max_grad_norm: float | jax.Array | None = 1.0,
    rule: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Chains clipping, Adam, decoupled weight decay and a learning-rate schedule: AdamW.

    AdamW: Loshchilov & Hutter, 2019, arxiv.org/abs/1711.05101, algorithm 2. The decay is multiplied by the
    learning rate, as in torch and optax. The state holds the learning rate, so metrics include it.
    learning_rate, weight_decay and max_grad_norm may be arrays, as from optax.inject_hyperparams (name the
    other arguments in its static_args).

    Args:
        learning_rate: the peak, reached after the warm-up.
        total_steps: optimizer steps of the whole run.
        schedule: factor as a function of the progress 0..1 after the warm-up: `cosine` (the default),
            `linear`, `constant` or your own.
        warmup_ratio: fraction of `total_steps` over which the rate rises linearly from 0.
        weight_decay: coefficient; applied to the leaves that `decay_mask` selects.
        max_grad_norm: maximum L2 norm of the gradient over all trainable leaves; None: no clipping.
        rule: transform from gradients to a direction; default optax.scale_by_adam(0.9, 0.999, 1e-8).
    """
    if _is_number(learning_rate) and not 0 < learning_rate < math.inf:
        raise ValueError(
            f"make_optimizer: learning_rate must be positive and finite, got {learning_rate}."
        )
    if total_steps < 1 or not 0 <= warmup_ratio < 1:
        raise ValueError(
            f"make_optimizer: needs total_steps >= 1 and 0 <= warmup_ratio < 1, got {total_steps} "
            f"and {warmup_ratio}."
        )
    decays = not _is_number(weight_decay) or weight_decay != 0
    rate = with_warmup(learning_rate, total_steps, schedule or cosine, warmup_ratio)
    return optax.chain(
        optax.identity() if max_grad_norm is None else clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8) if rule is None else rule,
        optax.add_decayed_weights(weight_decay, decay_mask) if decays else optax.identity(),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=rate),
    )


def with_warmup(
    peak: float | jax.Array, total_steps: int, schedule: Decay, warmup_ratio: float = 0.03
) -> optax.Schedule:
    """Returns the learning-rate schedule: a linear rise, then peak * schedule(progress in 0..1)."""
    warmup = round(warmup_ratio * total_steps)

    def rate(step):
        rise = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        return peak * jnp.where(step < warmup, rise, schedule(progress))

    return rate


def cosine(progress: jax.Array) -> jax.Array:
    """(1 + cos πp) / 2: from 1 to 0."""
    return (1 + jnp.cos(jnp.pi * progress)) / 2


def linear(progress: jax.Array) -> jax.Array:
    """1 - p: from 1 to 0."""
    return 1 - progress


def constant(progress: jax.Array) -> jax.Array:
    """1 throughout."""
    return jnp.ones_like(progress)


def decay_mask(params: Any) -> Any:
    """True for leaves with weight decay: all except scales, gains, biases, sinks and embeddings.

    Embedding rows of tokens that never occur, which is most rows in fine-tuning, would shrink
    without a gradient to counteract the decay.
    """
    decays = lambda path, _: NOT_DECAYED.isdisjoint(path_name(path).split("/"))
    return jax.tree_util.tree_map_with_path(decays, params)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """g min(1, max_norm / |g|), |g| over all leaves: as optax, but a bfloat16 norm is in float32."""
    if _is_number(max_norm) and max_norm <= 0:
        raise ValueError(f"clip_by_global_norm: max_norm must be positive, got {max_norm}.")

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / global_norm(updates))
        return jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _is_number(value):
    """Returns whether `value` can be checked now: an array may be traced."""
    return not isinstance(value, jax.Array)


def muon_axes(params: Any, layers: str = LAYERS) -> Any:
    """Returns the axes that optax.contrib.muon treats as a matrix, per leaf; None: Adam, for others.

        optax.contrib.muon(1e-3, muon_weight_dimension_numbers=muon_axes)

    Muon's own rule (leaves with two axes) treats the stacked scales and biases of layers as one matrix and
    their kernels as none. Here layers stacked at `layers` are trained as separate layers would be.
    """

    def axes(path, leaf):
        stack = stacked_axes(path_name(path), layers)
        if leaf.ndim - stack != 2:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=stack, output_axis=stack + 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def clip_by_layer_rms(threshold: float, layers: str = LAYERS) -> optax.GradientTransformation:
    """u / max(1, rms(u) / threshold) for each leaf of each layer.

    Adafactor's clipping: Shazeer & Stern, 2018, arxiv.org/abs/1804.04235, algorithm 4. Like
    optax.clip_by_block_rms, except that layers stacked at `layers` each have their own root mean square.
    """

    def update(updates, state, params=None):
        del params

        def clip(path, u):
            axes = tuple(range(stacked_axes(path_name(path), layers), u.ndim))
            rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True))
            return u / jnp.maximum(1.0, rms / threshold)

        return jax.tree_util.tree_map_with_path(clip, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
