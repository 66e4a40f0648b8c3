"""Gated DeltaNet layers: Yang et al., 2024, arxiv.org/abs/2412.06464, as in Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.kernels.delta_rule import gated_delta_rule
from jaxft.models.cache import Memory
from jaxft.models.config import DecoderConfig, Delta
from jaxft.models.layers import ACTIVATIONS, KERNEL_INIT, Dense, Norm, read, through_adapter
from jaxft.models.remat import Remat, remat_lean
from jaxft.models.soft import Lead
from jaxft.parallel.axes import length_axes
from jaxft.weights import along_last, to_dense

_EPS = 1e-6  # of the unit length of queries and keys, as in transformers


class DeltaAttention(nn.Module):
    """A layer's mixing of tokens by a state [H, K, F]: `jaxft.kernels.delta_rule`.

    Queries, keys and values pass a causal convolution over a few tokens, channel by channel, and the
    activation; queries and keys have unit length. β = σ(b), and g = -exp(a_log) softplus(a + dt_bias).
    The outputs of each head are normed and multiplied by silu(z). b, a and z are projections of x.

    State and convolution begin anew at each run of one segment id. Padding leaves both as they were; without
    a cache, tokens after padding are another text. The arguments are those of `Attention`, of which `layer`
    and `own` are not used (`check_lead` refuses virtual tokens); the layer's part of a cache is a `Memory`.
    """

    config: DecoderConfig
    remat: Remat = "none"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, layer, own, cached, context):
        config, delta = self.config, self.config.delta
        if length_axes(x.shape[1]):
            raise ValueError(
                "Gated DeltaNet needs all tokens of a row on one device; use a mesh without 'context'."
            )
        states, z, b, a = self._projected(x)
        shape = delta.taps, 1, states.shape[-1]  # one filter for each channel
        taps = to_dense(read(self, "convolution", KERNEL_INIT, shape))[:, 0]
        vector = lambda name: read(self, name, nn.initializers.zeros, (delta.value_heads,))
        a_log, dt_bias = (
            to_dense(vector(name)).astype(jnp.float32) for name in ("a_log", "dt_bias")
        )
        ids = context.segment_ids
        valid = None if ids is None else ids > 0
        texts = None if ids is None or cached is not None else _texts(ids)
        activation = ACTIVATIONS[config.activation]

        def mix(states, b, a, taps, a_log, dt_bias, memory):
            window = None
            if memory is None:
                states = convolved(states, taps, texts)
            else:
                states, window = convolved_after(memory.window, states, taps, valid)
            heads = _heads(delta, activation(states))
            beta = jax.nn.sigmoid(b.astype(jnp.float32))
            rate = a.astype(jnp.float32) + along_last(dt_bias, a)
            decay = along_last(-jnp.exp(a_log), a) * jax.nn.softplus(rate)
            if valid is not None:  # padding changes no state
                beta, decay = (jnp.where(valid[..., None], v, 0.0) for v in (beta, decay))
            state = None if memory is None else memory.state
            y, state = gated_delta_rule(*heads, decay, beta, state, texts=texts)
            return y, None if memory is None else Memory(window, state)

        y, cached = remat_lean(mix, self.remat)(states, b, a, taps, a_log, dt_bias, cached)
        y = remat_lean(Norm, self.remat)("rms", config.norm_eps, name="norm")(y)
        gated = lambda y, z: (y * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
        y = remat_lean(gated, self.remat)(y.reshape(z.shape), z)
        y = Dense(config.hidden_size, name="out")(y)
        return through_adapter(self, x, y), cached, None

    def _projected(self, x):
        """(queries, keys and values side by side [B, T, C], z [B, T, H F], b and a [B, T, H])."""
        delta, flat = self.config.delta, lambda y: y.reshape(*x.shape[:-1], -1)
        width, heads = sum(delta.widths), delta.value_heads
        if not delta.joined:
            sizes = {"mixed": width, "gate": delta.widths[-1], "beta": heads, "decay": heads}
            return tuple(Dense(size, name=name)(x) for name, size in sizes.items())
        grouped = lambda y: y.reshape(*x.shape[:-1], delta.key_heads, -1)
        mixed = grouped(Dense(width + delta.widths[-1], name="mixed")(x))
        b, a = jnp.split(grouped(Dense(2 * heads, name="rates")(x)), 2, axis=-1)
        ends = [delta.key_size, 2 * delta.key_size, mixed.shape[-1] // 2 + delta.key_size]
        *states, z = map(flat, jnp.split(mixed, ends, axis=-1))
        return jnp.concatenate(states, axis=-1), z, flat(b), flat(a)


def convolved(
    x: jax.Array, taps: jax.Array, texts: jax.Array | None = None, window: jax.Array | None = None
) -> jax.Array:
    """y_t = Σ_i taps_i x_(t - n + 1 + i), channel by channel, over the tokens of t's text.

    Args:
        x: [B, T, C].
        taps: [n, C]; the last one is the token's own.
        texts: [B, T], numbers that rise from 0; None: one text.
        window: [B, n - 1, C], the inputs before; None: zeros.
    """
    (count, _), length = taps.shape, x.shape[1]
    front = ((0, 0), (count - 1, 0))
    x = (
        jnp.pad(x, (*front, (0, 0)))
        if window is None
        else jnp.concatenate([window.astype(x.dtype), x], axis=1)
    )
    earlier = None if texts is None else jnp.pad(texts, front)
    y = 0.0
    for i in range(count):
        part = x[:, i : i + length].astype(jnp.float32) * along_last(taps[i], x)
        if texts is not None and i < count - 1:
            part = jnp.where((earlier[:, i : i + length] == texts)[..., None], part, 0.0)
        y = y + part
    return y.astype(x.dtype)


def convolved_after(
    window: jax.Array, x: jax.Array, taps: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(`convolved` of tokens after those of `window`, the window of the last inputs).

    Padding, where `valid` [B, T] is False, is left out, wherever it is; its own outputs mean nothing.
    """
    size, length = window.shape[1], x.shape[1]
    end = lambda x: x[:, x.shape[1] - size :].astype(window.dtype)
    if valid is None or length == 1:
        y, last = convolved(x, taps, window=window), end(jnp.concatenate([window, x], axis=1))
        return y, last if valid is None else jnp.where(valid[..., None], last, window)
    # Padding first, in order, then the window and the tokens.
    there = jnp.pad(valid, ((0, 0), (size, 0)), constant_values=True)
    order = jnp.argsort(there, axis=1, stable=True)
    places = jnp.argsort(order, axis=1)[:, size:]
    whole = jnp.concatenate([window.astype(x.dtype), x], axis=1)
    whole = jnp.take_along_axis(whole, order[..., None], axis=1)
    y = convolved(whole, taps)
    return jnp.take_along_axis(y, places[..., None], axis=1), end(whole)


