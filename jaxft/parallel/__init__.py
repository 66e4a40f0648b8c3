"""Meshes, the layout of params and batches over them, and compiling for devices of other machines."""

from jaxft.parallel.compiled import CompiledCost, compiled_cost, estimated_cycles
from jaxft.parallel.hosts import (
    HostLostError,
    absent,
    connect_hosts,
    first_decides,
    gathered,
    meet,
    several_hosts,
    to_host,
    written_once,
)
from jaxft.parallel.mesh import (
    AXES,
    batch_sharding,
    in_turn,
    lay_out,
    make_mesh,
    mesh_context,
    replicated,
    row_shards,
    token_sharding,
)
from jaxft.parallel.rules import (
    LAYERS,
    TRANSFORMER_RULES,
    param_shardings,
    path_name,
    shard_params,
    stacked_axes,
)
from jaxft.parallel.topology import compile_environment, compile_only_devices

__all__ = [
    "AXES",
    "LAYERS",
    "TRANSFORMER_RULES",
    "CompiledCost",
    "HostLostError",
    "absent",
    "batch_sharding",
    "compile_environment",
    "compile_only_devices",
    "compiled_cost",
    "connect_hosts",
    "first_decides",
    "estimated_cycles",
    "gathered",
    "in_turn",
    "lay_out",
    "make_mesh",
    "meet",
    "mesh_context",
    "param_shardings",
    "path_name",
    "replicated",
    "row_shards",
    "several_hosts",
    "shard_params",
    "stacked_axes",
    "to_host",
    "token_sharding",
    "written_once",
]
