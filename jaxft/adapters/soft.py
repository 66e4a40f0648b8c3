"""Rules of additive adapters: leaves that `adapt` adds to a model's weights instead of replacing them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.models.stacking import depth, is_stacked, layers_in
from jaxft.models.transformer import (
    EMBEDDING,
    KEY,
    PATCHES,
    SUBLAYER_OUTPUTS,
    TRANSFORMER_TARGETS,
)
from jaxft.parallel import LAYERS
from jaxft.weights import bottleneck_adapter, prefix_mlp, to_dense

# Patterns for `bottleneck` and `parallel_adapter`; `prompt` belongs at "prompt", `prefix` at "prefix".
HOULSBY = TRANSFORMER_TARGETS.houlsby  # in both sublayers of each block
PFEIFFER = TRANSFORMER_TARGETS.pfeiffer  # after the MLP only (arxiv.org/abs/2005.00247)


@dataclasses.dataclass(frozen=True)
class Added:
    """A rule for a leaf that the base model lacks.

    `adapt` adds it to each subtree for which the pattern matches the path plus the leaf's name. The leaf
    trains; an existing one is replaced.
    """

    name: str  # last part of the path: "adapter" in "layers/0/mlp/adapter"
    # (key, subtree, number of leading axes that are stacked layers) -> leaf
    make: Callable[[jax.Array, Mapping[str, Any], int], Any]


def bottleneck(
    size: int = 64, *, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> Added:
    """A serial adapter after a sublayer: y + f(y D) U. Patterns: HOULSBY, PFEIFFER.

    Args:
        size: columns of D, at least 1 and at most the sublayer's features.
        activation: f.
    """
    return _bottleneck("bottleneck", size, activation=activation)


def parallel_adapter(
    size: int = 64,
    scale: float = 4.0,
    *,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> Added:
    """An adapter beside a sublayer of the (normed) input x: y + scale f(x D) U; patterns as in `bottleneck`.

    On MLPs, together with `prefix(30)`, it is the MAM adapter of He et al., 2021,
    arxiv.org/abs/2110.04366, section 4.6.
    """
    return _bottleneck("parallel_adapter", size, activation=activation, scale=scale, reads="input")


def prompt(
    length: int | None = None, ids: Sequence[int] | None = None, *, embedding: str = EMBEDDING
) -> Added:
    """`length` soft tokens before the embeddings of each row (or segment): {"prompt": prompt(20)}.

    Prompt tuning: Lester et al., 2021, arxiv.org/abs/2104.08691, section 2.1 and 3.2. For images the
    initial values are uniform, as in Jia et al., 2022, arxiv.org/abs/2203.12119 (VPT-shallow).

    Args:
        length: 0 leaves the model unchanged. None: the length of `ids`.
        ids: token ids of a text whose embeddings are the initial values, cut or repeated to `length`
            (as in PEFT). None: random tokens of the vocabulary.
        embedding: path of the table [V, D] in the params.

    Raises:
        ValueError: for a negative or missing length, or empty ids; in `adapt` for ids outside the vocabulary.
    """
    if ids is not None and len(ids) == 0:
        raise ValueError(
            "prompt: ids is empty; give the token ids of a text, or None to draw them."
        )
    if length is None and ids is None:
        raise ValueError("prompt: give a length or ids.")
    length = _check_length("prompt", len(ids) if length is None else length)

    def make(key, params, stacked):
        del stacked  # one leaf for all layers
        if "per_layer" in params:
            raise ValueError(
                "prompt: this model has per-layer embeddings for its tokens, and a prompt would have none; "
                "use another adapter, such as lora or bottleneck."
            )
        if (table := _leaf(params, embedding)) is None:
            _check_root("prompt", _leaf(params, PATCHES), f"{embedding!r} or {PATCHES!r}")
            return _image_prompt(key, length, ids, params)
        rows = table.shape[0]
        if ids is None:
            chosen = jax.random.randint(key, (length,), 0, rows)
        else:
            chosen = jnp.asarray([ids[i % len(ids)] for i in range(length)], jnp.int32)
            if min(ids) < 0 or max(ids) >= rows:
                raise ValueError(f"prompt: ids must lie in 0..{rows - 1}, got {list(ids)}.")
        return to_dense(table)[chosen].astype(jnp.float32)

    return Added("prompt", make)


def prefix(
    length: int = 20,
    *,
    hidden: int | None = None,
    scale: float = 0.02,
    layers: str = LAYERS,
) -> Added:
    """`length` keys and values before those of each layer: {"prefix": prefix(20)}.

    Prefix tuning: Li & Liang, 2021, arxiv.org/abs/2101.00190; trained directly, as in P-tuning v2
    (Liu et al., 2021, arxiv.org/abs/2110.07602), unless `hidden` is given. One leaf
    [length, layers x 2 x KV heads x head size], as PEFT lays it out.

    Args:
        length: 0 leaves the model unchanged.
        hidden: size of the network that reparameterises the prefix (512 in the paper); `merge` removes
            it.
        scale: initial standard deviation, without `hidden`.
        layers: path of the layers: `family_of(model.config).layers`.

    Raises:
        ValueError: for a negative length; in `adapt` for a hidden size below 1.
    """
    _check_length("prefix", length)

    def make(key, params, stacked):
        del stacked  # one leaf for all layers
        _check_root("prefix", layers_in(params, layers), repr(layers))
        layer = layers_in(params, layers if is_stacked(params, layers) else f"{layers}/0")
        _check_root("prefix", _leaf(layer, KEY), f"{layers}/.../{KEY}")
        features, width = _leaf(layer, KEY).shape[-2:]
        if not is_stacked(params, layers):
            keys = [_leaf(block, KEY) for block in layers_in(params, layers).values()]
            if len({None if kernel is None else kernel.shape for kernel in keys}) > 1:
                raise ValueError(
                    "prefix: layers of this model have keys of several sizes, or read those of others; use "
                    "another adapter, such as lora or bottleneck."
                )
        shape = (length, depth(params, layers) * 2 * width)
        if hidden is None:
            return scale * jax.random.normal(key, shape)
        return prefix_mlp(key, shape, features, hidden)

    return Added("prefix", make)


def _bottleneck(name, size, **options) -> Added:
    if size < 1:
        raise ValueError(f"{name}: size must be at least 1, got {size}; 16 to 512 are usual.")

    def make(key, module, stacked):
        inside = module.get("experts", module)  # [..., E, F, D], with the same outputs
        last = next((inside[n]["kernel"] for n in SUBLAYER_OUTPUTS if n in inside), None)
        if last is None:
            raise ValueError(
                f"{name}: the pattern matches a module with {', '.join(sorted(module))}, which is not a "
                "sublayer (attention or mlp); see HOULSBY and PFEIFFER."
            )
        build = lambda key: bottleneck_adapter(key, last.shape[-1], size=size, **options)
        stack = last.shape[:stacked]
        for _ in stack:
            build = jax.vmap(build)
        return build(jax.random.split(key, stack) if stack else key)

    return Added("adapter", make)


def _image_prompt(key, length, ids, params):
    if ids is not None:
        raise ValueError("prompt: ids need a model with a vocabulary; give only a length.")
    rows, features = _leaf(params, PATCHES).shape
    bound = math.sqrt(6 / (rows + features))
    return jax.random.uniform(key, (length, features), jnp.float32, -bound, bound)


def _leaf(params, path):
    step = lambda node, name: node.get(name) if isinstance(node, Mapping) else None
    return functools.reduce(step, path.split("/"), params)


def _check_length(name, length):
    if length < 0:
        raise ValueError(f"{name}: length must not be negative, got {length}; 10 to 100 are usual.")
    return length


def _check_root(name, found, path):
    if found is None:
        raise ValueError(
            f"{name}: it must be at the root of the params, as {name!r}, where {path} must be; use that "
            "pattern, and give the path of these if the model has them elsewhere."
        )
