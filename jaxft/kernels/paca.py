"""The few inputs that partial connection adaptation keeps for its gradient."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal["gather", "product"]


def chosen_columns(
    x: jax.Array, indices: jax.Array, *, implementation: Implementation | None = None
) -> jax.Array:
    """x[..., indices], [..., R] of x [..., D].

    Args:
        x: inputs.
        indices: [R], in 0..D - 1.
        implementation: "gather": by address. "product": x times R columns of the unit matrix, equal bit
            for bit where x is finite; a TPU gathers along lanes one by one, and by its compiler's
            estimate spends 20 times as long on that. None: product on a TPU, else gather.

    Raises:
        ValueError: for an unknown implementation.
    """
    if implementation is None:
        implementation = "product" if jax.default_backend() == "tpu" else "gather"
    if implementation == "gather":
        return jnp.take(x, indices, axis=-1)
    if implementation != "product":
        raise ValueError(
            f"chosen_columns: unknown implementation {implementation!r}; expected gather or product."
        )
    unit = jax.nn.one_hot(indices, x.shape[-1], axis=0, dtype=x.dtype)  # [D, R]
    # The highest precision, or a TPU would round float32 to bfloat16 on the way.
    return jnp.dot(x, unit, precision=jax.lax.Precision.HIGHEST)
