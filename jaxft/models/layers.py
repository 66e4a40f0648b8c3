"""The layers of transformers. Each reads its kernels through `matmul` and `take`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.weights import Transposed, WeightLike, matmul, scaled_bias, take, to_dense

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

KERNEL_INIT = nn.initializers.normal(0.02)


def read(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> WeightLike:
    """The variable `name` of a module as stored in params; at init, a dense float32 array.

    `module.param` by itself rejects a structured weight whose first leaf has another shape.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, jnp.float32)


class Dense(nn.Module):
    """x W + b for x [..., in]."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = read(self, "kernel", KERNEL_INIT, (x.shape[-1], self.features))
        y = matmul(x, kernel)
        if self.bias:
            bias = to_dense(read(self, "bias", nn.initializers.zeros, (self.features,)))
            bias = scaled_bias(bias, kernel)
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def through_adapter(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """The output y of a sublayer for its input x, changed by the variable "adapter" if it is in params."""
    if not module.has_variable("params", "adapter"):
        return y
    return module.get_variable("params", "adapter")(x, y)


class Norm(nn.Module):
    """RMSNorm ("rms") or LayerNorm ("layer") over the last axis, computed in float32."""

    kind: str = "rms"
    eps: float = 1e-5
    offset: float = 0.0  # added to the scale: 1 for Gemma
    factor: float = 1.0  # of the result

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        constant = nn.initializers.constant(1.0 - self.offset)
        scale = to_dense(read(self, "scale", constant, shape)).astype(jnp.float32) + self.offset
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = unit_rms(y, self.eps)
        flat = lambda v: self.factor * v.reshape((1,) * (y.ndim - 1) + (-1,))
        y = y * flat(scale)
        if self.kind == "layer":
            bias = read(self, "bias", nn.initializers.zeros, shape)
            y = y + flat(to_dense(bias).astype(jnp.float32))
        return y.astype(x.dtype)


def unit_rms(x: jax.Array, eps: float) -> jax.Array:
    """x [..., K] divided by the root mean square of its last axis, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class Embed(nn.Module):
    """Rows of a table [num_embeddings, features]."""

    num_embeddings: int
    features: int

    @nn.compact
    def __call__(self, indices, dtype: Any = jnp.float32):
        shape = (self.num_embeddings, self.features)
        return take(read(self, "embedding", KERNEL_INIT, shape), indices).astype(dtype)


def output_head(params, tied: bool) -> WeightLike:
    """The output projection [features, vocabulary] of a params tree as a weight."""
    return Transposed(params["embed"]["embedding"]) if tied else params["head"]["kernel"]
