"""Mixtures of experts: a router gives each token to a few MLPs; no token is dropped."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels.pullback import linear_map
from jaxft.models.config import DecoderConfig, Experts
from jaxft.models.layers import ACTIVATIONS, KERNEL_INIT, Dense, read, through_adapter, unit_rms
from jaxft.models.remat import EXPERT_OUTPUTS, Remat, remat_lean
from jaxft.parallel.dispatch import routes
from jaxft.parallel.experts import expert_layout
from jaxft.weights import (
    WeightLike,
    along_last,
    grouped,
    is_weight,
    matmul_float32,
    scaled_bias,
    to_dense,
)


@flax.struct.dataclass
class Routing:
    """The results of the routers of a model for the tokens of a batch, or, without L, of one router."""

    logits: jax.Array  # [L, B, T, E] float32, of the L layers that have experts
    chosen: jax.Array  # [L, B, T, k] int32, the experts that a token passes


class ExpertsMlp(nn.Module):
    """Σ_e g_e(x) MLP_e(x) over the chosen experts e of a token, plus a shared expert if there is one.

    Fedus et al., 2021, arxiv.org/abs/2101.03961; Jiang et al., 2024, arxiv.org/abs/2401.04088, section 2.1.
    Returns (y [B, T, D], Routing).
    """

    config: DecoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, seen=None):
        config, moe = self.config, self.config.experts
        # The router sees x, or what it is to see instead.
        router = Router(moe, config.norm_eps, name="router")
        logits, correction, gains = router(x if seen is None else seen)
        gates, chosen = route(logits, moe, correction)
        gates = gates if gains is None else gates * gains.astype(jnp.float32)[chosen]
        (gate_up, down), biases = Kernels(moe, config.hidden_size, name="experts")()
        activate = remat_lean(_activation(config), self.remat)
        y = mix(x, chosen, gates.astype(x.dtype), gate_up, down, activate, biases)
        if moe.shared_width:
            shared = SharedMlp(config, moe.shared_width, self.remat, name="shared")(x)
            gate = jax.nn.sigmoid(Dense(1, name="shared_gate")(x)) if moe.shared_gate else 1
            y = y + gate * shared
        return through_adapter(self, x, y), Routing(logits, chosen)


class SharedMlp(nn.Module):
    """act(x W_gate) * (x W_up) W_down: the expert that every token passes."""

    config: DecoderConfig
    width: int
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x):
        gate, up = (Dense(self.width, name=name)(x) for name in ("gate", "up"))
        activation = ACTIVATIONS[self.config.activation]
        y = remat_lean(lambda gate, up: activation(gate) * up, self.remat)(gate, up)
        return Dense(self.config.hidden_size, name="down")(y)


class Router(nn.Module):
    """x W + b in float32, whatever the activations' type (Zoph et al., 2022, arxiv.org/abs/2202.08906).

    Returns (logits [B, T, E], the correction [E] of the scores or None, the experts' gains [E] or None).
    """

    experts: Experts
    eps: float  # of the norm of its input, if it has one

    @nn.compact
    def __call__(self, x):
        count, size, ones = self.experts.count, x.shape[-1], nn.initializers.ones
        vector = lambda name: to_dense(read(self, name, nn.initializers.zeros, (count,)))
        if self.experts.router_norm:
            scale = to_dense(read(self, "scale", ones, (size,))).astype(x.dtype)
            x = unit_rms(x, self.eps) * along_last(scale, x) * jnp.asarray(size**-0.5, x.dtype)
        logits = matmul_float32(x, read(self, "kernel", KERNEL_INIT, (x.shape[-1], count)))
        if self.experts.bias:
            logits = logits + along_last(vector("bias").astype(jnp.float32), logits)
        gains = to_dense(read(self, "gains", ones, (count,))) if self.experts.gains else None
        return logits, vector("correction") if self.experts.correction else None, gains


class Kernels(nn.Module):
    """Holds the kernels and biases of the experts: gate and up [E, D, 2F], and down [E, F, D].

    Returns ((gate_up, down), (their biases [E, 2F] and [E, D], or None)).
    """

    experts: Experts
    size: int

    @nn.compact
    def __call__(self):
        count, width, bias = self.experts.count, self.experts.width, self.experts.bias
        made = lambda name, *shape: Kernel((count, *shape), bias, name=name)()
        both = made("gate_up", self.size, 2 * width), made("down", width, self.size)
        return tuple(zip(*both, strict=True))


class Kernel(nn.Module):
    """Holds one kernel [..., in, out] and its bias [..., out]; returns (kernel, bias or None)."""

    shape: tuple[int, ...]
    bias: bool = False

    @nn.compact
    def __call__(self):
        kernel = read(self, "kernel", KERNEL_INIT, self.shape)
        if not self.bias:
            return kernel, None
        shape = (*self.shape[:-2], self.shape[-1])
        return kernel, scaled_bias(
            to_dense(read(self, "bias", nn.initializers.zeros, shape)), kernel
        )


def route(
    logits: jax.Array, experts: Experts, correction: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(gates [..., k] float32, experts [..., k]): the k experts with the largest scores, and these scores.

    Of equal scores, the expert with the smaller number comes first, and of groups the first.

    Args:
        logits: [..., E], of the router.
        experts: says what a score is (softmax or sigmoid of the logits), how many groups the experts are
            chosen from (DeepSeek-V2, 2024, arxiv.org/abs/2405.04434, section 2.2.2), and whether gates are
            divided by their sum.
        correction: [E], added to the scores to choose; gates are without it (Wang et al., 2024,
            arxiv.org/abs/2408.15664). It gets no gradient.
    """
    logits = logits.astype(jnp.float32)
    scores = jax.nn.sigmoid(logits) if experts.sigmoid else jax.nn.softmax(logits, axis=-1)
    choice = scores
    if correction is not None:
        choice = scores + along_last(correction.astype(jnp.float32), scores)
    if experts.chosen_groups < experts.groups:
        choice = _within_groups(choice, experts)
    if choice is scores:
        gates, chosen = jax.lax.top_k(scores, experts.per_token)
    else:
        chosen = jax.lax.top_k(jax.lax.stop_gradient(choice), experts.per_token)[1]
        gates = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalised:
        # Sigmoids can all be 0; of the chosen probabilities the largest is at least 1 / E.
        least = 1e-20 if experts.sigmoid else 0.0
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + least)
    return gates if experts.scale == 1 else experts.scale * gates, chosen


