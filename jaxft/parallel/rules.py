"""Sharding rules of params over a mesh: (path pattern, PartitionSpec); the first match applies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.parallel.experts import check_experts
from jaxft.weights import is_weight

Params = Any
Rules = Sequence[tuple[str, PartitionSpec]]

# Path of the layers of the default family, jaxft's own transformers, in a params tree.
LAYERS = "layers"
# Column-parallel projections split their outputs over "tensor", row-parallel ones their inputs, so
# that a block needs one all-reduce after attention and one after the MLP; "fsdp" splits the other
# side.
TRANSFORMER_RULES: Rules = (
    (r".*/experts/gate_up/kernel", PartitionSpec("expert", "fsdp", "tensor")),
    (r".*/experts/down/kernel", PartitionSpec("expert", "tensor", "fsdp")),
    (r".*/experts/gate_up/bias", PartitionSpec("expert", "tensor")),
    (r".*/experts/down/bias", PartitionSpec("expert")),
    (
        r".*/(query|key|value|gate|up|query_up|latent_up|mixed)/kernel",
        PartitionSpec("fsdp", "tensor"),
    ),
    (r".*/(query_down|latent|rates|beta|decay)/kernel", PartitionSpec("fsdp")),
    (r".*/(out|down)/kernel", PartitionSpec("tensor", "fsdp")),
    (r".*/(query|key|value|gate|up)/bias", PartitionSpec("tensor")),
    (r"(per_layer/)?embed/embedding", PartitionSpec("tensor", "fsdp")),
    (r"(head|per_layer/projection)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"prefix", PartitionSpec(None, "fsdp")),
)


def path_name(path: tuple) -> str:
    """A path of jax.tree_util as text: "layers/0/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stacked_axes(path: str, layers: str = LAYERS) -> int:
    """The number of leading axes of the leaf at `path` that are stacked layers or experts: 0, 1 or 2.

    Layers are separate under "layers/0/...", and stacked under "layers/..." without a number. Kernels of
    experts have an axis more: "layers/0/mlp/experts/down/kernel" is [E, F, D].
    """
    return layer_axes(path, layers) + int("/experts/" in path and path.startswith(f"{layers}/"))


def layer_axes(path: str, layers: str = LAYERS) -> int:
    """The number of leading axes of the leaf at `path` that are stacked layers, 1 or 0."""
    rest = path.removeprefix(f"{layers}/")
    return int(rest != path and not rest.split("/")[0].isdigit())


def param_shardings(
    params: Params, mesh: Mesh, rules: Rules = TRANSFORMER_RULES, layers: str = LAYERS
) -> Params:
    """A tree like params with a NamedSharding for each leaf; `layers` is the path of the layers.

    Leaves that match no rule are replicated. A mesh axis that does not divide its dimension is
    dropped for that leaf. Structured weights shard their own fields, given the spec of the dense
    kernel that they represent. A rule's spec is that of a leaf in one layer, with its axis of experts:
    an axis for stacked layers (`layer_axes`) is put before it.

    Raises:
        ValueError: if the axis `expert` does not divide the experts of a layer.
    """

    def place(path, node):
        name = path_name(path)
        if stacked_axes(name, layers) > layer_axes(name, layers):
            check_experts(node.shape[layer_axes(name, layers)], mesh.shape.get("expert", 1))
        found = (spec for pattern, spec in rules if re.fullmatch(pattern, name))
        spec = next(found, PartitionSpec())
        spec = PartitionSpec(*(None,) * layer_axes(name, layers), *spec)
        specs = node.with_specs(spec) if is_weight(node) else spec
        fit = lambda leaf, s: NamedSharding(mesh, _fitting(s, leaf.shape, mesh))
        return jax.tree.map(fit, node, specs)

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=is_weight)


def shard_params(
    params: Params, mesh: Mesh, rules: Rules = TRANSFORMER_RULES, layers: str = LAYERS
) -> Params:
    """The params, sharded over the mesh."""
    return jax.device_put(params, param_shardings(params, mesh, rules, layers))


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = [*spec, *[None] * (len(shape) - len(spec))][: len(shape)]
    whole = lambda n, axis: axis is not None and n % mesh.shape[axis] == 0
    return PartitionSpec(*(a if whole(n, a) else None for n, a in zip(shape, axes, strict=True)))
