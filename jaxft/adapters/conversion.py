"""Any adapter of kernels as LoRA, which peft, vLLM, SGLang and llama.cpp serve."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.rewrite import Params, partition, path_name
from jaxft.weights import (
    BoftWeight,
    DoraWeight,
    Frozen,
    LohaWeight,
    LokrWeight,
    LoraWeight,
    MonarchWeight,
    OftWeight,
    PacaWeight,
    RandloraWeight,
    VeraWeight,
    is_weight,
    to_dense,
)

_BY_SVD = (
    DoraWeight, LohaWeight, LokrWeight, OftWeight, BoftWeight, RandloraWeight, MonarchWeight
)  # fmt: skip


class Lost(NamedTuple):
    """The share of the updates U = W' - W that is lost: |U - A B|² / |U|², Frobenius norms, 0 to 1."""

    by_path: Mapping[str, float]
    overall: float  # all kernels together

    def __str__(self) -> str:
        if not self.overall:
            return "LoRA holds the whole update"
        worst = max(self.by_path, key=self.by_path.__getitem__)
        return (
            f"LoRA lacks {self.overall:.2%} of the update's squared norm; the most at {worst}, "
            f"{self.by_path[worst]:.2%}"
        )


class _Factors(NamedTuple):
    a: jax.Array  # [D, R] float32
    b: jax.Array  # [R, F] float32; the update is A B
    lost: float  # squared norm of U - A B
    total: float  # squared norm of the update


def as_lora(
    params: Params, rank: int | None = None, *, base: Params | None = None
) -> tuple[Params, Lost]:
    """(the params with each adapter of a kernel as a LoraWeight, the share that is lost).

    LoRA, PaCA and VeRA of rank R are exactly LoRA of rank R: for PaCA, A selects the tuned rows and B is
    their change; for VeRA, the two vectors are multiplied into its matrices. The update of DoRA, LoHa,
    LoKr, OFT, BOFT, RandLoRA and Monarch, and of any adapter with R > `rank`, is replaced by the nearest
    matrix of that rank, its truncated singular value decomposition (Eckart and Young, 1936). All other
    leaves are unchanged.

    Args:
        params: adapted, with separate layers (jaxft.models.unstack_layers); experts may be stacked.
        rank: the largest R. None: no update is truncated, and only exact adapters are accepted.
        base: the params before adapting, for Monarch, which replaces its kernel.

    Raises:
        AdapterError: for an adapter that does not only change a kernel ((IA)³, bottlenecks), stacked
            layers, a rank below 1, or if `rank` or `base` is needed and missing.
    """
    if rank is not None and rank < 1:
        raise AdapterError(f"as_lora: rank must be at least 1, got {rank}.")
    kernels = {}
    if base is not None:
        nodes = jax.tree_util.tree_leaves_with_path(base, is_leaf=is_weight)
        kernels = {path_name(path): node for path, node in nodes}
    found: dict[str, _Factors] = {}

    def convert(path, node):
        if not is_weight(node) or not jax.tree.leaves(partition(node)[0]):
            return node
        name = path_name(path)
        kernel, found[name] = _factors(name, node, rank, kernels.get(name))
        if isinstance(node, LoraWeight) and found[name].a is node.a:
            return node
        a, b = found[name].a, found[name].b
        return LoraWeight(kernel, a, b, float(a.shape[-1]))

    converted = jax.tree_util.tree_map_with_path(convert, params, is_leaf=is_weight)
    if not found:
        raise AdapterError("as_lora: no adapter of a kernel trains in params.")
    share = lambda lost, total: lost / total if total else 0.0
    by_path = {name: share(f.lost, f.total) for name, f in found.items()}
    sums = (sum(getattr(f, field) for f in found.values()) for field in ("lost", "total"))
    return converted, Lost(by_path, share(*sums))


def _factors(name: str, node: Any, rank: int | None, kernel: Any) -> tuple[Any, _Factors]:
    """(the base kernel, the factors of the update)."""
    if not isinstance(node, (LoraWeight, PacaWeight, VeraWeight, *_BY_SVD)):
        raise AdapterError(
            f"as_lora: {name!r} trains as {type(node).__name__}, which does not only change a kernel."
        )
    if node.stack:
        return _of_experts(name, node, rank, kernel)
    if not isinstance(node, MonarchWeight):
        kernel = node.base
    elif kernel is None:
        raise AdapterError(f"as_lora: {name!r} is Monarch, which replaces its kernel; give `base`.")
    kernel = kernel.value if isinstance(kernel, Frozen) else kernel
    if not isinstance(node, _BY_SVD) and (rank is None or node.rank <= rank):
        return kernel, _exact(node)
    if rank is None:
        raise AdapterError(
            f"as_lora: {name!r} trains as {type(node).__name__}, whose update names no rank; "
            "give a rank."
        )
    below = to_dense(kernel).astype(jnp.float32)
    # The kernel is float32, so that to_dense does not round the update.
    wide = dataclasses.replace(node, base=below) if hasattr(node, "base") else node
    return kernel, _truncated(to_dense(wide).astype(jnp.float32) - below, rank)


def _of_experts(name, node, rank, kernel):
    """`_factors` of a weight [E, in, out], each expert on its own."""
    if "/experts/" not in name or len(node.stack) != 1:
        raise AdapterError(
            f"as_lora: {name!r} is a stack of layers; call unstack_layers(params) first."
        )
    part = lambda tree, e: jax.tree.map(lambda leaf: leaf[e], tree)
    parts = [_factors(name, part(node, e), rank, part(kernel, e))[1] for e in range(node.shape[0])]
    kernel = getattr(node, "base", kernel)
    kernel = kernel.value if isinstance(kernel, Frozen) else kernel
    a, b = (jnp.stack([getattr(f, field) for f in parts]) for field in "ab")
    if isinstance(node, LoraWeight) and (rank is None or node.rank <= rank):
        a, b = node.a, node.b
    lost, total = (sum(getattr(f, field) for f in parts) for field in ("lost", "total"))
    return kernel, _Factors(a, b, lost, total)


def _exact(node: LoraWeight | PacaWeight | VeraWeight) -> _Factors:
    scale = 1.0
    if isinstance(node, LoraWeight):
        a, b, scale = node.a, node.b, node.alpha / node.rank
    elif isinstance(node, VeraWeight):
        rows, columns = node.shape
        a, b = node.a[:rows] * node.d[None], node.b[:, :columns] * node.e[None]
    else:
        below = to_dense(node.base)[node.indices].astype(jnp.float32)
        a = jax.nn.one_hot(node.indices, node.shape[0], axis=0, dtype=jnp.float32)
        b = node.rows * (node.alpha / node.rank) - below
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    total = scale**2 * jnp.sum((a32.T @ a32) * (b32 @ b32.T))
    return _Factors(a, b, 0.0, float(total))


def _truncated(update: jax.Array, rank: int) -> _Factors:
    u, s, v = jnp.linalg.svd(update, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    a, b = u[:, :rank] * root[None], root[:, None] * v[:rank]
    return _Factors(a, b, float(jnp.sum(s[rank:] ** 2)), float(jnp.sum(s**2)))
