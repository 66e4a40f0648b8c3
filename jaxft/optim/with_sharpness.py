"""Sharpness-aware minimisation as optax transforms around any base optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.optim.perturbations import (
    Perturbation,
    fisher_perturbation,
    global_norm,
    moved,
    perturb_sam,
    wide,
)
from jaxft.optim.sharpness import check_steps, scalar


def with_sam(
    base: optax.GradientTransformation,
    rho: float | jax.Array = 0.05,
    perturb: Perturbation | None = None,
    *,
    ascent_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The base's update for the gradient at θ + eps instead of that at θ.

        updates, state = with_sam(optax.adam(1e-3)).update(grads, state, params, grad_fn=grad_fn)

    Equal to optax.contrib.sam(base, ..., opaque_mode=True) where that is finite: a zero gradient is
    not perturbed here, but becomes NaN there. The state is only the base's. jaxft's train step
    provides `grad_fn`, with microbatches accumulated: eps is the whole batch's. Inside
    optax.MultiSteps eps comes from the mean gradient, but grad_fn sees the last part of the batch
    only.

    Args:
        base: any optax transform; it gets the extra arguments too.
        rho: see `perturb_sam`.
        perturb: replaces perturb_sam(rho): `perturb_asam()`, `perturb_fisher()`, ...
        ascent_steps: n of `sharpness_aware`, each of which calls grad_fn(params, number of the step) once.

    Raises:
        ValueError: for ascent_steps < 1; in update, without params or grad_fn.
    """
    check_steps("with_sam", ascent_steps=ascent_steps)
    perturb = perturb_sam(rho) if perturb is None else perturb
    base = optax.with_extra_args_support(base)

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        check_arguments("with_sam", params, grad_fn=grad_fn)

        def ascend(number, point_and_grads):
            point, grads = point_and_grads
            point = moved(point, perturb(point, grads))
            return point, grad_fn(point, number)

        if isinstance(ascent_steps, jax.Array):  # under optax.inject_hyperparams
            _, updates = jax.lax.fori_loop(0, ascent_steps, ascend, (params, updates))
        else:
            point = params
            for number in range(ascent_steps):
                point, updates = ascend(number, (point, updates))
        return base.update(updates, state, params, grad_fn=grad_fn, **extra)

    return optax.GradientTransformationExtraArgs(base.init, update)


