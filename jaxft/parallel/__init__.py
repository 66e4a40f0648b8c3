"""Meshes and how params and batches are laid over them."""

from jaxft.parallel.mesh import AXES, batch_sharding, make_mesh, replicated
from jaxft.parallel.rules import TRANSFORMER_RULES, param_shardings, shard_params

__all__ = [
    "AXES",
    "TRANSFORMER_RULES",
    "batch_sharding",
    "make_mesh",
    "param_shardings",
    "replicated",
    "shard_params",
]
