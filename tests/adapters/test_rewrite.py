import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.adapters import (
    ALL_LINEAR,
    Added,
    adapt,
    base_params,
    combine,
    commit,
    count,
    dora,
    full,
    ia3,
    largest_shape,
    lora,
    merge,
    paca,
    partition,
    quantised,
    trainable_mask,
)
from jaxft.models import Decoder, stack_layers, tiny_config
from jaxft.parallel import stacked_axes
from jaxft.weights import Frozen, LoraWeight, is_weight, matmul
from tests.small_models import jitted, start


@pytest.fixture(scope="module")
def model():
    return Decoder(tiny_config(vocab_size=31))


@pytest.fixture(scope="module", params=["separate", "stacked"])
def params(model, request):
    params = start(model)
    return stack_layers(params) if request.param == "stacked" else params


def noisy(adapted):
    """Moves all trainable leaves, as training does, so that B is not zero."""
    trainable, frozen = partition(adapted)
    return combine(
        jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), trainable),
        frozen,
    )


def test_an_adapter_starts_from_the_base_model(model, params):
    tokens = jnp.arange(8)[None]
    adapted = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(4)})
    apply = lambda p: jitted(model)({"params": p}, tokens).logits
    chex.assert_trees_all_close(apply(adapted), apply(params), atol=1e-6)
    merged = merge(noisy(adapted))
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    chex.assert_trees_all_close(apply(merged), apply(noisy(adapted)), atol=2e-5)
    assert jnp.abs(apply(merged) - apply(params)).max() > 1e-2


def test_only_named_fields_train(params):
    rules = {r"layers/.*/(query|value)/kernel": lora(2), r"final_norm/scale": full()}
    adapted = adapt(jax.random.key(1), params, rules)
    trainable, frozen = partition(adapted)
    layers = 2
    sizes = layers * (2 * 2 * 96 + 2 * (96 + 48)) + 96
    assert count(adapted) == (sizes, count(params)[1] + sizes - 96)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == sizes
    chex.assert_trees_all_equal(combine(trainable, frozen), adapted)
    assert jax.tree.structure(trainable_mask(adapted)) == jax.tree.structure(adapted)


def test_gradients_through_partition_equal_those_through_the_dense_form(model, params):
    tokens = jnp.arange(8)[None]
    trainable, frozen = partition(noisy(adapt(jax.random.key(1), params, {ALL_LINEAR: lora(3)})))
    value = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens).logits))
    direct = lambda t: value(combine(t, frozen))
    by_merging = lambda t: value(merge(combine(t, frozen)))
    direct, dense = jax.jit(lambda t: [jax.grad(f)(t) for f in (direct, by_merging)])(trainable)
    chex.assert_trees_all_close(direct, dense, rtol=1e-3, atol=1e-4)


def test_plain_arrays_train_and_an_adapted_tree_can_be_adapted_again(params):
    assert count(params)[0] == count(params)[1]
    once = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(2)})
    thawed = adapt(jax.random.key(1), once, {".*": full()})
    chex.assert_trees_all_equal(merge(thawed), params)
    nodes = jax.tree.leaves(thawed, is_leaf=lambda n: isinstance(n, (Frozen, LoraWeight)))
    assert not any(isinstance(node, Frozen) for node in nodes)


def test_each_kernel_draws_for_itself_and_the_same_each_time(params):
    draw = lambda seed: jax.tree.leaves(
        partition(adapt(jax.random.key(seed), params, {ALL_LINEAR: lora(2)}))[0]
    )
    first, again, other = draw(0), draw(0), draw(1)
    chex.assert_trees_all_equal(first, again)
    drawn = [leaf for leaf in first if jnp.any(leaf)]
    assert all(jnp.any(x != y) for x, y in zip(first, other, strict=True) if jnp.any(x))
    flat = [tuple(leaf.reshape(-1)[:3].tolist()) for leaf in drawn]
    assert len(set(flat)) == len(flat)


