"""The keys and values of prefix tuning, reparameterised by a small network."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxft.weights.base import Weight, along_last


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefixMlp(Weight):
    """tanh(E W1 + b1) W2 + b2: a prefix [l, N], N = layers x 2 x KV heads x head size.

    Prefix tuning: Li & Liang, 2021, arxiv.org/abs/2101.00190, section 4.3. It trains more stably
    than the prefix itself; `to_dense`, and so `merge`, folds the network in.
    """

    embedding: jax.Array  # E [l, D]
    hidden_kernel: jax.Array  # W1 [D, M]
    hidden_bias: jax.Array  # b1 [M]
    out_kernel: jax.Array  # W2 [M, N]
    out_bias: jax.Array  # b2 [N]

    @property
    def shape(self):
        return self.embedding.shape[0], self.out_bias.shape[0]

    @property
    def dtype(self):
        return self.out_bias.dtype

    def rmatmul(self, x):
        return x @ self.to_dense().astype(x.dtype)

    def to_dense(self):
        hidden = self.embedding @ self.hidden_kernel
        hidden = jnp.tanh(hidden + along_last(self.hidden_bias, hidden))
        out = hidden @ self.out_kernel
        return out + along_last(self.out_bias, out)

    def with_specs(self, spec):
        _, columns = (*spec, None, None)[:2]
        whole = PartitionSpec()
        return PrefixMlp(whole, whole, whole, PartitionSpec(None, columns), PartitionSpec(columns))


def prefix_mlp(key: jax.Array, shape: tuple[int, int], features: int, hidden: int) -> PrefixMlp:
    """A PrefixMlp for a prefix of `shape`, initialised as in PEFT: E normal, kernels ±1/sqrt(in).

    Raises:
        ValueError: for a hidden size below 1.
    """
    if hidden < 1:
        raise ValueError(f"prefix: hidden must be at least 1, got {hidden}; 512 is usual.")
    keys = jax.random.split(key, 3)
    uniform = lambda key, rows, columns: jax.random.uniform(
        key, (rows, columns), jnp.float32, -(rows**-0.5), rows**-0.5
    )
    return PrefixMlp(
        jax.random.normal(keys[0], (shape[0], features)),
        uniform(keys[1], features, hidden),
        jnp.zeros(hidden),
        uniform(keys[2], hidden, shape[1]),
        jnp.zeros(shape[1]),
    )
