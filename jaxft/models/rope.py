"""Rotary position embeddings: Su et al., 2021, arxiv.org/abs/2104.09864, in the half-split layout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.config import Rope, yarn_attention_factor


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies [K/2] in radians a token, after the context-length rescaling."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.factors:
        return frequencies / np.asarray(rope.factors)
    if rope.scaling == "default":
        return frequencies
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, frequencies)
    if rope.scaling == "yarn":
        return _yarn(rope, frequencies, head_dim)
    raise ValueError(
        f"rope: unknown scaling {rope.scaling!r}; known: default, linear, llama3, yarn."
    )


def rope_table(rope: Rope, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [B, T, 1, K/2] in float32 for positions [B, T]."""
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim), jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape(1, 1, 1, -1)
    factor = yarn_attention_factor(rope) if rope.scaling == "yarn" else 1.0
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + K/2}) of x [B, T, H, K] by their position's angles."""
    cos, sin = (part.astype(x.dtype) for part in table)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, with a ramp in between."""
    wavelengths = 2 * math.pi / frequencies
    low = rope.original_max_length / rope.low_freq_factor
    high = rope.original_max_length / rope.high_freq_factor
    ramp = (rope.original_max_length / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - ramp) * frequencies / rope.factor + ramp * frequencies
    stretched = np.where(wavelengths > low, frequencies / rope.factor, frequencies)
    return np.where((wavelengths <= low) & (wavelengths >= high), blended, stretched)


def _yarn(rope: Rope, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN: interpolates pairs with fewer than beta_slow turns over the context, keeps the fast ones.

    Peng et al., 2023, arxiv.org/abs/2309.00071, section 3.2 ("NTK-by-parts").
    """

    def dimension(rotations):  # the one with `rotations` turns over the context
        full_turns = rope.original_max_length / (rotations * 2 * math.pi)
        return head_dim * math.log(full_turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = max(high - low, 0.001)
    keep = 1 - np.clip((np.arange(head_dim // 2) - low) / span, 0, 1)
    return frequencies / rope.factor * (1 - keep) + frequencies * keep
