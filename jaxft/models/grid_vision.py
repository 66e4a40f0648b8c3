"""The part for images of Qwen2-VL and Qwen2.5-VL: a vision transformer over patches of images of any size.

Wang et al., 2024, arxiv.org/abs/2409.12191; Bai et al., 2025, arxiv.org/abs/2502.13923, section 2.1. The
patches of all images of a row stand side by side, and each has its place in its image beside it, so that
rotary positions and windows need no reordering.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.attention import attention
from jaxft.models.blocks import Mlp
from jaxft.models.layers import KERNEL_INIT, Dense, Norm, read
from jaxft.models.remat import Remat, remat_block
from jaxft.models.rope import apply_rope
from jaxft.parallel import LAYERS
from jaxft.weights import to_dense

_WINDOWS = 1 << 16  # more than an image has


@dataclasses.dataclass(frozen=True)
class GridTower:
    """Patches of images of any size -> embeddings at the places of `token`.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads: of the transformer.
        token: the id at whose places in a text the embeddings stand.
        width: features of an embedding: the decoder's.
        full_layers: the layers in which a patch sees its whole image; in others, its window.
        window: side of a window in pixels.
        patch_size: side of a patch in pixels.
        merge: s of the s x s patches that are joined for one embedding.
        frames: images that a patch spans; a still image counts as so many equal ones.
        channels: of the images.
        theta: of the rotary positions.
        activation: of the MLPs.
        gated_mlp: whether the MLPs have a gate.
        norm: "rms" or "layer" (Qwen2-VL).
        name: of its params.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    token: int
    width: int
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    window: int = 112
    patch_size: int = 14
    merge: int = 2
    frames: int = 2
    channels: int = 3
    theta: float = 1e4
    activation: str = "silu"
    gated_mlp: bool = True
    norm: str = "rms"
    name: str = "vision"

    columns = ("patches", "places")
    mlp_bias = True  # The MLP, shared with decoders, reads it.

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"GridTower: hidden_size ({self.hidden_size}) over num_heads ({self.num_heads}) must be a "
                "multiple of 4: rotary positions turn pairs of features for rows and for columns."
            )
        if self.window < self.patch_size * self.merge:
            raise ValueError(
                f"GridTower: a window of {self.window} pixels is smaller than {self.merge} patches of "
                f"{self.patch_size}."
            )

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.hidden_size // self.num_heads

    @property
    def features(self) -> int:
        """Numbers of a patch of one image."""
        return self.channels * self.patch_size**2

    def module(self, dtype: Any, remat: Remat) -> nn.Module:
        """The module, for a decoder that has a tower of this config."""
        return GridVision(self, dtype, remat, name=self.name)

    def example(self, batch: int) -> dict[str, jax.Array]:
        """The smallest columns, for `init` and shapes."""
        shape = (batch, 1, self.merge**2)
        return {
            "patches": jnp.zeros((*shape, self.features)),
            "places": jnp.zeros((*shape, 3), jnp.int32),
        }


class GridVision(nn.Module):
    """patches [B, M, s², C p²] and places [B, M, s², 3] -> embeddings [B, M, D].

    A place is (row, column, window) of a patch in its image, each from 1; 0 is padding.
    """

    config: GridTower
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, patches: jax.Array, places: jax.Array) -> jax.Array:
        """Runs the tower; patches see those of their own image only."""
        config = self.config
        batch, blocks, joined = patches.shape[:3]
        flat = lambda x: jnp.reshape(x, (batch, blocks * joined, x.shape[-1]))
        rows, columns, windows = jnp.moveaxis(flat(jnp.asarray(places)), -1, 0)
        there = rows > 0
        image = jnp.cumsum((rows == 1) & (columns == 1), axis=1)
        whole = jnp.where(there, image, 0)
        parts = jnp.where(there, image * _WINDOWS + windows, 0)
        table = _table(config, rows - 1, columns - 1)
        x = GridPatches(config, name="patches")(flat(jnp.asarray(patches)).astype(self.dtype))
        block = remat_block(GridBlock, self.remat)
        x = GridLayers(config, block, self.remat, name=LAYERS)(x, table, whole, parts)
        x = Norm(config.norm, 1e-6, name="final_norm")(x)
        x = jnp.reshape(x, (batch, blocks, joined * config.hidden_size))
        x = Dense(joined * config.hidden_size, bias=True, name="merge")(x)
        return Dense(config.width, bias=True, name="projection")(jax.nn.gelu(x, approximate=False))


class GridPatches(nn.Module):
    """The patches of still images -> features: the kernel of `frames` equal images is summed."""

    config: GridTower

    @nn.compact
    def __call__(self, x):
        config = self.config
        area = config.patch_size**2
        shape = (config.channels * config.frames * area, config.hidden_size)
        kernel = to_dense(read(self, "kernel", KERNEL_INIT, shape)).astype(x.dtype)
        kernel = kernel.reshape(config.channels, config.frames, area, -1).sum(axis=1)
        return x @ kernel.reshape(-1, config.hidden_size)


class GridLayers(nn.Module):
    """The blocks in sequence."""

    config: GridTower
    block: Any
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, table, whole, parts):
        for i in range(self.config.num_layers):
            segments = whole if i in self.config.full_layers else parts
            x = self.block(self.config, self.remat, name=str(i))(x, table, segments)
        return x


class GridBlock(nn.Module):
    """Attention within images or windows and a gated MLP, each after a norm, with residuals."""

    config: GridTower
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x, table, segments):
        config = self.config
        norm = functools.partial(Norm, config.norm, 1e-6)
        x = x + GridAttention(config, name="attention")(
            norm(name="attention_norm")(x), table, segments
        )
        return x + Mlp(config, self.remat, name="mlp")(norm(name="mlp_norm")(x))


class GridAttention(nn.Module):
    """Attention in both directions with rotary positions of rows and columns."""

    config: GridTower

    @nn.compact
    def __call__(self, x, table, segments):
        config = self.config
        dense = functools.partial(Dense, config.hidden_size, bias=True)
        split = lambda y: y.reshape(*y.shape[:-1], config.num_heads, config.head_dim)
        query, key, value = (split(dense(name=name)(x)) for name in ("query", "key", "value"))
        query, key = apply_rope(query, table), apply_rope(key, table)
        y = attention(query, key, value, segment_ids=segments, causal=False)
        return dense(name="out")(y.reshape(x.shape))


def _table(config, rows, columns):
    """(cos, sin) [B, P, 1, K/2]: a quarter of a head's features turns by the row, a quarter by the column."""
    half = config.head_dim // 2
    frequencies = config.theta ** -(np.arange(0, half, 2, dtype=np.float64) / half)
    frequencies = jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, -1)
    turn = lambda places: places[..., None, None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([turn(rows), turn(columns)], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)
