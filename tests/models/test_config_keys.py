"""Every key of config.json that transformers knows: equal to transformers, or refused.

The oracle is the installed transformers: its configuration classes for what a file means, and its models for
what a meaning computes.
"""

import dataclasses
import json

import numpy as np
import pytest

from jaxft.checkpoints import CheckpointError, load_model
from jaxft.checkpoints.configs import check_config, config_json
from jaxft.models import FAMILIES, config_of
from jaxft.models.family import find_family
from jaxft.models.hf_keys import NO_EFFECT
from jaxft.models.rope import attention_factor, rope_frequencies
from tests.models.real_configs import REAL, respelled

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")

FULL, SLIDING, STATE = "full_attention", "sliding_attention", "linear_attention"
SIZES = dict(
    vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
ENCODER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
BART = dict(
    vocab_size=37, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=32,
)  # fmt: skip
SEQ2SEQ = ("t5", "bart", "mbart", "marian", "whisper")
WHISPER = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | dict(
    num_mel_bins=5, max_source_positions=6, max_target_positions=32, decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
LINEAR = dict(rope_type="linear", factor=2.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
LONG = dict(
    rope_type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 4.0], factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
PROPORTIONAL = dict(rope_type="proportional", rope_theta=9.0, partial_rotary_factor=0.5, factor=2.0)
LATENT = SIZES | dict(
    num_key_value_heads=4, kv_lora_rank=6, q_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=6, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=8,
    n_group=2,
)  # fmt: skip
DELTA = SIZES | dict(
    head_dim=16, full_attention_interval=2, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=6, linear_value_head_dim=4,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=12,
)
WINDOW = dict(SIZES, head_dim=8, sliding_window=4)
BASES = {
    "llama": SIZES,
    "mistral": SIZES | dict(sliding_window=5),
    "qwen2": SIZES | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": WINDOW | dict(use_sliding_window=True, max_window_layers=1),
    # transformers computes no LongRoPE for heads whose size is null.
    "mixtral": SIZES | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=4),
    "qwen2_moe": SIZES
    | dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
    ),
    "qwen3_moe": SIZES
    | dict(
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        use_sliding_window=True,
        sliding_window=4,
    ),
    "qwen3_next": DELTA | EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {k: v for k, v in DELTA.items() if k != "intermediate_size"} | EXPERTS,
    "olmoe": SIZES | dict(num_experts=4, num_experts_per_tok=2),
    "gpt_oss": SIZES
    | dict(head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "deepseek_v2": LATENT | dict(topk_method="group_limited_greedy", topk_group=1),
    "deepseek_v3": LATENT | dict(topk_group=2, first_k_dense_replace=0),
    "gemma": SIZES | dict(head_dim=8),
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma4_text": WINDOW
    | dict(
        num_hidden_layers=4,
        layer_types=[SLIDING, FULL] * 2,
        global_head_dim=12,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=41,
        num_experts=3,
        top_k_experts=2,
        moe_intermediate_size=8,
    ),
    "phi3": SIZES | dict(pad_token_id=0, sliding_window=5),
    "smollm3": SIZES
    | dict(pad_token_id=0, use_sliding_window=True, sliding_window=4, no_rope_layer_interval=2),
    "olmo2": SIZES,
    "granite": SIZES | dict(attention_multiplier=0.5, logits_scaling=2.0),
    "gpt2": dict(vocab_size=37, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "t5": dict(
        vocab_size=37,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "bart": BART,
    "mbart": BART,
    "marian": BART | dict(pad_token_id=0, decoder_start_token_id=0),
    "whisper": WHISPER,
    "bert": ENCODER | dict(vocab_size=37, max_position_embeddings=32),
    "roberta": ENCODER | dict(vocab_size=37, max_position_embeddings=32),
    "xlm-roberta": ENCODER | dict(vocab_size=37, max_position_embeddings=32),
    "vit": ENCODER | dict(image_size=8, patch_size=4),
}
ACTIVATIONS = ["relu", "gelu", "gelu_new", "quick_gelu", "mish", None]
ROPES = [
    None, {}, LINEAR, dict(type="linear", factor=3.0), dict(rope_type="linear"),
    LINEAR | dict(factor=None), dict(rope_type="default", factor=3.0), dict(rope_theta=77.0),
    dict(rope_type="dynamic", factor=2.0), dict(rope_type="dynamic"), dict(rope_type="longrope", factor=2.0),
    LONG, LONG | dict(factor=None), LONG | dict(attention_factor=1.2), LONG | dict(short_factor=[1.0]),
    dict(LONG, rope_type="su"), LONG | dict(long_factor=None), LONG | dict(partial_rotary_factor=0.5),
    dict(rope_type="proportional", rope_theta=9.0), dict(rope_type="mrope"),
    LINEAR | dict(partial_rotary_factor=0.5), YARN, YARN | dict(attention_factor=1.5),
    YARN | dict(beta_fast=8.0, beta_slow=2.0), YARN | dict(beta_fast=0, beta_slow=None),
    YARN | dict(mscale=1.0, mscale_all_dim=0.5), YARN | dict(mscale=0.7), YARN | dict(truncate=False),
    YARN | dict(truncate=None), YARN | dict(factor=None), dict(rope_type="yarn", factor=4.0),
    dict(rope_type="yarn"), LLAMA3, LLAMA3 | dict(low_freq_factor=None),
    dict(rope_type={}), LINEAR | dict(factor=-2.0), YARN | dict(mscale="1", mscale_all_dim=1.0),
    dict(rope_type="default", rope_theta=float("inf")),
    {FULL: LINEAR, SLIDING: {}}, {FULL: YARN | dict(truncate=False)}, {SLIDING: LLAMA3}, {FULL: None},
    3, {FULL: 3}, {FULL: PROPORTIONAL, SLIDING: LINEAR | dict(rope_theta=5.0)},
    {FULL: PROPORTIONAL | dict(partial_rotary_factor=2.0), SLIDING: PROPORTIONAL},
]  # fmt: skip
# Legal values of another kind than the default, and some that transformers refuses.
FLIPS = dict(
    attention_bias=[True, None], mlp_bias=[True], tie_word_embeddings=[True, False, None],
    hidden_act=ACTIVATIONS, hidden_activation=ACTIVATIONS, activation_function=ACTIVATIONS,
    num_key_value_heads=[4, 1, None, 3, 0, -2], num_attention_heads=[2, 8, 0], n_head=[2, 0, 3],
    head_dim=[4, None, 7],
    rms_norm_eps=[1e-2, None], layer_norm_eps=[1e-2], layer_norm_epsilon=[1e-2],
    max_position_embeddings=[128], n_positions=[128], hidden_size=["16"], n_inner=[24, None, "24"],
    intermediate_size=[40], num_hidden_layers=[2.0], vocab_size=[40],
    sliding_window=[None, 3, 0], use_sliding_window=[False, True], max_window_layers=[0, 2],
    full_attention_interval=[1, 0, None], linear_conv_kernel_dim=[2, 1, 0], linear_key_head_dim=[4, 5, 0],
    linear_value_head_dim=[6], linear_num_key_heads=[4, 3, 0], linear_num_value_heads=[2, 3, 8],
    layer_types=[[SLIDING, FULL], [STATE, STATE], [FULL, STATE], [FULL, FULL], [FULL],
                 ["chunked_attention", FULL], None, 2, [[FULL], FULL], [SLIDING, SLIDING, FULL, SLIDING],
                 [FULL] * 4],
    sliding_window_pattern=[2, 0], rope_local_base_freq=[30.0], rope_theta=[50.0, 500],
    rope_scaling=ROPES, rope_parameters=ROPES, original_max_position_embeddings=[32],
    partial_rotary_factor=[0.5, 1.0, 0.0, None, 2.0], no_rope_layers=[[1, 0], [0, 0], [1], [0, 1, 1], None],
    no_rope_layer_interval=[1, 0], embedding_multiplier=[12, 0.5], residual_multiplier=[0.22, 0],
    attention_multiplier=[0.25, 0], logits_scaling=[8, 0.5, 0],
    use_bidirectional_attention=[True, False, None, "all", "vision"],
    global_head_dim=[8, 16, 7, None], num_global_key_value_heads=[1, 3, None],
    attention_k_eq_v=[True], num_kv_shared_layers=[1, 2, 4, -1], use_double_wide_mlp=[True],
    hidden_size_per_layer_input=[0, 4, -1], vocab_size_per_layer_input=[50, 0],
    enable_moe_block=[True], top_k_experts=[1, 4, None],
    query_pre_attn_scalar=[10, 0], attn_logit_softcapping=[2.0, None, 0.0],
    final_logit_softcapping=[3.0, None, "3"], is_causal=[False, True], is_decoder=[True],
    is_encoder_decoder=[True], add_cross_attention=[True], per_layer_config=[
        None, {"0": {"skip": []}}, {}, {"3": {"head_dim": 4}}, {"4": {"head_dim": 4}},
        {"3": {"head_dim": True}},
        {"0": {"head_dim": 4}}, {str(i): {"num_key_value_heads": 1, "head_dim": 6} for i in range(3)}, 3,
        {str(i): {"num_key_value_heads": 1 + i % 2, "head_dim": 6 + 2 * (i % 2)} for i in range(4)},
    ],
    pruned_heads=[{"0": [1]}], position_embedding_type=["relative_key", "absolute"],
    scale_attn_weights=[False], scale_attn_by_inverse_layer_idx=[True], reorder_and_upcast_attn=[True],
    type_vocab_size=[3, -1], pad_token_id=[0, 5], qkv_bias=[False], num_channels=[1],
    image_size=[[8, 8], 12, 0], patch_size=[[4, 4], [4, 2], 2, 0], pooler_output_size=[16, 8, "16"],
    pooler_act=["relu"],
    attention_dropout=[0.3], resid_pdrop=[0.3], hidden_dropout_prob=[0.3], initializer_range=[0.5],
    chunk_size_feed_forward=[2], pretraining_tp=[2], use_cache=[False], output_hidden_states=[True],
    num_experts=[3, 1, 0, None], num_local_experts=[3, 1, 0],
    num_experts_per_tok=[3, 1, 0, 9, -1, "2", 2.0, True, [2], {}],
    moe_intermediate_size=[10, 0], shared_expert_intermediate_size=[10, 0], norm_topk_prob=[True, False],
    decoder_sparse_step=[2, 3, 0, -1, 1.0, "2"],
    mlp_only_layers=[[], [0], [1, 7], [0, 1], None, ["0"], 1, "0", {}, [0.0], [[0]], [-1]],
    output_router_logits=[True], router_aux_loss_coef=[0.5, 0.0, None], router_jitter_noise=[0.1],
    clip_qkv=[2.0, None, 0.0],
    dense_act_fn=["relu", "gelu_new"], is_gated_act=[False, True],
    feed_forward_proj=["gated-gelu", "gelu", "gated-silu", "silu", "gated", "a-relu", "gated-relu-x", None],
    d_model=[32, 0], d_kv=[8, None], d_ff=[8], num_layers=[1], num_decoder_layers=[1, None, 0], num_heads=[2],
    relative_attention_num_buckets=[16, 3, 0], relative_attention_max_distance=[64, 16],
    scale_decoder_outputs=[False, True], encoder_layers=[1, None, 0], decoder_layers=[1],
    encoder_attention_heads=[2, 3], decoder_attention_heads=[8, 5], encoder_ffn_dim=[8, None],
    decoder_ffn_dim=[8], scale_embedding=[True, None], decoder_vocab_size=[37, 40, None],
    num_mel_bins=[7, 0, None], max_source_positions=[8, 0], max_target_positions=[16, "16"],
    suppress_tokens=[[1, 2], None], begin_suppress_tokens=[[3], None], apply_spec_augment=[True],
    share_encoder_decoder_embeddings=[False], dropout=[0.5], encoder_layerdrop=[0.5], init_std=[1.0],
    decoder_start_token_id=[3, None, [3]], forced_eos_token_id=[3, None, "3"], forced_bos_token_id=[3, None],
    swiglu_alpha=[1.0, 0.0], swiglu_limit=[2.0, -1.0],
    kv_lora_rank=[8, 0], q_lora_rank=[6, None, 0], qk_nope_head_dim=[8, 0], qk_rope_head_dim=[2, 3],
    v_head_dim=[4, None], n_routed_experts=[8, 5], n_shared_experts=[2, 0], n_group=[1, 4, 3, None],
    topk_group=[1, 3, None], topk_method=["greedy", "noaux_tc", None], first_k_dense_replace=[1, 2, None],
    routed_scaling_factor=[2.0, float("inf")], rope_interleave=[False, None], num_mtp_layers=[0],
    summary_type=["last"], classifier_dropout=[0.5], encoder_stride=[4], tie_last_hidden_states=[False],
)  # fmt: skip
BY_NAME = pytest.mark.parametrize("name", BASES)


def theirs(file):
    """transformers' configuration of a config.json."""
    kind = "ministral" if file["model_type"] == "mistral" and "layer_types" in file else None
    return hf.CONFIG_MAPPING[kind or file["model_type"]].from_dict(json.loads(json.dumps(file)))


def flips(name):
    """Each file that has one key changed which transformers knows, or, a key of the base, left out."""
    base, codec = {"model_type": name} | BASES[name], find_family(name, FAMILIES).huggingface
    fields = {field.name for field in dataclasses.fields(hf.CONFIG_MAPPING[name])}
    known = fields | codec.keys.defaults.keys() | codec.keys.aliases.keys()
    changed = [(key, base | {key: value}) for key in FLIPS if key in known for value in FLIPS[key]]
    left_out = [(key, {k: base[k] for k in base if k != key}) for key in BASES[name]]
    return [*changed, *left_out]


@BY_NAME
def test_the_tables_are_those_of_transformers(name):
    """A key that a new transformers adds, or a default that it changes, fails here."""
    codec, kind = find_family(name, FAMILIES).huggingface, hf.CONFIG_MAPPING[name]
    for field in dataclasses.fields(kind):
        if field.name in codec.keys.defaults:
            default, expected = codec.keys.defaults[field.name], field.default
            assert default == expected or not (default or expected), field.name
            if field.name in codec.reads and (
                "roberta" not in name or field.name != "pad_token_id"
            ):
                null = default is None or field.name in codec.keys.nullable
                assert null == ("None" in str(field.type)), field.name
        else:
            assert field.name in NO_EFFECT | codec.keys.no_effect, field.name
    # The alias, which is not a field, comes last in transformers too, and counts.
    fields = {field.name for field in dataclasses.fields(kind)}
    pairs = [pair[:: -1 if pair[0] in fields else 1] for pair in kind.attribute_map.items()]
    assert dict(codec.keys.aliases) == dict(pairs)
    rotary = {"rope_parameters"} | ({"rope_theta"} if name != "gemma4_text" else set())
    assert rotary <= codec.reads or not hasattr(kind, "rope_parameters")


@BY_NAME
def test_a_file_means_what_transformers_takes_it_for(name):
    """For each key: what we read from the file is what we read from transformers' own view of it."""
    refused, reads = 0, find_family(name, FAMILIES).huggingface.reads
    for key, file in flips(name):
        try:
            ours = config_of(file)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        try:
            view = theirs(file)
        except Exception as error:  # of several kinds; what we do not read may be wrong in any way
            assert key not in reads, (key, file.get(key), error)
            continue
        assert config_of(view.to_dict() | {"model_type": name}) == ours, (key, file.get(key))
    assert refused


@pytest.mark.parametrize("parameters", ROPES, ids=str)
def test_rotary_frequencies_are_those_of_transformers(parameters):
    file = {"model_type": "llama"} | SIZES | {"rope_scaling": parameters, "head_dim": 16}
    try:
        rope = config_of(file).rope
    except CheckpointError:
        return
    frequencies = rope.theta ** -(np.arange(0, 16, 2) / 16), 1.0
    if rope.scaling != "default":
        view = theirs(file)
        scaled = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS[view.rope_parameters["rope_type"]]
        frequencies = scaled(view)
    np.testing.assert_allclose(rope_frequencies(rope, 16), frequencies[0], rtol=1e-6)
    factor = attention_factor(rope)
    assert factor == pytest.approx(frequencies[1])


# All that a family reads, at once, beside what the parity tests of tests/checkpoints have.
CHANGED = {
    "llama": dict(hidden_act="relu", rms_norm_eps=1e-2, num_key_value_heads=4, rope_theta=50.0),
    "mistral": dict(sliding_window=3, hidden_act="gelu", tie_word_embeddings=True, num_attention_heads=2),
    "qwen2": dict(layer_types=[SLIDING, FULL], hidden_act="relu", rope_scaling=LINEAR, head_dim=8),
    "qwen3": dict(attention_bias=True, max_window_layers=0, tie_word_embeddings=True),
    "mixtral": dict(sliding_window=3, num_experts_per_tok=3, num_local_experts=3, hidden_act="relu"),
    "qwen2_moe": dict(
        norm_topk_prob=True, decoder_sparse_step=2, qkv_bias=False, use_sliding_window=True, sliding_window=3,
        shared_expert_intermediate_size=10, moe_intermediate_size=12,
    ),
    "qwen3_moe": dict(norm_topk_prob=True, mlp_only_layers=[0], attention_bias=True, sliding_window=3),
    "qwen3_next": dict(
        layer_types=[FULL, STATE], norm_topk_prob=False, decoder_sparse_step=2, attention_bias=True,
        hidden_act="gelu", partial_rotary_factor=0.5, linear_conv_kernel_dim=2, linear_num_key_heads=1,
        linear_key_head_dim=3, linear_value_head_dim=5, rope_scaling=YARN, rms_norm_eps=1e-2,
        shared_expert_intermediate_size=10, num_key_value_heads=1,
    ),
    "qwen3_5_text": dict(
        layer_types=[FULL, STATE], linear_conv_kernel_dim=1, linear_num_value_heads=2,
        tie_word_embeddings=True, partial_rotary_factor=1.0, rope_theta=50.0,
    ),
    "qwen3_5_moe_text": dict(
        num_experts_per_tok=3, linear_num_value_heads=8, attention_bias=True, rope_scaling=LINEAR,
    ),
    "olmoe": dict(clip_qkv=0.5, norm_topk_prob=True, attention_bias=True, num_key_value_heads=4),
    "gpt_oss": dict(
        attention_bias=False, swiglu_alpha=1.0, swiglu_limit=0.5, sliding_window=3, tie_word_embeddings=True,
        layer_types=[FULL, SLIDING], rope_scaling=LINEAR, num_experts_per_tok=3,
    ),
    "deepseek_v2": dict(
        first_k_dense_replace=1, topk_method="greedy", q_lora_rank=None, n_shared_experts=2,
        hidden_act="relu", routed_scaling_factor=3.0, attention_bias=True,
        rope_scaling=YARN | dict(mscale_all_dim=0.5),
    ),
    "deepseek_v3": dict(
        first_k_dense_replace=1, rope_interleave=False, norm_topk_prob=False, topk_group=1, v_head_dim=4,
        attention_bias=True, rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.5),
        tie_word_embeddings=True,
    ),
    "gemma": dict(attention_bias=True, hidden_act="relu", tie_word_embeddings=False),
    "gemma2": dict(
        attention_bias=True, hidden_activation="relu", query_pre_attn_scalar=3, attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0, layer_types=[FULL, SLIDING],
    ),
    "gemma3_text": dict(
        attention_bias=True, sliding_window_pattern=2, rope_local_base_freq=30.0, rope_scaling=YARN,
        final_logit_softcapping=2.0,
    ),
    "gemma4_text": dict(
        attention_k_eq_v=True, num_global_key_value_heads=1, num_kv_shared_layers=2, use_double_wide_mlp=True,
        layer_types=[FULL, SLIDING, SLIDING, FULL], enable_moe_block=True, hidden_activation="relu",
        attention_bias=True, final_logit_softcapping=2.0, vocab_size_per_layer_input=50,
        rope_parameters={FULL: PROPORTIONAL, SLIDING: LINEAR | dict(rope_theta=5.0)},
    ),
    "phi3": dict(hidden_act="relu", sliding_window=None, rope_scaling=LONG | dict(short_factor=[1.0] * 2)),
    "smollm3": dict(no_rope_layers=[0, 1], attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "olmo2": dict(attention_bias=True, hidden_act="relu", rms_norm_eps=1e-2),
    "granite": dict(
        attention_bias=True, mlp_bias=True, embedding_multiplier=3.0, residual_multiplier=0.5,
        attention_multiplier=0.3, logits_scaling=3.0,
    ),
    "gpt2": dict(scale_attn_weights=False, n_inner=24, activation_function="gelu", layer_norm_epsilon=0.1),
    "t5": dict(
        feed_forward_proj="gated-silu", layer_norm_epsilon=0.1, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, num_decoder_layers=1, scale_decoder_outputs=False, d_kv=6,
    ),
    "bart": dict(activation_function="relu", scale_embedding=True, decoder_ffn_dim=20, encoder_layers=1),
    "mbart": dict(activation_function="silu", scale_embedding=True),
    "marian": dict(activation_function="relu", scale_embedding=True, encoder_attention_heads=2),
    "whisper": dict(
        activation_function="relu", encoder_attention_heads=2, decoder_ffn_dim=20, encoder_layers=1,
        num_mel_bins=3, max_source_positions=4, max_target_positions=12,
    ),
    "bert": dict(hidden_act="gelu_new", layer_norm_eps=0.1, type_vocab_size=3),
    "roberta": dict(pad_token_id=5, hidden_act="relu", type_vocab_size=1),
    "xlm-roberta": dict(pad_token_id=5, hidden_act="relu", type_vocab_size=1),
    "vit": dict(qkv_bias=False, hidden_act="gelu_new", image_size=[8, 8], layer_norm_eps=0.1),
}  # fmt: skip


@BY_NAME
def test_logits_of_changed_files_equal_those_of_transformers(name, tmp_path):
    base = {"model_type": name} | BASES[name]
    file = base | CHANGED[name]
    for key in CHANGED[name]:
        without = {k: file[k] for k in file if k != key} | {k: base[k] for k in base if k == key}
        meant = config_of(file), config_of(without)
        assert meant[0] != meant[1] or (key, file[key]) in [("image_size", [8, 8])], key
    encodes, hears = name in ("bert", "roberta", "xlm-roberta", "vit"), name == "whisper"
    kind = hf.AutoModelForSeq2SeqLM if name in SEQ2SEQ else hf.AutoModelForCausalLM
    kind = hf.AutoModelForSpeechSeq2Seq if hears else kind
    kind = hf.AutoModel if encodes else kind
    torch.manual_seed(0)
    model = kind.from_config(theirs(file), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's positions are computed
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(file))
    ours, params = load_model(tmp_path)
    inputs = np.arange(9)[None] * 37 % 31 + 6
    if name == "vit":
        inputs = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    given = torch.tensor(np.moveaxis(inputs, -1, 1) if name == "vit" else inputs)
    sound = np.random.default_rng(0).normal(size=(1, 8, 3)).astype(np.float32) if hears else None
    with torch.no_grad():
        read = {"decoder_input_ids": given} if name in SEQ2SEQ else {}  # which is the source too
        given = torch.tensor(sound).mT if hears else given
        expected = model(given, **read)[0].numpy()
    output = ours.apply({"params": params}, inputs, **({"source": sound} if hears else {}))
    found = output.logits if hasattr(output, "logits") else output.hidden
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def same(view, other):
    """True if two configurations of transformers are one, as they stand in its own files."""
    apart = {"dtype", "architectures", "transformers_version"}
    plain = lambda config: {k: v for k, v in config.to_dict().items() if k not in apart}
    return type(view) is type(other) and plain(view) == plain(other)


@BY_NAME
def test_a_config_goes_back_as_it_came(name, tmp_path):
    mine = dict(
        id2label={"0": "no", "1": "yes", "2": "?"},
        initializer_range=0.3,
        my_note="kept",
        eos_token_id=[1, 2],
    )
    family, base = find_family(name, FAMILIES), {"model_type": name} | BASES[name]
    for file in (base | mine, base | CHANGED[name] | mine):
        config = config_of(file)
        written = config_json(family, config, "float32")
        assert same(theirs(written), theirs(file)) and written.items() >= mine.items()
        bare = dataclasses.replace(config, source="")  # as from a GGUF file
        (tmp_path / "config.json").write_text(json.dumps(config_json(family, bare, "float32")))
        check_config(tmp_path, family, bare)
        if name == "vit":
            continue
        larger = config_json(family, dataclasses.replace(config, vocab_size=40), "float32")
        changed = {k: v for k, v in larger.items() if written.get(k) != v}
        assert changed.pop("decoder_vocab_size", 40) == 40  # Marian's other name of it
        assert changed == {"vocab_size": 40}


@pytest.mark.parametrize("window", [None, 4])
def test_a_mistral_stays_a_mistral(window):
    """transformers takes one with layer_types for a Ministral, which fails without a window."""
    family, file = find_family("mistral", FAMILIES), {"model_type": "mistral"} | SIZES
    for source in ("", json.dumps(file | {"sliding_window": window})):
        config = config_of(file | {"sliding_window": window})
        view = theirs(config_json(family, dataclasses.replace(config, source=source), "float32"))
        assert type(view) is hf.MistralConfig and view.sliding_window == window


def test_labels_of_a_source_do_not_stand_on_a_reward_head():
    family = find_family("llama", FAMILIES)
    file = {"model_type": "llama", "architectures": ["LlamaModel"]} | SIZES
    labels = {"id2label": {"0": "a", "1": "b"}, "problem_type": "single_label_classification"}
    config = config_of(file | labels)
    written = config_json(family, config, "float32", reward=True)
    assert written["architectures"] == ["LlamaForSequenceClassification"]
    assert theirs(written).num_labels == 1 and theirs(written).problem_type is None
    assert config_json(family, config, "float32")["architectures"] == ["LlamaForCausalLM"]


def test_a_config_that_reads_otherwise_is_not_left_unsaid(tmp_path):
    family, file = find_family("gemma2", FAMILIES), {"model_type": "gemma2"} | BASES["gemma2"]
    config = config_of(file)
    wrong = [({"attn_logit_softcapping": 7.0}, "attention_softcap is 7.0, saved was 50.0")]
    wrong += [
        ({"layer_types": [FULL]}, "expected one of"),
        ({"eos_token_id": "2"}, "transformers cannot"),
    ]
    for change, message in wrong:
        (tmp_path / "config.json").write_text(json.dumps(file | change))
        with pytest.raises(CheckpointError, match=message):
            check_config(tmp_path, family, config)


def test_a_scale_of_attention_that_follows_from_heads_need_not_be_said(tmp_path):
    """A config as GGUF files give it."""
    family, file = find_family("gemma2", FAMILIES), {"model_type": "gemma2"} | BASES["gemma2"]
    config = dataclasses.replace(config_of(file), attention_scale=None, source="")
    (tmp_path / "config.json").write_text(json.dumps(config_json(family, config, "float32")))
    check_config(tmp_path, family, config)


def test_yarn_over_the_original_length_may_use_its_factor():
    file = (
        {"model_type": "qwen2"}
        | SIZES
        | {"rope_scaling": YARN | dict(original_max_position_embeddings=64)}
    )
    assert config_of(file).max_length == 256
    assert config_of(file | {"max_position_embeddings": 512}).max_length == 512


@pytest.mark.parametrize("name", REAL)
def test_real_files_mean_what_transformers_takes_them_for(name):
    """The config.json of checkpoints that are much used, in the spelling of transformers 4 and of 5."""
    old, read = REAL[name], []
    family = find_family(old["model_type"], FAMILIES)
    for file in (old, respelled(old)):
        config = config_of(file)
        read.append(config)
        assert config_of(theirs(file).to_dict() | {"model_type": family.name}) == config
        written = config_json(family, config, "float32")
        assert same(theirs(written), theirs(file))
        own = family.huggingface.keys.renamed(file)
        own = {k: v for k, v in own.items() if k not in ("dtype", "torch_dtype", "architectures")}
        assert written.items() >= own.items()
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama", dict(num_key_value_heads=0), "num_key_value_heads is 0, expected 1 or more"),
        (
            "llama",
            dict(num_key_value_heads=3),
            "num_attention_heads is 4 and num_key_value_heads 3",
        ),
        ("llama", dict(head_dim=7), "head_dim, or hidden_size over num_attention_heads, is 7"),
        (
            "llama",
            dict(rms_norm_eps=float("nan")),
            "rms_norm_eps is nan, expected a small positive",
        ),
        ("llama", dict(hidden_act="mish"), r"unsupported activation 'mish' \(hidden_act"),
        ("llama", dict(partial_rotary_factor=0.0), "partial_rotary_factor is 0.0"),
        ("llama", dict(rope_scaling=LINEAR | {"factor": -2}), "factor: -2, expected a positive"),
        (
            "llama",
            dict(rope_scaling=YARN | {"beta_fast": "x"}),
            "beta_fast: 'x', expected a positive",
        ),
        ("mistral", dict(layer_types=[[FULL], FULL]), "layer_types is"),
        ("gemma3_text", dict(sliding_window_pattern=0), "sliding_window_pattern is 0, expected 1"),
        ("gpt2", dict(n_head=3), "n_embd is 16 and n_head 3, expected a divisor"),
        ("bert", dict(num_attention_heads=3), "hidden_size is 16 and num_attention_heads 3"),
        ("vit", dict(patch_size=0), "patch_size is 0"),
    ],
)
def test_values_that_no_model_can_have_are_refused_by_their_key(name, change, message):
    with pytest.raises(CheckpointError, match=message):
        config_of({"model_type": name} | BASES[name] | change)


def test_integers_for_floats_are_written_as_transformers_5_takes_them():
    """transformers 4 read them, and 5 refuses them: a model would be trained and not be saved."""
    ints = dict(final_logit_softcapping=30, attn_logit_softcapping=50, initializer_range=1)
    file = {"model_type": "gemma2"} | BASES["gemma2"] | ints
    with pytest.raises(Exception, match="expected float, got int"):
        theirs(file)
    written = config_json(find_family("gemma2", FAMILIES), config_of(file), "float32")
    assert theirs(written).final_logit_softcapping == 30.0


def test_errors_name_key_value_and_what_is_right():
    file = {"model_type": "gemma3_text"} | BASES["gemma3_text"]
    with pytest.raises(
        CheckpointError, match="use_bidirectional_attention is true.*expected false"
    ):
        config_of(file | {"use_bidirectional_attention": True})
    with pytest.raises(CheckpointError, match="attn_logit_softcapping is 50.0.*expected null"):
        config_of(file | {"attn_logit_softcapping": 50.0})  # Gemma 2's; transformers ignores it
    with pytest.raises(CheckpointError, match="unsupported rope scaling 'mrope'.*known: default"):
        config_of(
            {"model_type": "llama"} | SIZES | {"rope_scaling": {"type": "mrope", "factor": 2}}
        )
