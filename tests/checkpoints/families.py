"""Small random transformers models of every family, the oracles of the parity tests."""

import torch
import transformers as hf

BASE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Layers that differ: one more, so that they make no whole number of their patterns.
MIXED = BASE | dict(num_hidden_layers=3)
LATENT = BASE | dict(
    num_key_value_heads=4,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    n_routed_experts=6,
    moe_intermediate_size=8,
    routed_scaling_factor=1.5,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0, 1.5], long_factor=[1.5, 4.0])
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
DEFAULT = dict(rope_type="default", rope_theta=1e5)
GEMMA3 = {
    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}
GEMMA4 = BASE | dict(
    head_dim=8,
    global_head_dim=8,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
    vocab_size_per_layer_input=61,
    hidden_size_per_layer_input=6,
    final_logit_softcapping=9.0,
)

FAMILIES = {
    "llama2": lambda: hf.LlamaConfig(**BASE, rope_parameters=LINEAR, attention_bias=True),
    "llama3": lambda: hf.LlamaConfig(**BASE, rope_parameters=LLAMA3, mlp_bias=True),
    "smollm2": lambda: hf.LlamaConfig(**BASE, rope_parameters=DEFAULT, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**BASE, head_dim=8, sliding_window=5),
    "qwen2": lambda: hf.Qwen2Config(
        **MIXED,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        rope_parameters=YARN,
    ),
    "qwen3": lambda: hf.Qwen3Config(**BASE, head_dim=12),
    "gemma": lambda: hf.GemmaConfig(**BASE, head_dim=12),
    "gemma2": lambda: hf.Gemma2Config(
        **MIXED, head_dim=12, sliding_window=4, query_pre_attn_scalar=10, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **MIXED,
        head_dim=12,
        sliding_window=4,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
        rope_parameters=GEMMA3,
    ),
    # The source of the layer with a window is not the first of its kind.
    "gemma4": lambda: hf.Gemma4TextConfig(
        **GEMMA4
        | dict(
            num_hidden_layers=5,
            global_head_dim=12,
            layer_types=["sliding_attention"] * 2 + ["full_attention"] + GEMMA4["layer_types"],
        ),
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        attention_bias=True,
    ),
    "gemma4_moe": lambda: hf.Gemma4TextConfig(
        **GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16
    ),
    # All texts of the tests are longer than the original length: transformers takes the longest of a batch.
    "phi3": lambda: hf.Phi3Config(
        **BASE,
        rope_parameters=dict(LONGROPE, partial_rotary_factor=0.5),
        sliding_window=6,
        original_max_position_embeddings=2,
    ),
    "smollm3": lambda: hf.SmolLM3Config(
        **MIXED, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=4
    ),
    "olmo2": lambda: hf.Olmo2Config(**BASE),
    "granite": lambda: hf.GraniteConfig(
        **BASE,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.2,
        logits_scaling=3.0,
    ),
    "mixtral": lambda: hf.MixtralConfig(
        **BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=5
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **MIXED,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **BASE,
        head_dim=12,
        num_experts=4,
        num_experts_per_tok=3,
        moe_intermediate_size=16,
        norm_topk_prob=True,
    ),
    "olmoe": lambda: hf.OlmoeConfig(**BASE, num_experts=4, num_experts_per_tok=2, clip_qkv=1.5),
    # Limits that gates and ups pass; 32 features are blocks of MXFP4.
    "gpt_oss": lambda: hf.GptOssConfig(
        **BASE | dict(intermediate_size=32),
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        swiglu_limit=1.0,
        swiglu_alpha=1.3,
        rope_parameters=YARN | dict(truncate=False),
    ),
    # Keys wider than values, and the other way round.
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **LATENT,
        q_lora_rank=None,
        v_head_dim=6,
        n_group=3,
        topk_group=2,
        topk_method="group_limited_greedy",
        num_experts_per_tok=3,
        n_shared_experts=2,
        rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.9),
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **LATENT,
        q_lora_rank=10,
        v_head_dim=14,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=61,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}


def torch_model(family: str) -> torch.nn.Module:
    """A float32 model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._attn_implementation = "eager"  # The only one with Gemma 2's soft cap.
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim > 1 else 0.1
            centre = 1.0 if "norm" in name or "ln_" in name or name.endswith("scale") else 0.0
            offset = family in ("gemma", "gemma2", "gemma3")  # they multiply by 1 + scale
            centre = 0.0 if offset or name.endswith("bias") else centre
            parameter.copy_(centre + spread * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # as large as the scores differ
                buffer.copy_(0.3 * torch.randn_like(buffer))
            if name.endswith("layer_scalar"):
                buffer.copy_(1 + 0.3 * torch.randn_like(buffer))
    return model


def as_in_files(family: str, tensors: dict) -> dict:
    """Arrays by the names of a model's parameters, by those of its files: one for each expert."""
    found = {}
    for name, tensor in tensors.items():
        if family == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        place, _, last = name.rpartition(".")
        if not place.endswith(".experts") or family in (
            "gpt_oss",
            "gemma4_text",
        ):  # whose files hold them as they are
            found[name] = tensor
            continue
        for e, part in enumerate(tensor):
            halves = (
                (part,) if last == "down_proj" else (part[: len(part) // 2], part[len(part) // 2 :])
            )
            own = names[2:] if last == "down_proj" else names[:2]
            found |= {f"{place}.{e}.{n}.weight": half for n, half in zip(own, halves, strict=True)}
    return found
