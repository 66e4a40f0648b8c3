"""Rewrites the params tree for adapters, and splits it into trainable and frozen leaves."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters.committing import anywhere, writes_back
from jaxft.adapters.rules import Rule, as_it_is
from jaxft.adapters.soft import Added
from jaxft.keys import stream
from jaxft.parallel import path_name, stacked_axes
from jaxft.weights import (
    Bottleneck,
    Frozen,
    ReshapedWeight,
    Weight,
    WeightLike,
    is_weight,
    scaled_bias,
    to_dense,
)

Params = Any  # a pytree of arrays and weights


def unsaid(path: str) -> None:
    """The default of `input_axes`: kernels must be matrices."""


def adapt(
    key: jax.Array,
    params: Params,
    rules: Mapping[str, Rule | Added],
    *,
    stacked: Callable[[str], int] = stacked_axes,
    input_axes: Callable[[str], int | None] = unsaid,
) -> Params:
    """The params with each weight that a rule names rewritten or added, and all others frozen.

    Args:
        key: a jax.random.key; each weight draws from its own key, derived from its path.
        params: any pytree of arrays and weights: dicts, lists, NamedTuples. A frozen weight is adapted
            through its content, so a tree can be adapted again.
        rules: path pattern (a regular expression that matches the whole path, as in
            "layers/.*/(query|value)/kernel") to rule; the first that matches wins. The pattern of an
            `Added` rule matches the new leaf's path ("layers/.*mlp/adapter", "prefix").
        stacked: path to the number of leading axes that are stacked layers or experts, whose kernels
            are rewritten separately. Called for arrays and added leaves: a weight stores its own. Default:
            1 for paths under "layers/" without a number, else 0. Experts [E, in, out] are 1 axis in a
            layer, 2 in stacked layers.
        input_axes: path to the number of axes, after the stacked ones, that are inputs of a kernel with
            more than two axes; the others are outputs. None: unknown. 3 for a convolution
            [H, W, in, out], 1 for flax attention's query, key and value [in, heads, head size], 2 for its
            out [heads, head size, out]. A rule gets the matrix [product of inputs, product of
            outputs]; the result is a `ReshapedWeight`. `full()` accepts any kernel and does not
            call it.

    Raises:
        ValueError: if a pattern matches no path, `stacked` or `input_axes` names more axes than an array
            has, a kernel has more than two axes and `input_axes` returns None, or a rule refuses it.
    """
    added = {pattern: rule for pattern, rule in rules.items() if isinstance(rule, Added)}
    compiled = {pattern: _compile(pattern) for pattern in rules if pattern not in added}
    unused = set(rules)

    def rewrite(path, node):
        name = path_name(path)
        for pattern, regex in compiled.items():
            if regex.fullmatch(name):
                unused.discard(pattern)
                kernel = node.value if isinstance(node, Frozen) else node
                stack = _stack(name, kernel, stacked)
                if rules[pattern] is as_it_is:
                    return kernel  # no copy
                axes = _axes(name, kernel, stack, input_axes)
                drawn = stream(key, f"adapt {name}")
                try:
                    return _apply_rule(rules[pattern], drawn, kernel, stack, *axes)
                except ValueError as error:
                    raise ValueError(f"adapt: {name}{_taken(kernel, stack)}: {error}") from error
        return node if isinstance(node, Frozen) else Frozen(node)

    adapted = jax.tree_util.tree_map_with_path(rewrite, params, is_leaf=is_weight)
    if added:
        adapted = _add(key, adapted, added, unused, stacked)
    if unused:
        raise ValueError(_no_match_message(sorted(unused), params))
    return adapted


def freeze_towers(params: Params, config: Any) -> Params:
    """The params with the parts that read images or sounds frozen, for a model's `config`."""
    towers = getattr(config, "towers", ())  # encoder-decoders have none
    names = "|".join(re.escape(tower.name) for tower in towers)
    rules = {f"(?!({names})/).*": as_it_is}
    return adapt(jax.random.key(0), params, rules) if names else params


def trainable_mask(params: Params) -> Params:
    """A tree like params with True for each leaf that trains.

    A plain array trains; a field of a weight trains unless it is a `frozen_field`, in which case
    nothing inside it does.
    """

    def mask(node):
        if not isinstance(node, Weight):
            return True
        fields = {}
        for field in dataclasses.fields(node):
            if field.metadata.get("static"):
                continue
            value = getattr(node, field.name)
            if field.metadata.get("frozen"):
                fields[field.name] = jax.tree.map(lambda _: False, value)
            else:
                fields[field.name] = jax.tree.map(mask, value, is_leaf=is_weight)
        return dataclasses.replace(node, **fields)

    return jax.tree.map(mask, params, is_leaf=is_weight)


