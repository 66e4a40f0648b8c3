"""The metadata keys of models that llama.cpp knows, with the values at which each has no effect.

Sources: the `gguf` package's constants, with which a test compares this table, and llama.cpp's older names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from jaxft.models.errors import CheckpointError

# Keys without effect on a decoder: its origin, pooling, or parts of a mixture of experts, which is absent if
# expert_count is 0.
_HARMLESS = """
    decoder_start_token_id expert_chunk_feed_forward_length expert_feed_forward_length expert_gating_func
    expert_group_count expert_group_scale expert_group_used_count expert_shared_count
    expert_shared_feed_forward_length expert_used_count expert_weights_norm expert_weights_scale
    experts_per_group interleave_moe_layer_step leading_dense_block_count moe_every_n_layers moe_latent_size
    pooling_type rope.scaling.finetuned router_logit_softcapping tensor_data_layout
""".split()

# Neutral at 0 or False; factors, for which 0 means absent, also at 1.
_NEUTRAL_AT_ZERO = """
    activation_sparsity_scale altup.active_idx altup.num_inputs attention.clamp_kqv
    attention.decay_lora_rank attention.gate_lora_rank attention.group_norm_epsilon
    attention.group_norm_groups attention.iclr_lora_rank attention.indexer.head_count
    attention.indexer.key_length attention.indexer.top_k attention.key_length attention.key_length_mla
    attention.key_length_swa attention.kv_lora_rank attention.layer_norm_epsilon
    attention.layer_norm_rms_epsilon attention.max_alibi_bias attention.q_lora_rank
    attention.relative_buckets_count attention.scale attention.shared_kv_layers attention.sliding_window
    attention.sliding_window_pattern attention.temperature_length attention.temperature_scale
    attention.value_length attention.value_length_mla attention.value_length_swa
    attention.value_residual_mix_lora_rank attention.head_count attention.head_count_kv
    attn_logit_softcapping block_count classifier.output_labels context_length convnext.block_count
    convnext.embedding_length decoder_block_count dense_2_feat_in dense_2_feat_out dense_3_feat_in
    dense_3_feat_out embedding_length embedding_length_out embedding_length_per_layer_input expert_count
    features_length feed_forward_length final_logit_softcapping full_attention_interval kda.head_dim
    n_deepstack_layers nextn_predict_layers posnet.block_count posnet.embedding_length
    rescale_every_n_layers rope.dimension_count rope.dimension_count_swa rope.dimension_sections
    rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.alpha
    rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_beta_fast
    rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor rope.scaling.yarn_log_multiplier
    shortconv.l_cache ssm.conv_kernel ssm.dt_b_c_rms ssm.group_count ssm.inner_size ssm.state_size
    ssm.time_step_rank swiglu_clamp_exp swiglu_clamp_shexp swin_norm time_decay_extra_dim
    time_mix_extra_dim token_shift_count use_parallel_residual vocab_size wkv.head_size
""".split()
_FACTORS = """
    attention.output_scale embedding_scale logit_scale residual_scale rope.scaling.attn_factor
    rope.scaling.factor rope.scaling.yarn_attn_factor
""".split()

# key without the architecture -> values at which it has no effect; None: any value.
KEYS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(_HARMLESS),
    **dict.fromkeys(_NEUTRAL_AT_ZERO, (0,)),
    **dict.fromkeys(_FACTORS, (0, 1)),
    "attention.causal": (1,),
}


def check_keys(found: Iterable[tuple[str, Any]], reads: Collection[str], where: Any) -> None:
    """Raises CheckpointError for a key that changes the computation and is not read.

    Args:
        found: (key without the architecture, value) of a file. A key that llama.cpp does not know is ignored,
            as in llama.cpp.
        reads: the keys that are read.
        where: names the file.
    """
    for key, value in found:
        neutral = KEYS.get(key)
        if key in reads or neutral is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(v in neutral for v in values):
            raise CheckpointError(
                f"{where}: the key {key!r} is {_short(value)}, which llama.cpp knows and jaxft does not "
                f"compute for this architecture; expected {' or '.join(map(str, neutral))}, or no such key."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
