"""Training a whole model in a random subspace: the same few numbers move every tensor."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import zlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.files import read_adapter, write_adapter
from jaxft.adapters.rewrite import Params, adapt, count, merge, partition, path_name
from jaxft.adapters.rules import full
from jaxft.parallel import LAYERS, stacked_axes
from jaxft.weights import Frozen, fastfood, is_weight

CONFIG, WEIGHTS = "jaxft_adapter.json", "jaxft_adapter.safetensors"

Granularity = Literal["tensor", "global"]
Projection = Callable[[jax.Array, int, int], Callable[[jax.Array], jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntrinsicParams:
    """A params tree whose tensors are W_i + lam_i (P theta)_i, of which theta and lam train.

    Aghajanyan, Zettlemoyer, Gupta, 2020, arxiv.org/abs/2012.13255: DID without lam, SAID with it. The
    model reads `intrinsic_apply(params)`. The random map P is redrawn from `key` at each call.
    """

    base: Params  # frozen, except tensors that train outside the subspace
    theta: jax.Array  # float32, zeros at first
    lam: jax.Array | None  # [m], ones at first, in the order of `tensor_shapes`; None: DID
    key: Frozen  # a jax.random.key, in the tree: XLA would fold a constant and all draws from it
    only: str = dataclasses.field(metadata={"static": True})
    granularity: Granularity = dataclasses.field(metadata={"static": True})
    projection: Projection = dataclasses.field(metadata={"static": True})
    layers: str = dataclasses.field(default=LAYERS, metadata={"static": True})  # path of the layers


def intrinsic(
    key: jax.Array,
    params: Params,
    d: int,
    *,
    said: bool = True,
    granularity: Granularity = "tensor",
    only: str = ".*",
    trainable_outside: str | None = None,
    projection: Projection = fastfood,
    layers: str = LAYERS,
) -> IntrinsicParams:
    """The params in a random subspace with d trainable numbers; initially they equal `params`.

    SAID uses m of these for lam, one per tensor, so that theta has d - m (the released code
    uses d - m - 1). A tensor is a leaf of one layer: stacked layers have the same
    subspace as separate ones, on any mesh. On a mesh, shard `params` first.

    Args:
        key: a jax.random.key; each tensor's map draws from fold_in(key, crc32(path)).
        params: dense or frozen, quantised too.
        d: all numbers that train, including lam and leaves outside the subspace.
        said: whether lam trains.
        granularity: "tensor": a map for each tensor, as in the released code. "global": one map into
            all of them together, as in the text; it needs memory for 2^k numbers at once.
        only: pattern of the paths of tensors in the subspace, with layers as in "layers/0/..."; the
            others stay as they are.
        trainable_outside: pattern of the paths of weights (as in `adapt`) that train whole,
            such as a new head.
        projection: (key, d, D) -> linear function of theta: fastfood, cropped_fastfood,
            dense_projection, or any other named function (programs are compiled once for each).
        layers: path of the layers in the params: `family_of(model.config).layers`.

    Raises:
        ValueError: if d is too small, a pattern matches nothing, or granularity is unknown.
    """
    if granularity not in ("tensor", "global"):
        raise ValueError(
            f"intrinsic: unknown granularity {granularity!r}; expected tensor or global."
        )
    base = adapt(key, params, {} if trainable_outside is None else {trainable_outside: full()})
    m, outside = len(tensor_shapes(base, only, layers)), count(base)[0]
    if m == 0:
        raise ValueError(
            f"intrinsic: no tensor for the subspace matches only={only!r}"
            + (f" outside {trainable_outside!r}" if trainable_outside else "")
            + "; a pattern must match a whole path, as in 'layers/0/mlp/up/kernel'."
        )
    scales = m if said else 0
    if d <= scales + outside:
        raise ValueError(
            f"intrinsic: d = {d} leaves nothing for theta: it must be more than {scales + outside}, of which "
            f"lam takes {scales} (m = {m} tensors, said={said}) and what trains outside {outside}."
        )
    return IntrinsicParams(
        base=base,
        theta=jnp.zeros(d - scales - outside, jnp.float32),
        lam=jnp.ones(m, jnp.float32) if said else None,
        key=Frozen(key),
        only=only,
        granularity=granularity,
        projection=projection,
        layers=layers,
    )


def intrinsic_apply(params: IntrinsicParams) -> Params:
    """The dense params theta_0 + lam P theta, differentiable in theta and lam; also the merged model.

    Sums are in float32 and returned in the base's data type. For the projection, the backward pass keeps
    only theta and the key.
    """
    shapes = tensor_shapes(params.base, params.only, params.layers)
    updates = _updates(params, shapes)
    if params.lam is not None:
        updates = {name: params.lam[i] * updates[name] for i, name in enumerate(shapes)}

    def move(path, dense):
        names = _layer_names(path, dense, params.layers)
        if names[0] not in updates:
            return dense
        update = jnp.stack([updates[name] for name in names]).reshape(dense.shape)
        return (dense.astype(jnp.float32) + update).astype(dense.dtype)

    return jax.tree_util.tree_map_with_path(move, merge(params.base))


def tensor_shapes(
    base: Params, only: str = ".*", layers: str = LAYERS
) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the tensors in the subspace, sorted; stacked layers are listed separately."""
    shapes = {}
    for path, node in jax.tree_util.tree_leaves_with_path(base, is_leaf=is_weight):
        if isinstance(node, Frozen) and jnp.issubdtype(node.dtype, jnp.floating):
            stacked = stacked_axes(path_name(path), layers)
            for name in _layer_names(path, node, layers):
                if re.fullmatch(only, name):
                    shapes[name] = node.shape[stacked:]
    return dict(sorted(shapes.items()))


