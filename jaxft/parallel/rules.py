"""How params are laid over a mesh: (path pattern, PartitionSpec), first match first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.weights import is_weight

Params = Any
Rules = Sequence[tuple[str, PartitionSpec]]

# Where the layers of the default family, jaxft's own transformers, lie in a params tree.
LAYERS = "layers"
# Column-parallel projections split their outputs over "tensor", row-parallel ones their inputs, so
# that a block needs one all-reduce after attention and one after the MLP; "fsdp" takes the other side.
TRANSFORMER_RULES: Rules = (
    (r".*/(query|key|value|gate|up)/kernel", PartitionSpec("fsdp", "tensor")),
    (r".*/(out|down)/kernel", PartitionSpec("tensor", "fsdp")),
    (r".*/(query|key|value|gate|up)/bias", PartitionSpec("tensor")),
    (r"embed/embedding", PartitionSpec("tensor", "fsdp")),
    (r"head/kernel", PartitionSpec("fsdp", "tensor")),
    (r"prefix", PartitionSpec(None, "fsdp")),
)


def path_name(path: tuple) -> str:
    """A path of jax.tree_util as text: "layers/0/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stacked_axes(path: str, layers: str = LAYERS) -> int:
    """How many leading axes of the leaf at `path` are stacked layers, which lie at `layers`: 1 or 0.

    Layers are apart under "layers/0/...", and stacked under "layers/..." without a number.
    """
    rest = path.removeprefix(f"{layers}/")
    return int(rest != path and not rest.split("/")[0].isdigit())


def param_shardings(
    params: Params, mesh: Mesh, rules: Rules = TRANSFORMER_RULES, layers: str = LAYERS
) -> Params:
    """A tree like params with a NamedSharding for each leaf; `layers` is where the layers lie.

    What no rule names lies whole on each device. An axis of the mesh that does not divide its dimension is
    left out for that leaf. Structured weights lay out their own fields, given the spec of the dense
    kernel they stand for. A rule's spec is that of a leaf in one layer: the axis of stacked layers
    (`stacked_axes`) is put before it.
    """

    def place(path, node):
        name = path_name(path)
        found = (spec for pattern, spec in rules if re.fullmatch(pattern, name))
        spec = next(found, PartitionSpec())
        spec = PartitionSpec(*(None,) * stacked_axes(name, layers), *spec)
        specs = node.with_specs(spec) if is_weight(node) else spec
        fit = lambda leaf, s: NamedSharding(mesh, _fitting(s, leaf.shape, mesh))
        return jax.tree.map(fit, node, specs)

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=is_weight)


def shard_params(
    params: Params, mesh: Mesh, rules: Rules = TRANSFORMER_RULES, layers: str = LAYERS
) -> Params:
    """The params laid over the mesh."""
    return jax.device_put(params, param_shardings(params, mesh, rules, layers))


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = [*spec, *[None] * (len(shape) - len(spec))][: len(shape)]
    whole = lambda n, axis: axis is not None and n % mesh.shape[axis] == 0
    return PartitionSpec(*(a if whole(n, a) else None for n, a in zip(shape, axes, strict=True)))
