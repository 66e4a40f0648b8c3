"""Dimensions of public models by name, as their config.json has them, to compile steps without files."""

from __future__ import annotations

from typing import Any

_LLAMA = dict(
    model_type="llama", rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=131072,
    tie_word_embeddings=False, vocab_size=128256, num_key_value_heads=8, head_dim=128,
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)  # fmt: skip
# Dimensions of public models, as their config.json has them.
PRESETS: dict[str, dict[str, Any]] = {
    "llama3-1b": _LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        head_dim=64, tie_word_embeddings=True,
    ),
    "llama3-8b": _LLAMA | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama3-70b": _LLAMA | dict(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288,
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "llama3-3b": _LLAMA | dict(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        tie_word_embeddings=True,
    ),
    "codellama-7b": _LLAMA | dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32016, rope_theta=1e6, rope_scaling=None,
        max_position_embeddings=16384,
    ),
    # OLMo's dimensions in the Llama family, whose norms have scales.
    "olmo-1b": _LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=50304, rope_theta=1e4, rope_scaling=None,
        max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "smollm2-135m": _LLAMA | dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49152, rope_theta=1e5, rope_scaling=None,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "qwen2.5-3b": dict(  # and the text part of Qwen2.5-VL-3B
        model_type="qwen2", vocab_size=151936, hidden_size=2048, intermediate_size=11008,
        num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=131072, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
    ),
    "r1-distill-qwen-1.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
        num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        max_position_embeddings=131072, rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "gpt2": dict(model_type="gpt2", vocab_size=50257, n_embd=768, n_layer=12, n_head=12, n_positions=1024),
    "roberta-base": dict(
        model_type="roberta", vocab_size=50265, hidden_size=768, intermediate_size=3072,
        num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=514, type_vocab_size=1,
        layer_norm_eps=1e-5, pad_token_id=1,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "gemma3-27b": dict(
        model_type="gemma3_text", vocab_size=262208, hidden_size=5376, intermediate_size=21504,
        num_hidden_layers=62, num_attention_heads=32, num_key_value_heads=16, head_dim=128,
        query_pre_attn_scalar=168, sliding_window=1024, max_position_embeddings=131072,
        rope_theta=1e6, rope_local_base_freq=1e4, rms_norm_eps=1e-6,
    ),
    "qwen2.5-vl-7b": dict(
        model_type="qwen2_5_vl", vocab_size=152064, hidden_size=3584, intermediate_size=18944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=128000, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), image_token_id=151655,
        vision_config=dict(
            depth=32, hidden_size=1280, hidden_act="silu", intermediate_size=3420, num_heads=16,
            in_channels=3, out_hidden_size=3584, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
        ),
    ),
    "qwen2.5-vl-3b": dict(
        model_type="qwen2_5_vl", vocab_size=151936, hidden_size=2048, intermediate_size=11008,
        num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        max_position_embeddings=128000, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]), image_token_id=151655,
        vision_config=dict(
            depth=32, hidden_size=1280, hidden_act="silu", intermediate_size=3420, num_heads=16,
            in_channels=3, out_hidden_size=2048, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
        ),
    ),
    # Of paligemma-3b-pt-224: one image of 224 x 224 pixels is 256 tokens.
    "paligemma-3b": dict(
        model_type="paligemma", image_token_index=257152, projection_dim=2048,
        text_config=dict(
            model_type="gemma", vocab_size=257216, hidden_size=2048, intermediate_size=16384,
            num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
        ),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
            num_hidden_layers=27, num_attention_heads=16, image_size=224, patch_size=14,
        ),
    ),
}  # fmt: skip
