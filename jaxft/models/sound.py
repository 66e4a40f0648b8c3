"""The part of a decoder that hears: Whisper's encoder, its positions averaged in pairs, and a projection."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.models.encoder_decoder_config import StackConfig
from jaxft.models.encoder_decoder_layers import Context, Stack
from jaxft.models.layers import Dense, Norm
from jaxft.models.remat import Remat
from jaxft.models.stem import FRAMES, Sinusoids, Stem
from jaxft.parallel import LAYERS

POOLED = 2  # positions of the encoder for each embedding


@dataclasses.dataclass(frozen=True)
class SoundTower:
    """Clips -> embeddings at the places of `token`, one for each four frames of a clip.

    Attributes:
        encoder: the layers.
        mel: log-mel features of a frame.
        places: positions of the encoder, one for each two frames of its window.
        token: the id at whose places in a text the embeddings stand.
        width: features of an embedding: the decoder's.
        name: of its params.
    """

    encoder: StackConfig
    mel: int
    places: int
    token: int
    width: int
    name: str = "audio"

    columns = ("audio", "audio_frames")

    def module(self, dtype: Any, remat: Remat) -> nn.Module:
        """The module, for a decoder that has a tower of this config."""
        return Hearing(self, dtype, remat, name=self.name)

    def example(self, batch: int) -> dict[str, jax.Array]:
        """The smallest columns, for `init` and shapes."""
        frames = FRAMES * POOLED
        sound = jnp.zeros((batch, 1, frames, self.mel))
        return {"audio": sound, "audio_frames": jnp.full((batch, 1), frames, jnp.int32)}


class Hearing(nn.Module):
    """(audio [B, M, frames, mel], audio_frames [B, M]) -> embeddings [B, K, D], of clips first."""

    config: SoundTower
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(self, audio: jax.Array, audio_frames: jax.Array) -> jax.Array:
        """Runs the tower on every clip by itself, of which it hears the first `audio_frames` frames."""
        config, width = self.config, self.config.encoder.hidden_size
        batch, clips, frames, mel = audio.shape
        if mel != config.mel or frames > FRAMES * config.places:
            raise ValueError(
                f"the column 'audio' is {audio.shape}, expected log-mel features [B, clips, frames, "
                f"{config.mel}] of at most {FRAMES * config.places} frames; make them with data.LogMel."
            )
        sound = jnp.reshape(audio, (batch * clips, frames, mel)).astype(self.dtype)
        x = Stem(width, name="stem")(sound)
        places = jnp.arange(x.shape[1])
        x = x + Sinusoids(config.places, width, name="positions")(places[None], x.dtype)
        heard = (jnp.reshape(audio_frames, (-1, 1)) + 1) // FRAMES
        mask = (places[None] < heard).astype(jnp.int32)
        x = Stack(config.encoder, False, self.remat, name=LAYERS)(x, Context(mask), (), ())[0]
        count = x.shape[1] // POOLED
        x = jnp.reshape(x[:, : POOLED * count], (-1, count, POOLED, width)).mean(axis=2)
        x = Norm("layer", config.encoder.norm_eps, name="final_norm")(x)
        x = Dense(config.width, bias=True, name="projection")(x)
        there = jnp.arange(count)[None] < heard // POOLED
        # A row's text has the embeddings of its clips one after the other, without those of silence.
        order = jnp.argsort(~jnp.reshape(there, (batch, -1)), axis=1, stable=True)
        x = jnp.reshape(x, (batch, clips * count, -1))
        return jnp.take_along_axis(x, order[..., None], axis=1)


def embeddings_of(frames: int) -> int:
    """The number of embeddings of a clip of so many frames."""
    return (frames + 1) // FRAMES // POOLED
