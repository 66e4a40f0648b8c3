"""Prompts and prefixes: each is compared with the base model on longer rows, or with a plain computation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import (
    ALL_LINEAR,
    adapt,
    combine,
    count,
    lora,
    merge,
    parallel_adapter,
    partition,
    prefix,
    prompt,
)
from jaxft.checkpoints import CheckpointError, save_model
from jaxft.generation import SamplingConfig, generate
from jaxft.models import stack_layers, virtual_tokens
from jaxft.models.layers import Norm
from jaxft.objectives import supervised
from jaxft.parallel import batch_sharding, make_mesh, shard_params
from tests import small_models
from tests.small_models import BERT, GEMMA, GPT2, KEY, LLAMA, base, hidden, jitted, trained

VIT = dataclasses.replace(small_models.VIT, num_layers=1)
FAMILIES = {"llama": LLAMA, "gemma": GEMMA, "gpt2": GPT2}
IDS = (5, 3, 11)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 12)))
decoders = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
layouts = pytest.mark.parametrize(
    "config, stacked",
    [(LLAMA, True), (GEMMA, True), (GEMMA, False), (GPT2, False)],
    ids=["llama-stacked", "gemma-stacked", "gemma", "gpt2"],
)


def adapted(params, rules):
    return trained(adapt(jax.random.key(1), params, rules))


def close(x, y, tolerance=2e-5):
    chex.assert_trees_all_close(x, y, rtol=tolerance, atol=tolerance)


BOTH = {"prompt": prompt(2), "prefix": prefix(3)}


@layouts
def test_a_prompt_of_vocabulary_rows_is_those_tokens_in_front(config, stacked):
    model, params = base(config)
    first = jnp.tile(jnp.asarray(IDS)[None], (2, 1))
    expected = hidden(model, params, jnp.concatenate([first, TOKENS], axis=1))[:, 3:]
    params = adapt(KEY, stack_layers(params) if stacked else params, {"prompt": prompt(ids=IDS)})
    close(hidden(model, params, TOKENS), expected)
    assert count(params)[0] == 3 * 16 == sum(x.size for x in jax.tree.leaves(partition(params)[0]))


@layouts
def test_a_prefix_of_a_text_s_keys_and_values_is_that_text_in_front(config, stacked):
    config = dataclasses.replace(config, windows=())
    model, params = base(config)
    first = jnp.tile(jnp.asarray(IDS)[None], (2, 1))
    expected = hidden(model, params, jnp.concatenate([first, TOKENS], axis=1))[:, 3:]
    fill = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, cache=cache).cache)
    cache = fill(first[:1], model.init_cache(1, 3))
    # [L, 1, G, K, S] and [L, 1, G, S, K] -> [L, 2, S, G, K]
    keys = jnp.transpose(jnp.stack(cache.keys)[:, 0], (0, 3, 1, 2))
    values = jnp.transpose(jnp.stack(cache.values)[:, 0], (0, 2, 1, 3))
    pairs = jnp.stack([keys, values], axis=1)
    params = adapt(KEY, stack_layers(params) if stacked else params, {"prefix": prefix(3)})
    assert count(params)[0] == params["prefix"].size == pairs.size
    params["prefix"] = jnp.moveaxis(pairs, 2, 0).reshape(3, -1)  # [L, 2, l, G, K] -> [l, L 2 G K]
    close(hidden(model, params, TOKENS), expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_windows_hide_a_prefix_like_any_token(stacked):
    """One layer, a window of 4, a prefix of 3: tokens 0 to 2 see some of it, from token 3 on none."""
    one = dataclasses.replace(GEMMA, num_layers=1, windows=(4,))
    model, plain = base(one)
    params = adapted(stack_layers(plain) if stacked else plain, {"prefix": prefix(3)})
    seen = hidden(model, params, TOKENS)
    # Rotary positions are relative, so that without a prefix nothing else moves.
    close(seen[:, 3:], hidden(model, plain, TOKENS)[:, 3:])
    changed = jnp.abs(seen - hidden(model, plain, TOKENS))[:, :3].max((0, 2))
    assert jnp.all(changed > 1e-3)


@layouts
def test_every_segment_of_a_packed_row_sees_them(config, stacked):
    model, params = base(config)
    params = adapted(stack_layers(params) if stacked else params, BOTH)
    segments = jnp.asarray([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    positions = jnp.asarray([[*range(5), *range(4), 0, 0, 0], [*range(12)]])
    # Each segment in a separate row; the padding behind it changes nothing.
    alone = [
        jnp.pad(part, (0, 12 - part.size)) for part in (TOKENS[0, :5], TOKENS[0, 5:9], TOKENS[1])
    ]
    first, second, third = hidden(model, params, jnp.stack(alone))
    for given in (positions, None):
        packed = hidden(model, params, TOKENS, given, segments)
        close(packed[0, :9], jnp.concatenate([first[:5], second[:4]]))
        close(packed[1], third)
    assert jnp.all(jnp.isfinite(packed))


@decoders
def test_cached_decoding_is_the_full_forward_pass(config):
    model, params = base(config)
    params = adapted(params, BOTH)
    assert virtual_tokens(params) == 5
    valid = jnp.asarray([[0, 0, 1, 1, 1, 1], [1] * 6])  # the first row is left-padded
    padded = jnp.where(valid > 0, TOKENS[:, :6], 0)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    step = jax.jit(
        lambda cache, *args: model.apply({"params": params}, *args, cache=cache), donate_argnums=0
    )
    output = step(model.init_cache(2, 12 + 5), padded, positions, valid)
    found, position = [output.hidden], positions[:, -1:]
    for i in range(6, 9):
        position, ones = position + 1, jnp.ones((2, 1), jnp.int32)
        output = step(output.cache, TOKENS[:, i : i + 1], position, ones)
        found.append(output.hidden)
    assert int(output.cache.index) == 9 + 5 and output.cache.virtual == 5
    found = jnp.concatenate(found, axis=1)
    rows = jnp.stack([jnp.pad(TOKENS[0, 2:9], (0, 2)), TOKENS[1, :9]])
    expected = hidden(model, params, rows)
    close(found[0, 2:], expected[0, :7])
    close(found[1], expected[1])
    with pytest.raises(ValueError, match="begins with 5 virtual tokens but the params have 0"):
        model.apply({"params": base(config)[1]}, TOKENS[:, :1], cache=output.cache)


def test_the_sampler_continues_as_the_full_forward_pass_does():
    model, params = base(GPT2)
    params = adapted(params, BOTH)
    prompts = [[4, 9, 2], [7, 1, 1, 8, 3]]
    out = generate(model, stack_layers(params), prompts, KEY, SamplingConfig(4, temperature=0.0))
    for ids, completion in zip(prompts, out.completions, strict=True):
        for token in completion:
            row = jnp.pad(jnp.asarray([ids]), ((0, 0), (0, 9 - len(ids))))
            logits = jitted(model)({"params": params}, row).logits
            assert token == int(jnp.argmax(logits[0, len(ids) - 1]))
            ids = [*ids, token]
    with pytest.raises(ValueError, match="exceed the"):
        generate(model, params, [[1] * 40], KEY, SamplingConfig(4))


@pytest.mark.parametrize("rules", [{"prompt": prompt(0)}, {"prefix": prefix(0)}])
def test_none_of_them_is_the_base_model(rules):
    model, params = base(LLAMA)
    close(hidden(model, adapt(KEY, params, rules), TOKENS), hidden(model, params, TOKENS))


def test_an_mlp_is_folded_away_and_the_rest_stays_adapted():
    """Beside other adapters too: the MAM adapter and LoRA, adapted in two steps."""
    model, params = base(LLAMA)
    first = adapted(params, {"prefix": prefix(3, hidden=5), ALL_LINEAR: lora(2, 2.0)})
    assert count(first)[0] == 3 * 16 + 16 * 5 + 5 + 6 * 48 + count_lora(params)
    folded = merge(first)
    assert folded["prefix"].shape == (3, 2 * 2 * 2 * 6)
    close(hidden(model, folded, TOKENS), hidden(model, first, TOKENS))
    second = adapt(KEY, first, {r"layers/.*mlp/adapter": parallel_adapter(4)})
    assert count(second)[0] == 2 * 2 * 16 * 4
    close(hidden(model, second, TOKENS), hidden(model, first, TOKENS))


def count_lora(params):
    return count(adapt(KEY, params, {ALL_LINEAR: lora(2, 2.0)}))[0]


RULES = {
    "prompt": prompt(2),
    "prefix": prefix(3, hidden=5),
    r"layers/.*(attention|mlp)/adapter": parallel_adapter(4, activation=jax.nn.gelu),
}


@pytest.fixture(scope="module")
def training():
    """(model, params, batch, loss and gradients on one device), packed rows and all three adapters."""
    model, params = base(LLAMA)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 29, (8, 12)),
        "loss_mask": (rng.random((8, 12)) < 0.5).astype(np.float32),
        "segment_ids": np.tile(np.arange(12) // 5 + 1, (8, 1)),
        "positions": np.tile(np.arange(12) % 5, (8, 1)),
    }
    params = adapted(params, RULES)
    return model, params, batch, run(model, params, batch)


def run(model, params, batch):
    trainable, frozen = partition(params)
    fun = lambda t: supervised(model.forward, chunk=4)(combine(t, frozen), batch, None)[0]
    return jax.device_get(jax.jit(jax.value_and_grad(fun))(trainable))


def test_gradients_are_finite_differences_and_of_the_new_leaves_alone(training):
    model, params, batch, (_, grads) = training
    trainable, frozen = partition(params)
    names = {p[0].key for p, _ in jax.tree_util.tree_leaves_with_path(grads)}
    assert names == {"prompt", "prefix", "layers"} and "prompt" not in str(frozen["layers"])
    assert len(jax.tree.leaves(grads)) == 1 + 5 + 2 * 2 * 2
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    loss = jax.jit(lambda t: supervised(model.forward, chunk=4)(combine(t, frozen), batch, None)[0])
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), trainable)
    norm = sum(jnp.sum(d * d) for d in jax.tree.leaves(direction)) ** 0.5
    direction = jax.tree.map(lambda d: d / norm, direction)
    moved = lambda e: loss(jax.tree.map(lambda x, d: x + e * d, trainable, direction))
    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    dots = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(dots)), rtol=5e-3)


@pytest.mark.parametrize("remat", ["lean", "full"])
def test_scanned_and_recomputed_layers_give_the_same_gradients(training, remat):
    model, params, batch, (loss, grads) = training
    scanned = run(model.clone(remat=remat), stack_layers(params), batch)
    close(scanned, (loss, jax.device_get(stack_layers(grads))), 5e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_mesh_of_8_devices_gives_the_same_gradients(training, stacked):
    model, params, batch, (loss, grads) = training
    layout = stack_layers if stacked else lambda tree: tree
    mesh = make_mesh(fsdp=4, tensor=2)
    sharded = shard_params(layout(params), mesh)
    assert sharded["prefix"].out_kernel.sharding.spec[1] == "fsdp"
    found = run(model, sharded, jax.device_put(batch, batch_sharding(mesh)))
    close(found, (loss, jax.device_get(layout(grads))), 5e-5)


def test_bfloat16(training):
    model, params, batch, _ = training
    exact = hidden(model, params, batch["tokens"])
    rounded = hidden(model.clone(dtype=jnp.bfloat16), params, batch["tokens"])
    assert rounded.dtype == jnp.bfloat16
    error = jnp.abs(rounded.astype(jnp.float32) - exact)
    assert jnp.mean(error) < 2**-5 * jnp.mean(jnp.abs(exact))


@pytest.mark.parametrize("stacked", [False, True])
def test_an_encoder_s_prompt_of_vocabulary_rows_is_those_tokens_in_front(stacked):
    model, params = base(BERT)
    first = jnp.tile(jnp.asarray(IDS)[None], (2, 1))
    segments = jnp.asarray([[1] * 12, [1] * 9 + [0] * 3])
    longer = jnp.pad(segments, ((0, 0), (3, 0)), constant_values=1)
    types = jnp.pad(jnp.ones((2, 6), jnp.int32), ((0, 0), (6, 0)))
    rows = jnp.concatenate([first, TOKENS], axis=1), longer, jnp.pad(types, ((0, 0), (3, 0)))
    expected = hidden(model, params, *rows)[:, 3:]
    params = adapt(KEY, stack_layers(params) if stacked else params, {"prompt": prompt(ids=IDS)})
    found = hidden(model, params, TOKENS, segments, types)
    close(found[0], expected[0])
    close(found[1, :9], expected[1, :9])
    assert jnp.all(jnp.isnan(hidden(model, params, TOKENS[:1], segments[:1] + 1)))


@pytest.mark.parametrize("stacked", [False, True])
def test_an_encoder_s_prefix_in_closed_form(stacked):
    """With queries of 0, attention is the mean m of 5 values; with a prefix of the value v, (5 m + v) / 6."""
    model, params = base(VIT)
    images = jax.random.normal(KEY, (2, 4, 4, 3))
    key, value = jax.random.normal(jax.random.key(3), (2, 16))
    attention = params["layers"]["0"]["attention"]
    attention["query"] = jax.tree.map(jnp.zeros_like, attention["query"])
    layout = stack_layers if stacked else lambda tree: tree
    prefixed = adapt(KEY, layout(params), {"prefix": prefix(1)})
    prefixed["prefix"] = jnp.concatenate([key, value])[None]
    found = hidden(model, prefixed, images)
    kernel, bias = (attention["value"][name] * (5 / 6) for name in ("kernel", "bias"))
    attention["value"] = {"kernel": kernel, "bias": bias + value / 6}
    close(found, hidden(model, layout(params), images))


def test_in_one_layer_a_prompt_before_patches_is_a_prefix_of_its_keys_and_values():
    """Visual prompts (VPT) have no positions, and what they become is dropped."""
    model, params = base(VIT)
    prompted = adapt(KEY, params, {"prompt": prompt(2)})
    block = params["layers"]["0"]
    norm = Norm("layer", VIT.norm_eps)
    rows = norm.apply({"params": block["attention_norm"]}, prompted["prompt"])
    parts = (block["attention"][name] for name in ("key", "value"))
    pairs = [rows @ part["kernel"] + part["bias"][None] for part in parts]
    prefixed = {**params, "prefix": jnp.concatenate(pairs, axis=1)}
    images = jax.random.normal(KEY, (2, 4, 4, 3))
    close(hidden(model, prompted, images), hidden(model, prefixed, images))


def test_bad_input_is_explained(tmp_path):
    model, params = base(LLAMA)
    raises = lambda message: pytest.raises(ValueError, match=message)
    with raises("length must not be negative, got -1"):
        prefix(-1)
    with raises("length must not be negative, got -2"):
        prompt(-2)
    with raises("ids is empty"):
        prompt(4, ids=[])
    with raises("give a length or ids"):
        prompt()
    with raises(r"ids must lie in 0..28, got \[3, 29\]"):
        adapt(KEY, params, {"prompt": prompt(ids=[3, 29])})
    with raises("hidden must be at least 1, got 0"):
        adapt(KEY, params, {"prefix": prefix(2, hidden=0)})
    with raises("no weight matches 'soft'"):
        adapt(KEY, params, {"soft": prefix(2)})
    for name, rule in (("prompt", prompt(2)), ("prefix", prefix(2))):
        with raises(f"must be at the root of the params, as '{name}'"):
            adapt(KEY, params, {f"layers/{name}": rule})
    other = adapt(KEY, base(GPT2)[1], {"prefix": prefix(2)})
    with raises("rows of 96 numbers; 2 layers of 2 KV heads of size 6 need 48"):
        model.apply({"params": {**params, "prefix": other["prefix"]}}, TOKENS)
    with raises("4 virtual tokens and rows of 45 exceed the model's 48 positions; cut rows to 44"):
        gpt2, weights = base(GPT2)
        weights = adapt(KEY, weights, {"prompt": prompt(4)})
        gpt2.apply({"params": weights}, jnp.zeros((1, 45), jnp.int32))
    for rules in (BOTH, {r"layers/.*mlp/adapter": parallel_adapter(2)}):
        with pytest.raises(CheckpointError, match="cannot be saved in a model's files"):
            save_model(tmp_path, model, adapt(KEY, params, rules))