def _within_groups(choice, experts):
    """The scores [..., E] with -inf outside of the chosen groups."""
    by_group = choice.reshape(*choice.shape[:-1], experts.groups, -1)
    best = jnp.sum(jax.lax.top_k(by_group, experts.group_best)[0], axis=-1)
    chosen = jax.lax.top_k(best, experts.chosen_groups)[1]
    allowed = jax.nn.one_hot(chosen, experts.groups, dtype=bool).any(axis=-2)
    return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(choice.shape)


def mix(
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    gate_up: WeightLike,
    down: WeightLike,
    activate: Callable[[jax.Array], jax.Array],
    biases: tuple[jax.Array | None, jax.Array | None] = (None, None),
    exchange: bool | None = None,
) -> jax.Array:
    """Σ_k gates[..., k] MLP_{chosen[..., k]}(x) for x [B, T, D]; on a mesh, experts over the axis `expert`.

    Args:
        x: [B, T, D].
        chosen: [B, T, k] int32, the experts of each token.
        gates: [B, T, k].
        gate_up, down: kernels [E, D, 2F] and [E, F, D], or weights of these shapes.
        activate: gate and up [N, 2F] -> the input [N, F] of W_down.
        biases: [E, 2F] and [E, D].
        exchange: whether rows are sent to their experts' devices by all-to-alls (not on CPUs), or all tokens
            are gathered; None: what moves the fewest bytes.
    """
    layout, count = expert_layout(x, gate_up.shape[0]), gate_up.shape[0]
    if exchange is None:
        exchange = layout.exchanges(chosen.shape[-1])
    # Before the call, so that shards are gathered in the data type of the products.
    gate_up, down = (w if is_weight(w) else w.astype(x.dtype) for w in (gate_up, down))

    def gathered(x, chosen, gates, gate_up, down, *biases):
        x, chosen, gates = map(layout.gathered, (x, chosen, gates))
        own = gate_up.shape[0]
        mine = chosen - layout.first(own)
        # Experts of other devices come last, in no group.
        mine = jnp.where((mine >= 0) & (mine < own), mine, own)
        compute = lambda rows, sizes: _experts(rows, gate_up, down, biases, sizes[:own], activate)
        return layout.summed(_mixed(x, mine, gates, own + 1, compute))

    def exchanged(x, chosen, gates, gate_up, down, *biases):
        sent, own = chosen.size, gate_up.shape[0]
        most = sent // chosen.shape[-1] * min(chosen.shape[-1], own)

        def compute(rows, sizes):
            to = routes(sizes, layout.split, sent, most)
            rows = _experts(to.dispatched(rows), gate_up, down, biases, to.sizes, activate)
            return checkpoint_name(to.collected(rows), EXPERT_OUTPUTS)

        return _mixed(x, chosen, gates, count, compute)

    kernels = gate_up, down, *biases
    local = exchanged if exchange else gathered
    return layout.mapped(local, *kernels)(x, chosen, gates, *kernels)


