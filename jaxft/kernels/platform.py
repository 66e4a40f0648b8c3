"""What the program being traced will run on."""

from __future__ import annotations

import jax


def target_platform() -> str:
    """The name "cpu", "gpu" or "tpu" the mesh in context, else of the default backend.

    The two differ where a program is compiled for devices that are not here; `jax.set_mesh` puts a
    mesh in context, and so do the compiled steps of jaxft.train for the mesh that the params lie on.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
