"""Multi-head latent attention: DeepSeek-V2, 2024, arxiv.org/abs/2405.04434, section 2.1."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from jaxft.kernels.attention import attend_cache
from jaxft.models.cache import write
from jaxft.models.config import DecoderConfig, Latent
from jaxft.models.context import layer_table
from jaxft.models.experts import Kernel
from jaxft.models.layers import Dense, Norm, through_adapter
from jaxft.models.remat import Remat, remat_lean
from jaxft.models.rope import apply_rope, halves
from jaxft.weights import matmul, to_dense

_EPS = 1e-6  # of both norms, whatever the other norms have, as in transformers


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are projected from one latent vector of each token.

    A cache holds the normed latent and the rotated key that all heads share, twice: as keys and as values
    of one head, which `attend_cache` multiplies without a transposition. The products of the latent with the
    heads' projections then move to the queries and to the output (section 2.1.2, "absorbed").
    """

    config: DecoderConfig
    remat: Remat = "none"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, layer, own, cached, context):
        config, latent = self.config, self.config.latent
        if own.prefix is not None:
            raise ValueError(
                "a prefix holds keys and values of heads, but latent attention projects them from one "
                "latent; use a prompt or LoRA."
            )
        plain, turned, states, key = self._projected(x, layer, context)
        expanded = config.num_heads * (latent.plain + latent.value)
        kernel, _ = Kernel((latent.rank, expanded), name="latent_up")()
        # At init any implementation works, but a kernel may not run on the device that makes the params.
        implementation = None if self.is_initializing() else self.implementation

        def among_tokens(plain, turned, states, key):
            heads = _heads(latent, plain, turned, matmul(states, kernel), key)
            y = context.attend(
                *heads, window=None, implementation=implementation, scale=config.scale
            )
            return y[..., : latent.value]

        if cached is None:
            y = remat_lean(among_tokens, self.remat)(plain, turned, states, key)
        else:
            both = jnp.concatenate([states[..., None, :], key], axis=-1)
            cached = write(cached, both, both, 0 if context.start is None else context.start)
            if context.start is None:
                y = among_tokens(plain, turned, states, key)
            else:
                y = self._absorbed(plain, turned, to_dense(kernel), cached, context)
        y = Dense(config.hidden_size, config.output_bias, name="out")(y.reshape(*x.shape[:-1], -1))
        return through_adapter(self, x, y), cached, None

    def _projected(self, x, layer, context):
        """Queries without and with positions [B, T, H, ...], latents [B, T, R], keys [B, T, 1, ...]."""
        config, latent = self.config, self.config.latent
        norm = functools.partial(remat_lean(Norm, self.remat), "rms", _EPS)
        biased = functools.partial(Dense, bias=config.attention_bias)
        width = config.num_heads * latent.size
        if latent.query_rank is None:
            query = Dense(width, name="query")(x)
        else:
            query = biased(latent.query_rank, name="query_down")(x)
            query = Dense(width, name="query_up")(norm(name="query_norm")(query))
        both = biased(latent.rank + latent.turned, name="latent")(x)
        states, key = jnp.split(both, [latent.rank], axis=-1)
        states = norm(name="latent_norm")(states)
        query = query.reshape(*x.shape[:-1], config.num_heads, latent.size)
        plain, turned = jnp.split(query, [latent.plain], axis=-1)
        key, table = key[..., None, :], layer_table(config, layer, context)
        if latent.interleaved:  # both alike, so that their products are those of the files' order
            turned, key = halves(turned), halves(key)
        return plain, apply_rope(turned, table), states, apply_rope(key, table)

    def _absorbed(self, plain, turned, kernel, cached, context):
        latent = self.config.latent
        kernel = kernel.astype(plain.dtype).reshape(latent.rank, self.config.num_heads, -1)
        up_key, up_value = jnp.split(kernel, [latent.plain], axis=-1)
        query = jnp.einsum("bthk,rhk->bthr", plain, up_key)
        query = jnp.concatenate([query, turned], axis=-1)
        stored = (c.astype(query.dtype) for c in cached)
        y = attend_cache(query, *stored, context.visible(None), scale=self.config.scale)
        return jnp.einsum("bthr,rhk->bthk", y[..., : latent.rank], up_value)


def _heads(latent: Latent, plain, turned, expanded, key):
    """Queries, keys and values [B, T, H, K]; the narrower of keys and values are padded with zeros."""
    expanded = expanded.reshape(*plain.shape[:-1], latent.plain + latent.value)
    plain_key, value = jnp.split(expanded, [latent.plain], axis=-1)
    key = jnp.broadcast_to(key, turned.shape)
    heads = [jnp.concatenate(p, axis=-1) for p in ((plain, turned), (plain_key, key))] + [value]
    width = max(latent.size, latent.value)
    fit = lambda y: jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, width - y.shape[-1])])
    return map(fit, heads)