def _mixed(x, chosen, gates, groups, compute):
    """The sum over k of gates times compute(rows sorted by `chosen`, rows of each group)."""
    *shape, size = x.shape
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    sizes = jnp.bincount(flat, length=groups).astype(jnp.int32)
    rows = compute(_dispatched(x.reshape(-1, size), order, places), sizes)
    back = _permuted(rows, places, order).reshape(*shape, -1, size)
    return jnp.einsum("...kd,...k->...d", back, gates)


def _experts(rows, gate_up, down, biases, sizes, activate):
    """The MLP of its expert for each row; rows after the last group become 0."""
    rows = _plus(grouped(rows, gate_up, sizes), biases[0], sizes)
    return _plus(grouped(activate(rows), down, sizes), biases[1], sizes)


def _plus(y, bias, sizes):
    """y [N, F] plus the bias [E, F] of each row's expert; rows after the last group stay."""
    if bias is None:
        return y
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(y)), side="right")
    return y + jnp.pad(bias, ((0, 1), (0, 0))).astype(y.dtype)[expert]


def _activation(config):
    """A function of gate and up [N, 2F]: act(gate) * up, or gpt-oss's clamped form."""
    activation, moe = ACTIVATIONS[config.activation], config.experts

    def activate(both):
        if moe.interleaved:
            gate, up = both[..., 0::2], both[..., 1::2]
        else:
            gate, up = jnp.split(both, 2, axis=-1)
        if moe.swiglu is None:
            return activation(gate) * up
        alpha, limit = moe.swiglu
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)

    return activate


def _dispatched(x, order, places):
    """[N k, D]: for each place the row of its token; the transposed map gathers too, it never scatters."""
    several = len(order) // len(x)
    apply = lambda fixed, moving: moving[0][fixed[0] // several]
    transpose = lambda fixed, ct: [ct[fixed[1]].reshape(-1, several, ct.shape[-1]).sum(1)]
    return linear_map(apply, transpose, [order, places], [x])


def _permuted(x, order, inverse):
    apply = lambda fixed, moving: moving[0][fixed[0]]
    transpose = lambda fixed, ct: [ct[fixed[1]]]
    return linear_map(apply, transpose, [order, inverse], [x])
