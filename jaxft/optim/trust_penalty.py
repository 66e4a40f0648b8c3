"""TRAM and trust-region penalties against moving targets, as optax transforms around any base optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.optim.perturbations import global_norm, moved, perturb_asam, wide
from jaxft.optim.sharpness import check_radius, radius, scalar
from jaxft.optim.with_sharpness import check_arguments

Distance = Callable[[Any, Any], Any]  # (target, params) -> a scalar or a jaxft.metrics.Mean


class TrustRegionState(NamedTuple):
    """The state of `with_tram` and `with_trust_region`."""

    target: optax.Params | None  # what the next step's params are compared with
    trust_distance: jax.Array  # [] float32, d of the last step, for logs
    base: optax.OptState


def with_tram(
    base: optax.GradientTransformation,
    decay: float | jax.Array | None = 0.0,
    distance: Distance | None = None,
    *,
    d_scale: float | jax.Array = 1.0,
    d_max: float | jax.Array = math.inf,
    eta: float | jax.Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The base's update for the gradient at θ + d T² g / ‖T g‖, d the distance of θ from a target.

        target <- decay · target + (1 - decay) θ  after each step, at first θ_0

    TRAM: Sherborne et al., 2023, arxiv.org/abs/2310.03646: decay 0 is TRAM-θ_{t-1}, 1 TRAM-θ_0 (the
    pretrained model), between them a running mean. In the first step d = 0, so it equals the base's
    own step. decay None is for distances that need no target (TRAM-x): they get only θ, and the
    state holds no copy of it. `tram` lists differences from the authors' code.

    The state holds one copy of the params, and the last d, before d_scale, as `trust_distance`, which
    jaxft's train step shows among its metrics. A running mean in bfloat16 may never change: keep
    trained params in float32.

    Args:
        base: any optax transform; it gets the extra arguments too.
        decay: in [0, 1], or None.
        distance: (target, params) -> d, with decay None (params) -> d, such as `parameter_distance`.
            None: update's `distance_fn`, which knows the batch:
            make_step(extra_args={"distance_fn": function_distance(...)}).
        d_scale, d_max, eta: see `tram`.

    Raises:
        ValueError: for decay outside [0, 1] or what `tram` refuses; in update, without params, grad_fn or a
            distance, and for params whose tree differs from the target's.
    """
    _check_decay("with_tram", decay)
    check_radius("with_tram", d_scale, d_max)
    perturb_asam(0.0, eta)
    base = optax.with_extra_args_support(base)

    def update(updates, state, params=None, *, grad_fn=None, distance_fn=None, **extra):
        measure = distance or distance_fn
        check_arguments("with_tram", params, grad_fn=grad_fn, distance_fn=measure)
        d = scalar(_from(state.target, measure, decay)(params))
        perturb = perturb_asam(radius(d, d_scale, d_max), eta)
        updates = grad_fn(moved(params, perturb(params, updates)), 0)
        extra = extra | {"grad_fn": grad_fn, "distance_fn": distance_fn}
        updates, base_state = base.update(updates, state.base, params, **extra)
        target = _advance(state.target, params, decay)
        return updates, TrustRegionState(target, d, base_state)

    return optax.GradientTransformationExtraArgs(_init(base, decay), update)


def with_trust_region(
    base: optax.GradientTransformation,
    weight: float | jax.Array = 0.1,
    decay: float | jax.Array | None = 0.0,
    distance: Distance | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The base's update for g + λ ∇_θ d(target, θ): the gradient of L + λ d, the target without gradient.

    With d = KL(p(target) || p(θ)) (jaxft.objectives.function_distance), decay 0 is the penalty form of
    trust-region policy optimisation (Schulman et al., 2015, arxiv.org/abs/1502.05477) that TRAM compares
    with, and 0.999 MESA (Du et al., 2022, arxiv.org/abs/2205.14083), λ = 0.1 in TRAM (appendix). Target,
    state, arguments and errors as for `with_tram`; grad_fn is not needed.

    Args:
        weight: λ, at least 0.
    """
    _check_decay("with_trust_region", decay)
    if isinstance(weight, (int, float)) and not weight >= 0:
        raise ValueError(f"with_trust_region: weight must be at least 0, got {weight}.")
    base = optax.with_extra_args_support(base)

    def update(updates, state, params=None, *, distance_fn=None, **extra):
        measure = distance or distance_fn
        check_arguments("with_trust_region", params, distance_fn=measure)
        measure = _from(state.target, measure, decay)
        d, slopes = jax.value_and_grad(lambda p: scalar(measure(p)))(params)
        add = lambda g, s: (g + weight * s).astype(g.dtype)
        extra = extra | {"distance_fn": distance_fn}
        updates, base_state = base.update(
            jax.tree.map(add, updates, slopes), state.base, params, **extra
        )
        target = _advance(state.target, params, decay)
        return updates, TrustRegionState(target, d, base_state)

    return optax.GradientTransformationExtraArgs(_init(base, decay), update)


def parameter_distance(target: Any, params: Any) -> jax.Array:
    """‖θ - target‖ over the whole tree, the distance in parameter space; where it is 0 its gradient is 0."""
    return global_norm(jax.tree.map(lambda t, p: wide(p) - wide(t), target, params))


def _init(base, decay):
    def init(params):
        # A copy: train steps donate params, and an alias would be freed with them.
        target = None if decay is None else jax.tree.map(jnp.copy, params)
        return TrustRegionState(target, jnp.zeros([], jnp.float32), base.init(params))

    return init


def _advance(target, params, decay):
    if decay is None:
        return None
    if isinstance(decay, (int, float)) and decay in (0, 1):  # exact, without sums
        return target if decay == 1 else jax.tree.map(jnp.copy, params)

    def mean(t, p):
        return (decay * wide(t) + (1 - decay) * wide(p)).astype(t.dtype)

    return jax.tree.map(mean, target, params)


def _from(target, measure, decay):
    """params -> distance from the target."""
    return measure if decay is None else lambda params: measure(_checked(target, params), params)


def _checked(target, params):
    here, there = jax.tree.structure(params), jax.tree.structure(target)
    if here != there:
        raise ValueError(
            f"with_tram: params {here} differ in structure from the target {there}; call init(params) again."
        )
    return target


def _check_decay(name, decay):
    if isinstance(decay, (int, float)) and not 0 <= decay <= 1:
        raise ValueError(f"{name}: decay must be in [0, 1], got {decay}.")
