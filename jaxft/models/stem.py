"""The beginning of an encoder of sound: log-mel features to the inputs of its first layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxft.models.layers import ACTIVATIONS, KERNEL_INIT, read
from jaxft.weights import conv, scaled_bias, to_dense

FRAMES = 2  # of the features for each position of the encoder


class Stem(nn.Module):
    """Two convolutions over three frames: [B, frames, mel] -> [B, (frames + 1) // 2, features]."""

    features: int

    @nn.compact
    def __call__(self, x):
        gelu = ACTIVATIONS["gelu"]  # whatever the layers' activation is
        x = gelu(Convolution(self.features, name="conv1")(x))
        return gelu(Convolution(self.features, FRAMES, name="conv2")(x))


class Convolution(nn.Module):
    """x * W + b over three places of x [B, places, in]; places outside are 0."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        kernel = read(self, "kernel", KERNEL_INIT, (3, x.shape[-1], self.features))
        y = conv(x, kernel, strides=self.stride, padding=[(1, 1)])
        bias = to_dense(read(self, "bias", nn.initializers.zeros, (self.features,)))
        return y + scaled_bias(bias, kernel).astype(y.dtype).reshape(1, 1, -1)


class Sinusoids(nn.Module):
    """Rows of a stored table of sines, which does not train."""

    rows: int
    features: int

    @nn.compact
    def __call__(self, positions, dtype: Any = jnp.float32):
        init = lambda key, shape, dtype: jnp.asarray(timescales(*shape), dtype)
        table = to_dense(read(self, "embedding", init, (self.rows, self.features)))
        table = jax.lax.stop_gradient(table)
        return jnp.take(table, positions, axis=0, mode="fill").astype(dtype)


def timescales(length: int, size: int) -> np.ndarray:
    """[length, size] float32: sines of pos / 10000^(i / (size / 2 - 1)), then their cosines.

    The last timescale is 10000 itself, other than in `encoder_decoder.sinusoids`: Whisper's `sinusoids`.
    """
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(size // 2) / (size // 2 - 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
