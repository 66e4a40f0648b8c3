import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from jaxft.adapters import adapt, lora
from jaxft.models import Decoder, DecoderConfig, Rope, stack_layers, tiny_config, unstack_layers
from jaxft.objectives import supervised
from tests.small_models import jitted, start

TOKENS = jnp.arange(12)[None]
VARIANTS = {
    "plain": {},
    "windows": dict(windows=(3, None), local_rope=Rope(theta=100.0)),
    "gemma": dict(
        qk_norm=True, post_norms=True, norm_offset=1.0, attention_softcap=5.0, final_softcap=3.0
    ),
    "gpt2": dict(
        rope=None,
        learned_positions=True,
        norm="layer",
        gated_mlp=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    ),
}


def smallest(variant):
    """One layer, or two of which one has a window."""
    layers = len(VARIANTS[variant].get("windows", (None,)))
    config = dataclasses.replace(tiny_config(vocab_size=31), num_layers=layers)
    return dataclasses.replace(config, **VARIANTS[variant])


@pytest.fixture(scope="module", params=list(VARIANTS))
def config(request):
    return dataclasses.replace(tiny_config(vocab_size=31), **VARIANTS[request.param])


@functools.cache
def init(config, **options):
    return start(Decoder(config, **options))


def outputs(model, params):
    return jitted(model)({"params": params}, TOKENS)


def test_both_layouts_have_the_same_params_and_outputs(config):
    params, stacked = init(config), init(config, scan_layers=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(stack_layers(params), stacked)
    chex.assert_trees_all_equal(unstack_layers(stack_layers(params)), params)
    apply = lambda p: outputs(Decoder(config), p).logits
    chex.assert_trees_all_close(apply(params), apply(stack_layers(params)), atol=1e-5)


@functools.cache
def gradients(config, remat):
    objective = supervised(Decoder(config, remat=remat).forward)
    return jax.jit(jax.grad(lambda p: objective(p, {"tokens": TOKENS}, None)[0]))


# Each policy in a model with and without scans, and in each model one; the rest: tests/test_any_with_any.py.
@pytest.mark.parametrize(
    "variant, remats, scan_layers",
    [
        ("plain", ("lean", "full"), False),
        ("plain", ("dots",), True),
        ("windows", ("full",), True),
        ("gemma", ("lean",), True),
        ("gpt2", ("lean", "dots"), False),
    ],
)
def test_remat_changes_no_gradient(variant, remats, scan_layers):
    config = smallest(variant)
    params = init(config)
    wanted = gradients(config, "none")(params)
    for remat in remats:
        found = gradients(config, remat)(stack_layers(params) if scan_layers else params)
        found = unstack_layers(found) if scan_layers else found
        chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_lean_and_full_remat_store_less():
    config = dataclasses.replace(tiny_config(50), num_layers=4)
    params, batch = init(config), {"tokens": jnp.tile(TOKENS, (8, 20))}

    def kept(name):
        # What is stored for the backward pass: XLA:CPU's own figure counts buffers that it could share.
        objective = supervised(Decoder(config, remat=name).forward)
        residuals = saved_residuals(lambda p: objective(p, batch, None)[0], params)
        return sum(aval.size for aval, where in residuals if "from the argument" not in where)

    assert kept("full") < kept("dots") < kept("none") / 2
    assert kept("full") < kept("lean") < kept("none") / 2


def test_bfloat16_compute_keeps_float32_params_and_stays_near(config):
    params = init(config)
    exact = outputs(Decoder(config), params)
    half = outputs(Decoder(config, dtype=jnp.bfloat16), params)
    assert half.hidden.dtype == jnp.bfloat16 and half.logits.dtype == jnp.float32
    scale = np.abs(exact.logits).max()
    chex.assert_trees_all_close(half.logits, exact.logits, atol=0.03 * scale)


def test_unused_logits_cost_nothing():
    config = tiny_config(vocab_size=4096)
    params = init(config)
    run = lambda pick: jax.jit(lambda p: pick(Decoder(config).apply({"params": p}, TOKENS)))
    flops = lambda pick: run(pick).lower(params).compile().cost_analysis()["flops"]
    assert flops(lambda o: o.logits) - flops(lambda o: o.hidden) > 2 * 12 * 96 * 4000


# 140 tokens take two tiles.
@pytest.mark.parametrize(
    "variant, width", [*((name, 9) for name in VARIANTS), ("plain", 140), ("windows", 140)]
)
def test_an_empty_cache_is_filled_as_without_one_and_as_in_parts(variant, width):
    """A left-padded row beside a full one: the oracles are the plain forward pass, and appending."""
    config = smallest(variant)
    model, params = Decoder(config), init(config)
    tokens = np.random.default_rng(1).integers(0, 31, (2, width), np.int32)
    valid = np.ones((2, width), np.int32)
    valid[0, :4] = 0
    positions = np.maximum(np.cumsum(valid, axis=1, dtype=np.int32) - 1, 0)
    run = lambda cache, *x: jitted(model)({"params": params}, *x, cache=cache)
    whole = run(model.init_cache(2, width + 3), tokens, positions, valid)
    assert not whole.cache.empty and int(whole.cache.index) == width
    alone = jitted(model)({"params": params}, tokens[:1, 4:]).logits
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
    found = to_numpy(whole.logits)
    chex.assert_trees_all_close(found[:1, 4:], alone, rtol=1e-4, atol=1e-4)
    cache, parts = dataclasses.replace(model.init_cache(2, width + 3), empty=False), []
    for cut in (slice(0, 6), slice(6, width)):
        output = run(cache, tokens[:, cut], positions[:, cut], valid[:, cut])
        cache, parts = output.cache, [*parts, output.logits]
    keep = valid[:, :, None] > 0
    logits = np.concatenate(parts, axis=1)
    chex.assert_trees_all_close(found * keep, logits * keep, rtol=1e-4, atol=1e-4)
    counted = np.pad(valid, ((0, 0), (0, 3)))[:, None, :, None]
    filled, cache = to_numpy((whole.cache, cache))
    for layer in range(config.num_layers):
        for new, old in (
            (filled.values[layer], cache.values[layer]),
            (filled.keys[layer].swapaxes(2, 3), cache.keys[layer].swapaxes(2, 3)),
        ):
            chex.assert_trees_all_close(new * counted, old * counted, rtol=1e-4, atol=1e-4)


def test_mistakes_are_explained(config):
    params = stack_layers(init(config))
    model = Decoder(config)
    with pytest.raises(ValueError, match="unstack_layers"):
        model.apply({"params": params}, TOKENS, cache=model.init_cache(1, 16))
    with pytest.raises(ValueError, match="unknown policy 'some'; expected one of none, lean"):
        Decoder(config, remat="some").apply({"params": params}, TOKENS)
    some = adapt(jax.random.key(0), unstack_layers(params), {"layers/1/.*/kernel": lora(2)})
    with pytest.raises(ValueError, match="2 different structures"):
        stack_layers(some)
    with pytest.raises(ValueError, match="windows has 3 entries for 2 layers"):
        dataclasses.replace(config, windows=(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"
    ):
        dataclasses.replace(config, num_kv_heads=3)
    with pytest.raises(ValueError, match="vocab_size must be positive, got 0"):
        DecoderConfig(0, 1, 1, 1, 1, 1, 1)


def test_a_token_beyond_the_vocabulary_is_seen():
    config = tiny_config(vocab_size=31)
    logits = Decoder(config).apply({"params": init(config)}, jnp.array([[31]])).logits
    assert jnp.all(jnp.isnan(logits))