def with_tram_fisher(
    base: optax.GradientTransformation,
    gamma: float | jax.Array = 0.1,
    eta: float | jax.Array = 0.1,
    noised: Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The base's update for the gradient at θ + eps, with Fisher SAM's eps for f = (∇L(θ; x + z))².

    TRAM-Fisher: Sherborne et al., 2023, arxiv.org/abs/2310.03646; `tram_fisher` as a transform,
    which also works with adapters. Costs three gradients; the state is only the base's.

    Args:
        base: any optax transform; it gets the extra arguments too.
        gamma, eta: see `perturb_fisher`.
        noised: params -> loss with noise on the inputs, a scalar or a jaxft.metrics.Mean. None: update's
            `noised_fn`, which knows the batch: make_step(extra_args={"noised_fn": mean_of(...)}).

    Raises:
        ValueError: in update, without params, grad_fn or a noised loss.
    """
    perturb, base = fisher_perturbation(gamma, eta), optax.with_extra_args_support(base)

    def update(updates, state, params=None, *, grad_fn=None, noised_fn=None, **extra):
        loss = noised or noised_fn
        check_arguments("with_tram_fisher", params, grad_fn=grad_fn, noised_fn=loss)
        others = jax.grad(lambda p: scalar(loss(p)))(params)
        updates = grad_fn(moved(params, perturb(updates, others)), 0)
        extra = extra | {"grad_fn": grad_fn, "noised_fn": noised_fn}
        return base.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(base.init, update)


class LookSamState(NamedTuple):
    """The state of `look_sam`."""

    count: jax.Array  # [] int32, steps done
    direction: optax.Updates  # g_v / ‖g_v‖ of the last full step
    base: optax.OptState


def look_sam(
    base: optax.GradientTransformation,
    rho: float | jax.Array = 0.05,
    period: int = 5,
    alpha: float | jax.Array = 0.7,
) -> optax.GradientTransformationExtraArgs:
    """SAM in every `period`-th step; the other steps reuse its component orthogonal to the gradient.

        full steps: g_s = ∇L(θ + ρ g / ‖g‖),    g_v = g_s - (g_s · g) g / ‖g‖²
        the others: g_s = g + α ‖g‖ g_v / ‖g_v‖

    LookSAM: Liu et al., 2022, arxiv.org/abs/2203.02714, algorithm 1, k = 5 and α = 0.7. One step costs
    1 + 1 / period gradients on average; only full steps call `grad_fn`. The state holds one tree like the
    gradients. A g_v within the rounding error of g_s counts as 0: if g_s and g are parallel,
    rounding errors would give its direction. Arguments of update and errors as for `with_sam`.
    """
    check_steps("look_sam", period=period)
    if isinstance(alpha, (int, float)) and not alpha >= 0:
        raise ValueError(f"look_sam: alpha must be at least 0, got {alpha}.")
    perturb, base = perturb_sam(rho), optax.with_extra_args_support(base)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LookSamState(jnp.zeros([], jnp.int32), zeros, base.init(params))

    def update(updates, state, params=None, *, grad_fn=None, **extra):
        check_arguments("look_sam", params, grad_fn=grad_fn)

        def full(grads):
            sharp = grad_fn(moved(params, perturb(params, grads)), 0)
            return _like(sharp, grads), _like(_direction(sharp, grads), state.direction)

        def cheap(grads):
            size = alpha * global_norm(grads)
            add = lambda g, v: (wide(g) + size * wide(v)).astype(g.dtype)
            return jax.tree.map(add, grads, state.direction), state.direction

        updates, direction = jax.lax.cond(state.count % period == 0, full, cheap, updates)
        updates, base_state = base.update(updates, state.base, params, grad_fn=grad_fn, **extra)
        return updates, LookSamState(optax.safe_increment(state.count), direction, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


class AlternatingSamState(NamedTuple):
    """The state of `alternating_sam`."""

    phase: jax.Array  # [] int32, updates since the params were θ
    params: optax.Params  # θ, while the params outside are θ + eps
    base: optax.OptState


def alternating_sam(
    base: optax.GradientTransformation,
    rho: float | jax.Array = 0.05,
    sync_period: int = 2,
    perturb: Perturbation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SAM for loops without grad_fn: every `sync_period`-th update is a step, the others ascend.

        θ -> θ + eps(θ) -> ... -> θ + base(gradient at the last point)

    Works like optax.contrib.sam in its transparent mode. Between steps the params of the loop are
    perturbed: evaluate and save `evaluation_params(state, params)`. The state keeps one copy of the
    params.

    Args:
        base, rho, perturb: see `with_sam`.
        sync_period: gradients, and updates, per step of the base; at least 2.

    Raises:
        ValueError: for sync_period < 2; in update, without params.
    """
    check_steps("alternating_sam", 2, sync_period=sync_period)
    perturb = perturb_sam(rho) if perturb is None else perturb
    base = optax.with_extra_args_support(base)

    def init(params):
        # A copy: train steps donate params, and an alias would be freed with them.
        return AlternatingSamState(
            jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params), base.init(params)
        )

    def update(updates, state, params=None, **extra):
        check_arguments("alternating_sam", params)
        theta = evaluation_params(state, params)

        def up(grads):
            return _like(perturb(params, grads), params), state.base

        def step(grads):
            updates, base_state = base.update(grads, state.base, theta, **extra)
            back = lambda t, p, u: (wide(t) - wide(p) + wide(u)).astype(p.dtype)
            return jax.tree.map(back, theta, params, updates), base_state

        # cond, not products with 0 and 1: products spread NaN, and keys in a state cannot be
        # multiplied.
        last = state.phase == sync_period - 1
        updates, base_state = jax.lax.cond(last, step, up, updates)
        phase = (state.phase + 1) % sync_period
        return updates, AlternatingSamState(phase, theta, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluation_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The unperturbed θ of `alternating_sam`, whose state may be anywhere inside `state`.

    Params that no alternating_sam moves are returned unchanged.
    """
    is_ours = lambda node: isinstance(node, AlternatingSamState)
    states = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    for node in states:
        pick = lambda kept, p, n=node: jnp.where(n.phase == 0, p, kept)
        params = jax.tree.map(pick, node.params, params)
    return params


def check_arguments(name: str, params: Any, **functions: Any) -> None:
    """Raises ValueError if params or a function that update needs is None."""
    if params is None:
        raise ValueError(f"{name}: params=None; call update(updates, state, params, ...).")
    for argument, function in functions.items():
        if function is None:
            raise ValueError(
                f"{name}: update needs {argument}=...; see its docstring, and `make_step` of jaxft.train."
            )


def _direction(sharp: Any, grads: Any) -> Any:
    """g_v / ‖g_v‖, g_v being g_s minus its part along g; 0 where that is rounding."""
    products = jax.tree.map(lambda s, g: jnp.sum(wide(s) * wide(g)), sharp, grads)
    square = jnp.square(global_norm(grads))
    along = sum(jax.tree.leaves(products), 0.0) / jnp.where(square > 0, square, 1.0)
    across = jax.tree.map(lambda s, g: wide(s) - along * wide(g), sharp, grads)
    places = max((float(jnp.finfo(s.dtype).eps) for s in jax.tree.leaves(sharp)), default=0.0)
    norm = global_norm(across)
    kept = norm > 8 * places * global_norm(sharp)
    factor = jnp.where(kept, 1 / jnp.where(kept, norm, 1.0), 0.0)
    return jax.tree.map(lambda x: factor * x, across)


def _like(tree: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, o: x.astype(o.dtype), tree, other)