def empty_memories(delta: Delta | None, layers: int, batch: int, dtype: Any) -> tuple[Memory, ...]:
    """The memories of `layers` layers before any token, for `batch` rows; windows have type `dtype`."""
    if delta is None:
        return ()
    window = batch, delta.taps - 1, sum(delta.widths)
    state = batch, delta.value_heads, delta.key_size, delta.value_size
    return tuple(Memory(jnp.zeros(window, dtype), jnp.zeros(state)) for _ in range(layers))


def check_lead(lead: Lead) -> None:
    """Raises ValueError for virtual tokens, which the segments of a row share and a state cannot."""
    if lead.length:
        raise ValueError(
            "a prompt or prefix is shared by all texts of a row, but layers of Gated DeltaNet begin each "
            "text with a state of zeros; use LoRA or bottleneck adapters."
        )


def _texts(ids):
    """[B, T]: the number of each token's run of one segment id, from 0."""
    starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def _heads(delta: Delta, states):
    """Queries, keys [B, T, H, K] and values [B, T, H, F] of the value heads."""
    query, key, _ = delta.widths
    *parts, value = jnp.split(states, [query, query + key], axis=-1)
    split = lambda y, size: y.reshape(*y.shape[:-1], -1, size)
    times = delta.value_heads // delta.key_heads
    query, key = (jnp.repeat(_unit(split(y, delta.key_size)), times, axis=2) for y in parts)
    return query * delta.key_size**-0.5, key, split(value, delta.value_size)


def _unit(x):
    """x [..., K] with unit length, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _EPS)
