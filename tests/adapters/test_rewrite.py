import chex
import jax
import jax.numpy as jnp
import pytest

from jaxft.adapters import (
    ALL_LINEAR,
    adapt,
    combine,
    count,
    full,
    lora,
    merge,
    partition,
    trainable_mask,
)
from jaxft.models import Decoder, stack_layers, tiny_config
from jaxft.weights import Frozen, LoraWeight


@pytest.fixture(scope="module")
def model():
    return Decoder(tiny_config(vocab_size=31))


@pytest.fixture(scope="module", params=["separate", "stacked"])
def params(model, request):
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return stack_layers(params) if request.param == "stacked" else params


def noisy(adapted):
    """As after training: what trains has moved, so that B is not zero."""
    trainable, frozen = partition(adapted)
    return combine(
        jax.tree.map(lambda x: x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), trainable),
        frozen,
    )


def test_an_adapter_starts_from_the_base_model(model, params):
    tokens = jnp.arange(8)[None]
    adapted = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(4)})
    apply = lambda p: model.apply({"params": p}, tokens).logits
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
    direct = jax.grad(lambda t: value(combine(t, frozen)))(trainable)
    dense = jax.grad(lambda t: value(merge(combine(t, frozen))))(trainable)
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
    with pytest.raises(ValueError, match=r"'\(' is no regular expression \(missing \)"):
        adapt(key, params, {"(": lora(2)})
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora(0)
    with pytest.raises(ValueError, match=r"rank must lie in 1..48 for a kernel \(96, 48\), got 64"):
        adapt(key, params, {r"layers/.*/value/kernel": lora(64)})


def test_a_convolution_is_not_taken_for_stacked_matrices():
    params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16))}}
    with pytest.raises(ValueError, match=r"conv/kernel \(3, 3, 8, 16\) is no matrix"):
        adapt(jax.random.key(0), params, {".*kernel": lora(2)})
    chex.assert_trees_all_equal(adapt(jax.random.key(0), params, {".*kernel": full()}), params)
