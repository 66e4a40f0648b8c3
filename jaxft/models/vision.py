"""The part of a decoder that reads images: a vision transformer and a projection of its patches."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.models.encoder import Encoder, EncoderConfig
from jaxft.models.layers import ACTIVATIONS, Dense
from jaxft.models.remat import Remat


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """Images of one size -> embeddings at the places of `token`.

    Attributes:
        encoder: of the patches.
        token: the id at whose places in a text the embeddings stand.
        width: features of an embedding: the decoder's.
        shuffle: s of the s x s patches, side by side, whose features are joined for one embedding.
        bias: whether the projection has one.
        states: the outputs of the encoder's layers that are joined, from 1; 0 is the input of the first, and
            negative numbers count from the end. (): that of the last, after the last norm.
        class_token: whether the class token of the encoder gets an embedding too, before the patches.
        projector: the activation between two linear layers of the projection; "": it has one.
        scale: factor of the embeddings.
        name: of its params.
    """

    encoder: EncoderConfig
    token: int
    width: int
    shuffle: int = 1
    bias: bool = False
    states: tuple[int, ...] = ()
    class_token: bool = False
    projector: str = ""
    scale: float = 1.0
    name: str = "vision"

    columns = ("images",)

    def __post_init__(self):
        side = self.encoder.image_size // self.encoder.patch_size
        if side % self.shuffle:
            raise ValueError(
                f"VisionTower: {side} patches a side are not a multiple of the shuffle {self.shuffle}."
            )
        count = self.encoder.num_layers + 1
        if any(not -count <= i < count for i in self.states):
            raise ValueError(
                f"VisionTower: the encoder has the outputs -{count} to {count - 1}, not all of {self.states}."
            )
        if self.class_token and (not self.encoder.class_token or self.shuffle > 1):
            raise ValueError(
                "VisionTower: an embedding of the class token needs an encoder that has one, and no shuffle."
            )

    @property
    def tokens(self) -> int:
        """Embeddings of one image."""
        side = self.encoder.image_size // self.encoder.patch_size // self.shuffle
        return side**2 + self.class_token

    def module(self, dtype: Any, remat: Remat) -> nn.Module:
        """The module, for a decoder that has a tower of this config."""
        return Vision(self, dtype, remat, name=self.name)

    def example(self, batch: int) -> dict[str, jax.Array]:
        """The smallest columns, for `init` and shapes."""
        side, channels = self.encoder.image_size, self.encoder.channels
        return {"images": jnp.zeros((batch, 1, side, side, channels))}


class Vision(nn.Module):
    """images [B, M, H, W, C] -> embeddings [B, M x tokens, D]."""

    config: VisionTower
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Runs the tower on every image by itself; each token of a row gets an embedding of that row."""
        config = self.config
        batch, count, *shape = images.shape
        encoder = Encoder(config.encoder, self.dtype, remat=self.remat, name="encoder")
        found = encoder(jnp.reshape(images, (batch * count, *shape)))
        # Under jit, later layers are not computed.
        states = [found.states[i] for i in config.states] or [found.hidden]
        x = jnp.concatenate(states, axis=-1)
        if config.encoder.class_token and not config.class_token:
            x = x[:, 1:]
        x = pixel_shuffle(x, config.shuffle)
        if config.projector:
            x = ACTIVATIONS[config.projector](Dense(config.width, config.bias, name="up")(x))
        x = Dense(config.width, bias=config.bias, name="projection")(x)
        return jnp.reshape(x, (batch, count * config.tokens, config.width)) * config.scale


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """[B, h w, D] -> [B, h w / s², D s²]: the features of s x s neighbours joined, row by row.

    Laurençon et al., 2024, arxiv.org/abs/2408.12637, section 3.1. h = w.
    """
    if factor == 1:
        return x
    batch, count, width = x.shape
    side = round(count**0.5)
    new = side // factor
    x = x.reshape(batch, new, factor, new, factor, width).swapaxes(2, 3)
    return x.reshape(batch, new * new, factor * factor * width)


def put_embeddings(x: jax.Array, tokens: jax.Array, token: int, embeddings: jax.Array) -> jax.Array:
    """x [B, T, D] with a row's k-th embedding [B, K, D] at its k-th place of `token`; NaN without one."""
    here = tokens == token
    place = jnp.cumsum(here, axis=1) - 1
    count = embeddings.shape[1]
    put = jnp.take_along_axis(embeddings, jnp.clip(place, 0, count - 1)[..., None], axis=1)
    put = jnp.where((place < count)[..., None], put, jnp.nan)
    return jnp.where(here[..., None], put.astype(x.dtype), x)