def save_intrinsic(path: str | os.PathLike, params: IntrinsicParams) -> None:
    """Writes theta, lam, the key and the leaves that train outside: d numbers and a JSON of settings."""
    trainable = jax.tree_util.tree_leaves_with_path(partition(params)[0])
    tensors = {path_name(p): leaf for p, leaf in trainable}
    key = params.key.value
    settings = {
        "version": 1,
        "name": "intrinsic",
        "d": count(params)[0],
        "said": params.lam is not None,
        "granularity": params.granularity,
        "only": params.only,
        "projection": _name(params.projection),
        "layers": params.layers,
        "key": [str(jax.random.key_impl(key)), jax.random.key_data(key).tolist()],
    }
    path = pathlib.Path(path)
    write_adapter(path / CONFIG, path / WEIGHTS, settings, tensors)


def load_intrinsic(
    path: str | os.PathLike, params: Params, *, projection: Projection = fastfood
) -> IntrinsicParams:
    """The base params in the subspace that `save_intrinsic` wrote.

    Args:
        path: the directory.
        params: of the base model, in either layout of layers if nothing trains outside.
        projection: the function used in training.

    Raises:
        AdapterError: if a file is missing, damaged or of another kind, the projection differs, or
            the numbers do not fit the model.
    """
    settings, tensors = _read(pathlib.Path(path))
    if _name(projection) != settings["projection"]:
        raise AdapterError(
            f"{path}: was trained with projection {settings['projection']!r}, got "
            f"{_name(projection)!r}; pass projection=..."
        )
    impl, data = settings["key"]
    outside = [re.escape(n.removeprefix("base/")) for n in tensors if n.startswith("base/")]
    try:
        fresh = intrinsic(
            jax.random.wrap_key_data(jnp.array(data, jnp.uint32), impl=impl),
            params,
            settings["d"],
            said=settings["said"],
            granularity=settings["granularity"],
            only=settings["only"],
            trainable_outside="|".join(outside) or None,
            projection=projection,
            layers=settings.get("layers", LAYERS),
        )
    except ValueError as error:
        raise AdapterError(f"{path}: does not fit this model ({error})") from None

    def fill(path_, leaf):
        found = tensors.get(path_name(path_))
        if found is None or found.shape != leaf.shape:
            shape = "nothing" if found is None else found.shape
            raise AdapterError(
                f"{path}: {path_name(path_)} has {shape}, this model needs {leaf.shape}; the adapter is "
                "for another model."
            )
        return found

    trainable, frozen = partition(fresh)
    filled = jax.tree_util.tree_map_with_path(fill, trainable)
    pick = lambda t, f: f if t is None else t
    return jax.tree.map(pick, filled, frozen, is_leaf=lambda leaf: leaf is None)


def _updates(params, shapes):
    """{path: P theta of that tensor}."""
    # checkpoint: the backward pass redraws B, Pi and G instead of keeping them.
    project = jax.checkpoint(
        lambda key, theta, size: params.projection(key, theta.size, size)(theta),
        static_argnums=2,
    )
    key, sizes = params.key.value, {name: math.prod(shape) for name, shape in shapes.items()}
    if params.granularity == "global":
        whole = project(key, params.theta, sum(sizes.values()))
        parts = jnp.split(whole, np.cumsum(list(sizes.values()))[:-1])
        return {n: p.reshape(shapes[n]) for n, p in zip(shapes, parts, strict=True)}
    updates = {}
    for size in sorted(set(sizes.values())):
        # A loop over tensors of one size: the program grows with the number of sizes, not the depth.
        names = [name for name in sizes if sizes[name] == size]
        # zlib.crc32 rather than hash(): the same in every process.
        seeds = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)
        rows = jax.lax.map(lambda k, n=size: project(k, params.theta, n), keys)
        updates |= {n: row.reshape(shapes[n]) for n, row in zip(names, rows, strict=True)}
    return updates


def _layer_names(path, leaf, layers):
    name = path_name(path)
    if not stacked_axes(name, layers):
        return [name]
    rest = name.removeprefix(f"{layers}/")
    return [f"{layers}/{i}/{rest}" for i in range(leaf.shape[0])]


def _name(function):
    return getattr(function, "__name__", repr(function))


def _read(path):
    settings, tensors = read_adapter(path / CONFIG, path / WEIGHTS, load_file)
    if (settings.get("version"), settings.get("name")) != (1, "intrinsic"):
        raise AdapterError(
            f"{path}: holds version {settings.get('version')} of adapter {settings.get('name')!r}; "
            "expected version 1 of 'intrinsic'."
        )
    return settings, tensors
