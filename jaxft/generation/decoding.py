"""Decoding rules: what is sampled from, given logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to sample. Rules apply in the order temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # keep the k likeliest tokens (and ties with the k-th)
    top_p: float | None = None  # keep the likeliest tokens up to this mass
    min_p: float | None = None  # keep tokens at least this fraction as likely as the likeliest
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion; they are part of it
    stop_strings: tuple[str, ...] = ()  # text that ends it; looked for between chunks

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (greedy), got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; None turns it off.")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {value}; None turns it off.")
        if self.temperature == 0 and any(
            v is not None for v in (self.top_k, self.top_p, self.min_p)
        ):
            raise ValueError(
                "temperature=0 is greedy and takes the likeliest token; drop top_k, top_p and min_p "
                "or set a temperature."
            )


def transform_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits [..., V] of the distribution that is sampled from: float32, -inf where cut off.

    The likeliest token always survives. Nothing is sorted unless a rule needs it.
    """
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        chosen = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) == best
        return jnp.where(chosen, 0.0, -jnp.inf)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if config.top_p is not None and config.top_p < 1:
        logits = _top_p(logits, config.top_p)
    if config.min_p is not None and config.min_p > 0:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(config.min_p), -jnp.inf, logits)
    return logits


def _top_p(logits, top_p):
    """Keeps token i, in falling order, iff the mass before it is less than top_p."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    sorted_probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
    # The first always stays, also for top_p = 0.
    keep = (before < top_p).at[..., 0].set(True)
    ranks = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(keep, ranks, axis=-1), logits, -jnp.inf)
