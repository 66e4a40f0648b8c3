"""Gemma 4's parts that tests of all families do not see: caches, refusals, frequencies, unused tensors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import adapt, prefix, prompt
from jaxft.adapters.peft.soft import read_soft
from jaxft.checkpoints import CheckpointError, load_model, save_model
from jaxft.models import Decoder, Rope, config_of, stack_layers
from jaxft.models.rope import rope_frequencies
from jaxft.train.optimizer import decay_mask
from tests.small_models import GEMMA4, LLAMA, base

FULL, SLIDING = "full_attention", "sliding_attention"
FILE = dict(
    model_type="gemma4_text", vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, global_head_dim=12, sliding_window=5,
    layer_types=[SLIDING, FULL] * 2, num_kv_shared_layers=2, hidden_size_per_layer_input=6,
    vocab_size_per_layer_input=29,
)  # fmt: skip
KEY = jax.random.key(0)


def test_a_cache_holds_shared_keys_and_values_once():
    model, params = base(GEMMA4)
    tokens = jnp.arange(6)[None]
    cache = model.init_cache(1, 8)
    assert [x.shape for x in cache.keys] == [(1, 2, 6, 8), (1, 1, 12, 8)]
    filled = jax.jit(lambda c: model.apply({"params": params}, tokens, cache=c).cache)(cache)
    assert [x.shape for x in filled.values] == [(1, 2, 8, 6), (1, 1, 8, 12)]
    assert "key" not in params["layers"]["2"]["attention"]
    assert "value" not in params["layers"]["1"]["attention"]


@pytest.mark.parametrize("share, factor", [(0.25, 1.0), (0.6, 2.0), (1.0, 1.0)])
def test_proportional_frequencies_are_those_of_transformers(share, factor):
    hf = pytest.importorskip("transformers")
    part = dict(
        rope_type="proportional", rope_theta=1e4, partial_rotary_factor=share, factor=factor
    )
    rope = config_of(FILE | dict(rope_parameters={FULL: part, SLIDING: part})).rope
    assert rope == Rope(1e4, "proportional", share, factor)
    config = hf.LlamaConfig(hidden_size=24, num_attention_heads=1, rope_parameters=part)
    wanted, one = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["proportional"](config)
    np.testing.assert_allclose(rope_frequencies(rope, 24), wanted, rtol=1e-6)
    assert one == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_kv_shared_layers=4), "the last 4 of 4 layers read the keys"),
        (dict(num_kv_shared_layers=3), "not all kinds have one"),
        (dict(per_layer_config={"1": {"head_dim": 8}}), r"unlike \(head_dim, num_key_value_heads\)"),
        (dict(per_layer_config={"9": {"head_dim": 8}}), r'by layer \("0" to "3"\)'),
        (dict(per_layer_config={"1": {"sliding_window": 8}}), "head_dim and num_key_value_heads"),
        (dict(per_layer_config=None), "per_layer_config is None; expected positive"),
        (dict(global_head_dim=7), "heads of 7 features, 2 of them"),
        (dict(enable_moe_block=True, num_experts=4), "num_experts 4, top_k_experts None"),
        (dict(enable_moe_block=True, num_experts=2, top_k_experts=3, moe_intermediate_size=8), "at most"),
        (dict(use_bidirectional_attention="all"), 'attention is "all".*expected null'),
        (dict(rope_parameters={}), "expected full_attention and sliding_attention"),
        (dict(rope_parameters={FULL: {"rope_type": "yarn"}, SLIDING: {}}), "expected rope_type 'default'"),
        (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling is"),
        (dict(hidden_size_per_layer_input=-1), "is -1, expected 0"),
        (dict(final_logit_softcapping=0.0), "softcapping is 0.0, expected a positive"),
        (dict(model_type="gemma3n_text"), "model_type is 'gemma3n_text'; supported: .*gemma4_text"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_of(FILE | change)


def test_virtual_tokens_are_refused():
    _, params = base(GEMMA4)
    with pytest.raises(ValueError, match="prompt: this model has per-layer embeddings"):
        adapt(KEY, params, {"prompt": prompt(2)})
    with pytest.raises(ValueError, match="prefix: layers of this model have keys of several"):
        adapt(KEY, params, {"prefix": prefix(2)})
    for name, kind in (("prompt", "PROMPT_TUNING"), ("prefix", "PREFIX_TUNING")):
        with pytest.raises(ValueError, match=f"a {name} h"):
            tokens = jnp.zeros((1, 2), jnp.int32)
            Decoder(GEMMA4).apply({"params": {**params, name: jnp.zeros((2, 16))}}, tokens)
        with pytest.raises(ValueError, match=f"a {name} h"):
            read_soft({"peft_type": kind, "num_virtual_tokens": 2}, {}, GEMMA4, params)


def test_layers_of_several_sizes_are_not_stacked():
    config = dataclasses.replace(
        LLAMA, windows=(3, None), full_heads=dataclasses.replace(GEMMA4.full_heads, tied=False)
    )
    with pytest.raises(ValueError, match="leaves of the 2 layers have 2 different shapes"):
        stack_layers(base(config)[1])


def test_keys_that_no_layer_reads_are_ignored_and_constants_stay(tmp_path):
    """Google's files hold keys and values of layers that do not use them, as transformers ignores them."""
    model = Decoder(config_of(FILE))
    params = model.init(KEY, model.example_input())["params"]
    save_model(tmp_path, model, params)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if ".0.self_attn.k" in name or ".0.self_attn.v" in name]
    save_file(
        tensors | {n.replace(".0.", ".2."): tensors[n] for n in names}, file, {"format": "pt"}
    )
    again = load_model(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert not decay_mask(params)["layers"]["0"]["layer_scale"]
