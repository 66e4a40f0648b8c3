"""Mixtures of experts: a router gives each token to a few MLPs; no token is dropped."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxft.kernels.pullback import linear_map
from jaxft.models.config import DecoderConfig
from jaxft.models.layers import ACTIVATIONS, KERNEL_INIT, Dense, read, through_adapter
from jaxft.models.remat import EXPERT_OUTPUTS, Remat, remat_lean
from jaxft.parallel.dispatch import Exchange, routes
from jaxft.parallel.experts import expert_layout
from jaxft.weights import WeightLike, grouped, is_weight, matmul_float32


@flax.struct.dataclass
class Routing:
    """The results of the routers of a model for the tokens of a batch."""

    logits: jax.Array  # [L, B, T, E] float32, of the L layers that have experts
    chosen: int = flax.struct.field(pytree_node=False)  # experts per token


class ExpertsMlp(nn.Module):
    """Σ_e g_e(x) MLP_e(x) over the chosen experts e of a token, plus a shared expert if there is one.

    Fedus et al., 2021, arxiv.org/abs/2101.03961; Jiang et al., 2024, arxiv.org/abs/2401.04088, section 2.1.
    Returns (y [B, T, D], logits of the router [B, T, E] in float32).
    """

    config: DecoderConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x):
        config, moe = self.config, self.config.experts
        size = config.hidden_size
        logits = Router(moe.count, name="router")(x)
        gates, chosen = route(logits, moe.per_token, moe.normalised)
        gate_up, down = Kernels(moe.count, size, moe.width, name="experts")()
        activate = _activate(config, self.remat)
        y = mix(x, chosen, gates.astype(x.dtype), gate_up, down, activate)
        if moe.shared_width:
            shared = SharedMlp(config, moe.shared_width, self.remat, name="shared")(x)
            y = y + jax.nn.sigmoid(Dense(1, name="shared_gate")(x)) * shared
        return through_adapter(self, x, y), logits


class SharedMlp(nn.Module):
    """act(x W_gate) * (x W_up) W_down: the expert that every token passes."""

    config: DecoderConfig
    width: int
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x):
        gate, up = (Dense(self.width, name=name)(x) for name in ("gate", "up"))
        y = _activate(self.config, self.remat)(gate, up)
        return Dense(self.config.hidden_size, name="down")(y)


class Router(nn.Module):
    """x W in float32, whatever the activations' type (Zoph et al., 2022, arxiv.org/abs/2202.08906)."""

    count: int

    @nn.compact
    def __call__(self, x):
        return matmul_float32(x, read(self, "kernel", KERNEL_INIT, (x.shape[-1], self.count)))


class Kernels(nn.Module):
    """Holds the kernels of the experts: gate and up side by side [E, D, 2F], and down [E, F, D]."""

    count: int
    size: int
    width: int

    @nn.compact
    def __call__(self):
        kernel = lambda name, *shape: Kernel((self.count, *shape), name=name)()
        up = kernel("gate_up", self.size, 2 * self.width)
        return up, kernel("down", self.width, self.size)


class Kernel(nn.Module):
    """Holds one kernel."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return read(self, "kernel", KERNEL_INIT, self.shape)


def route(logits: jax.Array, per_token: int, normalised: bool) -> tuple[jax.Array, jax.Array]:
    """(gates [..., k] float32, experts [..., k]): the k largest probabilities of softmax(logits [..., E]).

    Of equal probabilities, the expert with the smaller number comes first.

    Args:
        logits: of the router.
        per_token: k.
        normalised: divide the k gates by their sum: the softmax over the chosen experts only.
    """
    gates, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), per_token)
    return gates / jnp.sum(gates, axis=-1, keepdims=True) if normalised else gates, chosen


def mix(
    x: jax.Array,
    chosen: jax.Array,
    gates: jax.Array,
    gate_up: WeightLike,
    down: WeightLike,
    activate: Callable[[jax.Array, jax.Array], jax.Array],
    exchange: Exchange | None = None,
) -> jax.Array:
    """Σ_k gates[..., k] MLP_{chosen[..., k]}(x) for x [B, T, D]; on a mesh, experts over the axis `expert`.

    Args:
        x: [B, T, D].
        chosen: [B, T, k] int32, the experts of each token.
        gates: [B, T, k].
        gate_up, down: kernels [E, D, 2F] and [E, F, D], or weights of these shapes.
        activate: (x W_gate, x W_up) -> the input of W_down.
        exchange: how rows get to their experts' devices; None: the way that moves the fewest bytes.
    """
    layout, count = expert_layout(x, gate_up.shape[0]), gate_up.shape[0]
    exchange = exchange or layout.exchange(chosen.shape[-1])
    # Before the call, so that shards are gathered in the data type of the products.
    gate_up, down = (w if is_weight(w) else w.astype(x.dtype) for w in (gate_up, down))

    def gathered(x, chosen, gates, gate_up, down):
        x, chosen, gates = map(layout.gathered, (x, chosen, gates))
        own = gate_up.shape[0]
        mine = chosen - layout.first(own)
        # Experts of other devices come last, in no group.
        mine = jnp.where((mine >= 0) & (mine < own), mine, own)
        compute = lambda rows, sizes: _experts(rows, gate_up, down, sizes[:own], activate)
        return layout.summed(_mixed(x, mine, gates, own + 1, compute))

    def exchanged(x, chosen, gates, gate_up, down):
        sent, own = chosen.size, gate_up.shape[0]
        most = sent // chosen.shape[-1] * min(chosen.shape[-1], own)

        def compute(rows, sizes):
            to = routes(sizes, layout.split, sent, most, exchange)
            rows = _experts(to.dispatched(rows), gate_up, down, to.sizes, activate)
            return checkpoint_name(to.collected(rows), EXPERT_OUTPUTS)

        return _mixed(x, chosen, gates, count, compute)

    local = gathered if exchange is None else exchanged
    return layout.mapped(local, gate_up, down)(x, chosen, gates, gate_up, down)


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


def _experts(rows, gate_up, down, sizes, activate):
    """The MLP of its expert for each row; rows after the last group become 0."""
    gate, up = jnp.split(grouped(rows, gate_up, sizes), 2, axis=-1)
    return grouped(activate(gate, up), down, sizes)


def _activate(config, remat):
    activation = ACTIVATIONS[config.activation]
    return remat_lean(lambda gate, up: activation(gate) * up, remat)


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