def overwritten(params: Any) -> Any:
    """Returns a tree like params with True for each leaf that a step changes: see `train.init_state`."""
    return jax.tree.map(
        lambda node, trains: jax.tree.map(lambda _: True, node) if writes_back(node) else trains,
        params,
        trainable_mask(params),
        is_leaf=is_weight,
    )


def partition(params: Params) -> tuple[Params, Params]:
    """(trainable, frozen): two trees like params, each with None where the other has the leaf.

    Weights in both have the form that is correct for any values of their fields (`anywhere`).
    """
    params = anywhere(params)
    mask = trainable_mask(params)
    trainable = jax.tree.map(lambda trains, leaf: leaf if trains else None, mask, params)
    frozen = jax.tree.map(lambda trains, leaf: None if trains else leaf, mask, params)
    return trainable, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """The params from their two parts; the inverse of `partition`."""
    pick = lambda first, second: second if first is None else first
    return jax.tree.map(pick, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def float32_masters(params: Params) -> Params:
    """The params with trainable bfloat16 and float16 leaves in float32; frozen leaves are unchanged.

    An update of 1e-6 of a weight is below half a unit in the last place of bfloat16 (1 / 512 of the weight)
    and would be lost; float16 gradients overflow (Micikevicius et al., 2018, arxiv.org/abs/1710.03740,
    section 3.1). Models still compute in the type of their activations.
    """
    trainable, frozen = partition(params)

    def wide(leaf):
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return combine(jax.tree.map(wide, trainable), frozen)


def merge(params: Params) -> Params:
    """The params with each structured weight as one dense array; differentiable.

    Prompts and prefixes are kept, with reparameterisations folded in.

    Raises:
        ValueError: if an adapter cannot be merged into a kernel: see `mergeable`.
    """

    def dense(path, node):
        if isinstance(node, Bottleneck):
            raise ValueError(
                f"merge: {path_name(path)} is a bottleneck adapter, which is not linear; use the params "
                "as they are, and save them as an adapter."
            )
        if not isinstance(node, Weight):
            return node
        return _over(node.stack, to_dense)(node)

    merged = merge_biases(params)
    return jax.tree_util.tree_map_with_path(dense, merged, is_leaf=_is_adapter)


def mergeable(params: Params) -> bool:
    """Returns whether `merge` can make the params dense: False if there are bottleneck adapters."""
    nodes = jax.tree.leaves(params, is_leaf=_is_adapter)
    return not any(isinstance(node, Bottleneck) for node in nodes)


def merge_biases(params: Params) -> Params:
    """The params with each bias as its layer's kernel scales it ((IA)^3); kernels are unchanged.

    Merging one leaf afterwards gives the same leaf as merging the whole tree.
    """
    names = lambda path: tuple(path_name((key,)) for key in path)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_adapter)
    nodes = {names(path): node for path, node in leaves}

    def scaled(path, node):
        name = names(path)
        if "bias" not in name:
            return node
        at = len(name) - 1 - name[::-1].index("bias")  # nnx appends "value"
        kernel = nodes.get((*name[:at], "kernel", *name[at + 1 :]))
        return scaled_bias(to_dense(node), kernel) if is_weight(kernel) else node

    return jax.tree_util.tree_map_with_path(scaled, params, is_leaf=_is_adapter)


def largest_shape(
    params: Params,
    pattern: str,
    *,
    stacked: Callable[[str], int] = stacked_axes,
    input_axes: Callable[[str], int | None] = unsaid,
) -> tuple[int, int]:
    """(most inputs, most outputs) of the kernels whose path matches `pattern`.

    `stacked` and `input_axes` are as in `adapt`. Sizes of several axes are multiplied.

    Raises:
        ValueError: if the pattern matches no path, or for kernels that `adapt` refuses.
    """
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    shapes = []
    for path, node in nodes:
        name, kernel = path_name(path), node.value if isinstance(node, Frozen) else node
        if re.fullmatch(pattern, name):
            axes = _axes(name, kernel, _stack(name, kernel, stacked), input_axes)
            shapes.append(tuple(map(math.prod, axes)))
    if not shapes:
        raise ValueError(_no_match_message([pattern], params))
    return tuple(map(max, zip(*shapes, strict=True)))


def count(params: Params) -> tuple[int, int]:
    """(numbers that train, all numbers)."""
    sizes = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    return sizes(partition(params)[0]), sizes(params)


