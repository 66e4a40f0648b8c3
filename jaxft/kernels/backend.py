"""The platform of the program being traced, and whether a Pallas kernel can run there."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """The name "cpu", "gpu" or "tpu" of the mesh in context, else of the default backend.

    The two differ when a program is compiled for another machine; `jax.set_mesh` puts a
    mesh in context, and so do the compiled steps of jaxft.train for the mesh of the params.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one(platform: str) -> bool:
    """True on a "tpu" or "gpu" with one visible device, or inside a shard_map over all axes of a mesh.

    XLA cannot split a kernel over the devices of a mesh by itself, so jit with sharded arrays must
    use the forms that it can split.
    """
    if target_platform() != platform:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return set(mesh.manual_axes) == set(mesh.axis_names) or mesh.size == 1


def gpu_capability() -> tuple[int, int] | None:
    """CUDA's compute capability of this process's GPU, such as (8, 0) for an A100; None without one."""
    if jax.default_backend() != "gpu":
        return None
    found = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")
    return (int(found[0]), int(found[1])) if len(found) == 2 else None
