"""The sixteen values of 4-bit NormalFloat."""

import jax
import jax.numpy as jnp
import numpy as np

# Quantiles of the normal distribution, including 0 (QLoRA, appendix E).
NF4_LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32,
)  # fmt: skip


def nf4_level(codes: jax.Array) -> jax.Array:
    """NF4_LEVELS[codes] by a tree of selections: a table look-up is 10 times as slow on a TPU."""
    levels = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in (1, 2, 4, 8):
        chosen = (codes & bit) != 0
        pairs = zip(levels[::2], levels[1::2], strict=True)
        levels = [jnp.where(chosen, high, low) for low, high in pairs]
    return levels[0]