def map_children(function: Callable[[str, Any], Any], node: Any) -> Any:
    """`node` with each child replaced by function(name, child); arrays, weights and adapters have none.

    The node is any pytree node (dict, list, NamedTuple, nnx state); its type is kept.
    """
    if _is_adapter(node) or jax.tree_util.all_leaves([node]):
        return node
    return jax.tree_util.tree_map_with_path(
        lambda path, child: function(path_name(path), child), node, is_leaf=lambda n: n is not node
    )


def _add(key, params, rules: Mapping[str, Added], unused: set[str], stacked) -> Params:
    def visit(path, module):
        module = map_children(lambda name, child: visit((*path, name), child), module)
        if not isinstance(module, Mapping):
            return module
        made = {}
        for pattern, rule in rules.items():
            name = "/".join((*path, rule.name))
            if rule.name not in made and re.fullmatch(pattern, name):
                unused.discard(pattern)
                drawn = stream(key, f"adapt {name}")
                made[rule.name] = rule.make(drawn, {**module, **made}, stacked(name))
        return {**module, **made} if made else module

    return visit((), params)


def _is_adapter(node: Any) -> bool:
    return is_weight(node) or isinstance(node, Bottleneck)


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"adapt: {pattern!r} is not a regular expression ({error}).") from None


def _apply_rule(
    rule: Rule, key: jax.Array, kernel: WeightLike, stack, inputs, outputs
) -> WeightLike:
    several = len(inputs) + len(outputs) > 2
    matrix = kernel
    if several:
        sizes = (*stack, math.prod(inputs), math.prod(outputs))
        matrix = kernel.matrix if is_weight(kernel) else kernel.reshape(sizes)
    keys = jax.random.split(key, stack) if stack else key
    made = _over(stack, rule)(keys, matrix)
    if not several:
        return made
    if is_weight(made):
        return ReshapedWeight(made, inputs, outputs)
    return made.reshape(kernel.shape)


def _axes(name: str, kernel: WeightLike, stack: Sequence[int], input_axes) -> tuple[tuple, tuple]:
    """(sizes of the input axes, of the output axes) of a kernel, after its axes `stack`."""
    if isinstance(kernel, ReshapedWeight):
        return kernel.inputs, kernel.outputs
    axes = tuple(kernel.shape[len(stack) :])
    said = 1 if is_weight(kernel) else input_axes(name)
    if said is None and len(axes) > 2:
        raise ValueError(
            f"adapt: {name} {kernel.shape} has the axes {axes}"
            + (f" after {tuple(stack)}, which are stacked" if stack else "")
            + ", but rules adapt matrices. Give by adapt(..., input_axes=path -> number) how many of them "
            f"are inputs: {len(axes) - 1} in a convolution, 1 in attention's [in, heads, head size]; or by "
            "stacked=path -> number how many leading axes are layers or experts."
        )
    if said is not None and not 0 < said < len(axes):
        raise ValueError(
            f"adapt: input_axes({name!r}) is {said}, but the shape is {axes}: give None for an array that is "
            "not a kernel, and leave an axis for the outputs."
        )
    said = 1 if said is None else said
    return axes[:said], axes[said:]


def _taken(kernel: WeightLike, stack: Sequence[int]) -> str:
    """A hint for errors of rules, which get a kernel without the axes `stack`."""
    if not stack:
        return ""
    return (
        f", whose leading axes {tuple(stack)} of {kernel.shape} are taken for stacked layers or experts "
        "(set their number by stacked=path -> number)"
    )


def _over(stack: Sequence[int], function: Callable) -> Callable:
    """`function` of one weight, mapped over the leading axes `stack`."""
    for _ in stack:
        function = jax.vmap(function)
    return function


def _stack(name: str, kernel: WeightLike, stacked: Callable[[str], int]) -> tuple[int, ...]:
    """Sizes of the leading axes of stacked layers: `kernel.stack` for a weight, otherwise from `stacked`."""
    if is_weight(kernel):
        return kernel.stack
    depth = stacked(name)
    if not 0 <= depth <= len(kernel.shape):
        raise ValueError(f"adapt: stacked({name!r}) is {depth}, but its shape is {kernel.shape}.")
    return kernel.shape[:depth]


def _no_match_message(patterns: list[str], params: Params) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_weight)[0]
    names = [path_name(path) for path, _ in leaves]
    close = difflib.get_close_matches(patterns[0], names, n=3, cutoff=0.0)
    return (
        f"adapt: no weight matches {', '.join(map(repr, patterns))}. A pattern must match the whole "
        f"path; this model has, for example: {', '.join(close)}."
    )
