"""Meshes, how params and batches are laid over them, and compiling for devices that are not here."""

from jaxft.parallel.compiled import CompiledCost, compiled_cost, estimated_cycles
from jaxft.parallel.hosts import connect_hosts
from jaxft.parallel.mesh import AXES, batch_sharding, make_mesh, mesh_context, replicated
from jaxft.parallel.rules import TRANSFORMER_RULES, param_shardings, shard_params
from jaxft.parallel.topology import compile_environment, compile_only_devices

__all__ = [
    "AXES",
    "TRANSFORMER_RULES",
    "CompiledCost",
    "batch_sharding",
    "compile_environment",
    "compile_only_devices",
    "compiled_cost",
    "connect_hosts",
    "estimated_cycles",
    "make_mesh",
    "mesh_context",
    "param_shardings",
    "replicated",
    "shard_params",
]