def test_bad_rules_are_explained(params):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="no weight matches 'query'.*for example: "):
        adapt(key, params, {"query": lora(2)})
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression \(missing \)"):
        adapt(key, params, {"(": lora(2)})
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora(0)
    with pytest.raises(ValueError, match=r"rank must lie in 1..48 for a kernel \(96, 48\), got 64"):
        adapt(key, params, {r"layers/.*/value/kernel": lora(64)})


@pytest.mark.parametrize(
    "shape, inputs", [((3, 8, 16), 1), ((3, 8, 16), 2), ((3, 3, 8, 16), 2), ((3, 3, 8, 16), 3)]
)
def test_the_axes_of_a_kernel_with_more_than_a_matrix_s_are_said(shape, inputs):
    params = {"conv": {"kernel": jax.random.normal(jax.random.key(1), shape)}}
    said = dict(input_axes=lambda path: inputs)
    adapted = adapt(jax.random.key(0), params, {".*kernel": lora(2)}, **said)
    sides = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    assert adapted["conv"]["kernel"].shape == shape and adapted["conv"]["kernel"].stack == ()
    assert count(adapted)[0] == 2 * sum(sides)
    assert largest_shape(params, ".*kernel", **said) == sides
    chex.assert_trees_all_close(merge(adapted), params)
    again = adapt(jax.random.key(0), adapted, {".*kernel": quantised("int8")})  # it knows its axes
    assert again["conv"]["kernel"].outputs == shape[inputs:]
    with pytest.raises(ValueError, match="read a convolution's kernel by"):
        matmul(jnp.ones((1, 8)), adapted["conv"]["kernel"])


def test_axes_that_are_not_said_are_no_guess():
    params = {"attention": {"query": {"kernel": jnp.ones((8, 4, 2))}}}
    refuse = functools.partial(adapt, jax.random.key(0))
    chex.assert_trees_all_equal(refuse(params, {".*": full()}), params)  # asks nothing
    said = (
        r"attention/query/kernel \(8, 4, 2\) has the axes.*input_axes=.*2 in a conv.*stacked=path"
    )
    for call in (refuse, lambda params, rules: largest_shape(params, *rules)):
        with pytest.raises(ValueError, match=said):
            call(params, {".*kernel": lora(2)})
    with pytest.raises(ValueError, match=r"\(3, 8, 4, 2\) has .* after \(3,\), which are stacked"):
        refuse({"layers": {"kernel": jnp.ones((3, 8, 4, 2))}}, {".*": lora(2)})
    for number in (0, 3):
        with pytest.raises(ValueError, match=rf"input_axes\('.*'\) is {number}, but the shape is"):
            refuse(params, {".*": lora(2)}, input_axes=lambda path, number=number: number)


def test_a_kernel_taken_for_stacked_layers_is_explained():
    """A module that happens to be called `layers`, with one kernel."""
    said = (
        r"layers/kernel, whose leading axes \(8,\) of \(8, 8\) are taken.*stacked=.*needs a matrix"
    )
    with pytest.raises(ValueError, match=said):
        adapt(jax.random.key(0), {"layers": {"kernel": jnp.ones((8, 8))}}, {".*": lora(2)})


def test_stacks_are_said_layers_by_their_paths_experts_by_an_argument():
    """[E, in, out] and [layers, E, in, out]: each matrix has its own factors, as by a Python loop."""
    experts = lambda path: stacked_axes(path) + ("parts" in path)
    apart = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
    for tree, stack in (
        ({"layers": {"0": {"parts": {"kernel": apart[0]}}}}, (3,)),
        ({"layers": {"parts": {"kernel": apart}}}, (2, 3)),
    ):
        adapted = noisy(adapt(jax.random.key(0), tree, {".*kernel": dora(2)}, stacked=experts))
        (weight,) = jax.tree.leaves(adapted, is_leaf=is_weight)
        assert weight.stack == stack and weight.a.shape == (*stack, 4, 2)
        (merged,) = jax.tree.leaves(merge(adapted))
        for at in np.ndindex(stack):
            one = jax.tree.map(lambda leaf, at=at: leaf[at], weight)
            np.testing.assert_allclose(merged[at], one.to_dense(), rtol=1e-5)
        assert largest_shape(tree, ".*kernel", stacked=experts) == (4, 5)
        again = adapt(jax.random.key(0), adapted, {".*kernel": full()})  # a weight knows its stack
        chex.assert_trees_all_equal(merge(again), merge(adapted))
    with pytest.raises(ValueError, match=r"stacked\('bias'\) is 2, but its shape is \(3,\)"):
        adapt(jax.random.key(0), {"bias": jnp.ones(3)}, {"bias": lora(1)}, stacked=lambda path: 2)


