"""Rules of additive adapters: what `adapt` puts beside the weights of a model, rather than in their place."""

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

# Patterns for `bottleneck` and `parallel_adapter`; `prompt` stands at "prompt", `prefix` at "prefix".
HOULSBY = TRANSFORMER_TARGETS.houlsby  # in both sublayers of each block
PFEIFFER = TRANSFORMER_TARGETS.pfeiffer  # behind the MLP alone (arxiv.org/abs/2005.00247)


@dataclasses.dataclass(frozen=True)
class Added:
    """A rule for a leaf that the base model lacks.

    `adapt` puts it into each subtree whose path, with the leaf's name behind it, the pattern matches. It
    trains, and is made anew where there is one already.
    """

    name: str  # last part of the path: "adapter" in "layers/0/mlp/adapter"
    # (key, subtree, how many leading axes of the leaf are stacked layers) -> leaf
    make: Callable[[jax.Array, Mapping[str, Any], int], Any]


def bottleneck(
    size: int = 64, *, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> Added:
    """A serial adapter behind a sublayer: y + f(y D) U. Patterns: HOULSBY, PFEIFFER.

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
    """An adapter beside a sublayer of the (normed) input x: y + scale f(x D) U; patterns as `bottleneck`.

    Beside MLPs, together with `prefix(30)`, it makes the MAM adapter of He et al., 2021,
    arxiv.org/abs/2110.04366, section 4.6.
    """
    return _bottleneck("parallel_adapter", size, activation=activation, scale=scale, reads="input")


def prompt(
    length: int | None = None, ids: Sequence[int] | None = None, *, embedding: str = EMBEDDING
) -> Added:
    """`length` soft tokens before the embeddings of each row (or segment): {"prompt": prompt(20)}.

    Prompt tuning: Lester et al., 2021, arxiv.org/abs/2104.08691, section 2.1 and 3.2. Images get theirs
    uniform, as in Jia et al., 2022, arxiv.org/abs/2203.12119 (VPT-shallow).

    Args:
        length: 0 leaves the model as it is. None: that of `ids`.
        ids: token ids of a text whose embeddings they start from, cut or repeated to `length`
            (as PEFT does). None: of tokens drawn from the vocabulary.
        embedding: path of the table [V, D] in the params.

    Raises:
        ValueError: for a negative or no length, or empty ids; in `adapt` for ids outside the vocabulary.
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
    (Liu et al., 2021, arxiv.org/abs/2110.07602), unless there is a `hidden` size. One leaf
    [length, layers x 2 x KV heads x head size], as PEFT lays it out.

    Args:
        length: 0 leaves the model as it is.
        hidden: of the network through which the prefix is trained (the paper's 512); `merge` folds it
            away.
        scale: standard deviation at first, without `hidden`.
        layers: where the layers lie: `family_of(model.config).layers`.

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
        shape = (length, depth(params, layers) * 2 * width)
        if hidden is None:
            return scale * jax.random.normal(key, shape)
        return prefix_mlp(key, shape, features, hidden)

    return Added("prefix", make)


def _bottleneck(name, size, **options) -> Added:
    if size < 1:
        raise ValueError(f"{name}: size must be at least 1, got {size}; 16 to 512 are usual.")

    def make(key, module, stacked):
        last = next((module[n]["kernel"] for n in SUBLAYER_OUTPUTS if n in module), None)
        if last is None:
            raise ValueError(
                f"{name}: the pattern matches a module with {', '.join(sorted(module))}, which is no "
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
        raise ValueError("prompt: ids need a model with a vocabulary; give a length alone.")
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
            f"{name}: it stands at the root of the params, as {name!r}, where {path} must be; use that "
            "pattern, and say where the model has these if it is elsewhere."
        )
