"""Whether a Pallas kernel can run where a program is being traced."""

from __future__ import annotations

import jax


def on_one_tpu() -> bool:
    """True on a TPU with one device in sight, or inside a shard_map over all axes of a mesh.

    XLA cannot split a kernel over the devices of a mesh by itself, so that under jit with sharded
    arrays the forms that it can split must be taken.
    """
    if jax.default_backend() != "tpu":
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return set(mesh.manual_axes) == set(mesh.axis_names) or mesh.size == 1
