"""Rotary position embeddings: Su et al., 2021, arxiv.org/abs/2104.09864, in the half-split layout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.config import Rope


def turned(rope: Rope, head_dim: int) -> int:
    """The number of features of a head that turn, by angles that may be 0."""
    return head_dim if rope.scaling == "proportional" else int(head_dim * rope.share)


def rope_frequencies(rope: Rope, head_dim: int, length: int = 0) -> np.ndarray:
    """Angular frequencies [R/2] in radians a token, after the context-length rescaling.

    Args:
        rope: the rotary positions; R = `turned(rope, head_dim)` features turn.
        head_dim: features of a head.
        length: of the text, on which the frequencies of "dynamic" and "longrope" depend.
    """
    size = turned(rope, head_dim)
    frequencies = rope.theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    if rope.long_factors and length > rope.original_max_length:
        return frequencies / np.asarray(rope.long_factors)
    if rope.factors:
        return frequencies / np.asarray(rope.factors)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "dynamic":
        grown = max(1.0, rope.factor * length / rope.original_max_length - (rope.factor - 1))
        return frequencies * grown ** -_ntk_exponents(size)
    if rope.scaling == "llama3":
        return _llama3(rope, frequencies)
    if rope.scaling == "yarn":
        return _yarn(rope, frequencies, size)
    if rope.scaling == "proportional":
        turning = np.arange(size // 2) < int(rope.share * size // 2)
        return np.where(turning, frequencies / rope.factor, 0.0)
    return frequencies


def rope_table(
    rope: Rope, head_dim: int, positions: jax.Array, lengths: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [B, T, 1, R/2] in float32 for positions [B, T], or [3, B, T] if the rope has `sections`.

    `lengths`, [B, T] or one for all, is the length of each token's text: see `text_lengths`. It has an effect
    on scalings with `Rope.by_length`.
    """
    frequencies = _frequencies(rope, head_dim, lengths)
    if rope.sections:
        axis = np.repeat(np.arange(3), rope.sections)
        turns = jnp.moveaxis(positions[axis], 0, -1)[:, :, None]  # [B, T, 1, R/2]
    else:
        turns = positions[..., None, None]
    angles = turns.astype(jnp.float32) * frequencies
    factor = attention_factor(rope)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def text_lengths(positions: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """[B, T]: for each token, the largest position of its segment plus 1.

    So a packed text has the same frequencies as in a separate row. transformers takes the largest position
    of the batch.
    """
    if segment_ids is None:
        return jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)

    def of_row(positions, ids):
        # Runs of one id: ids themselves may be any integers.
        runs = jnp.cumsum(ids != jnp.roll(ids, 1)) % len(ids)
        return jax.ops.segment_max(positions, runs, len(ids))[runs] + 1

    return jax.vmap(of_row)(positions, segment_ids)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + R/2}) of x [B, T, H, K] by their position's angles; R <= K."""
    cos, sin = (part.astype(x.dtype) for part in table)
    size = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :size], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(parts if size == x.shape[-1] else [*parts, x[..., size:]], axis=-1)


def halves(x: jax.Array) -> jax.Array:
    """x [..., R] in the order that `apply_rope` turns: (x_0, x_2, ..., x_1, x_3, ...)."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def _frequencies(rope, head_dim, lengths):
    """[1, 1, 1, R/2], or [B, T, 1, R/2] if they differ by text."""
    constant = lambda length: jnp.asarray(
        rope_frequencies(rope, head_dim, length), jnp.float32
    ).reshape(1, 1, 1, -1)
    if isinstance(lengths, int) or not rope.by_length:
        return constant(lengths if isinstance(lengths, int) else 0)
    lengths, plain = lengths[..., None, None], constant(0)
    if rope.scaling == "longrope":
        return jnp.where(
            lengths > rope.original_max_length, constant(rope.original_max_length + 1), plain
        )
    grown = rope.factor * lengths / rope.original_max_length - (rope.factor - 1)
    exponents = jnp.asarray(_ntk_exponents(turned(rope, head_dim)), jnp.float32)
    return plain * jnp.maximum(grown, 1.0) ** -exponents.reshape(1, 1, 1, -1)


def _ntk_exponents(size):
    """The base theta grows by g^(R / (R - 2)), so frequency i by g^(-2i / (R - 2))."""
    return np.arange(0, size, 2, dtype=np.float64) / (size - 2)


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


def attention_factor(rope: Rope) -> float:
    """Factor of the cosines and sines under YaRN and LongRoPE, 1 otherwise.

    By default 0.1 ln s + 1 (YaRN, Peng et al., 2023, arxiv.org/abs/2309.00071) and sqrt(1 + ln s / ln L)
    (LongRoPE, Ding et al., 2024, arxiv.org/abs/2402.13753), s = factor, L = original_max_length.
    """
    if rope.scaling not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.scaling == "yarn":
        return 0.1 * math.log(rope.factor) + 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_length))