def test_a_bias_in_stacked_layers_is_no_matrix():
    tree = {"layers": {"up": {"bias": jnp.ones((2, 8))}}}
    with pytest.raises(
        ValueError, match=r"needs a matrix \[in, out\], got a weight of shape \(8,\)"
    ):
        adapt(jax.random.key(0), tree, {".*bias": lora(2)})


def test_commit_writes_each_expert_of_stacked_layers():
    experts = lambda path: stacked_axes(path) + 1
    tree = {"layers": {"kernel": jax.random.normal(jax.random.key(1), (2, 3, 6, 5))}}
    params = noisy(adapt(jax.random.key(0), tree, {".*kernel": paca(2)}, stacked=experts))
    written = commit(params)["layers"]["kernel"]
    np.testing.assert_allclose(written.base, merge(params)["layers"]["kernel"], rtol=1e-6)


class Block(NamedTuple):
    """A linen-like layer whose names are fields."""

    kernel: Any
    bias: Any


BLOCK = lambda seed: {
    "kernel": jax.random.normal(jax.random.key(seed), (4, 4)),
    "bias": 1.0 + jnp.arange(4.0),
}
CONTAINERS = {
    "dict": lambda: {"0": BLOCK(0), "1": BLOCK(1)},
    "list": lambda: [BLOCK(0), BLOCK(1)],
    "tuple": lambda: (BLOCK(0), (BLOCK(1), None)),
    "NamedTuple": lambda: [Block(**BLOCK(0)), Block(**BLOCK(1))],
    "nnx": lambda: nnx.state([nnx.Linear(4, 4, rngs=nnx.Rngs(0))]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_biases_and_bases_are_found_in_any_container(kind):
    """(IA)^3 scales biases with their kernels: (x W + b) diag(s)."""
    params = {"blocks": jax.tree.map(lambda leaf: leaf + 1.0, CONTAINERS[kind]())}
    rules = {".*kernel(/value)?": ia3(), "adapter": Added("adapter", lambda *_: jnp.ones(2))}
    adapted = noisy(adapt(jax.random.key(0), params, rules))
    chex.assert_trees_all_equal(base_params(adapted), jax.tree.map(Frozen, params))
    assert adapted.pop("adapter").shape == (2,)
    merged = merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    scale = 1.0 + 0.02 * jnp.cos(jnp.arange(4.0))
    by_column = lambda leaf: leaf * jnp.broadcast_to(scale, leaf.shape)
    chex.assert_trees_all_close(merged, jax.tree.map(by_column, params))


@pytest.mark.parametrize("kind", ["list", "tuple"])
def test_an_adapter_is_added_to_modules_in_lists(kind):
    params = {"blocks": CONTAINERS[kind]()}
    rule = Added("adapter", lambda key, module, stacked: jnp.zeros(module["kernel"].shape[-1]))
    adapted = adapt(jax.random.key(0), params, {"blocks/0/adapter": rule})
    assert adapted["blocks"][0]["adapter"].shape == (4,) and "adapter" not in adapted["blocks"][1]
    assert type(adapted["blocks"]) is type(params["blocks"])
    chex.assert_trees_all_equal(base_params(adapted), jax.tree.map(Frozen, params))
