"""The config.json of checkpoints that are much used: all their keys, with small sizes."""

FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = dict(
    hidden_act="silu", hidden_size=32, initializer_range=0.02, intermediate_size=48, num_attention_heads=8,
    num_hidden_layers=2, use_cache=True, vocab_size=96,
)  # fmt: skip
LLAMA2 = SIZES | dict(
    model_type="llama", _name_or_path="meta-llama/Llama-2-7b-hf", architectures=["LlamaForCausalLM"],
    bos_token_id=1, eos_token_id=2, max_position_embeddings=4096, num_key_value_heads=8, pretraining_tp=1,
    rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16",
    transformers_version="4.31.0.dev0",
)  # fmt: skip
LLAMA3 = LLAMA2 | dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=80, eos_token_id=81,
    max_position_embeddings=8192, num_key_value_heads=2, rope_theta=500000.0, torch_dtype="bfloat16",
)  # fmt: skip
SCALED = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
    rope_type="llama3",
)  # fmt: skip
LLAMA31 = LLAMA3 | dict(
    eos_token_id=[81, 82, 83], max_position_embeddings=131072, mlp_bias=False, rope_scaling=SCALED
)
DEEPSEEK = LLAMA2 | dict(
    attention_bias=False, bos_token_id=90, rope_theta=10000.0, rms_norm_eps=1e-06
)
MISTRAL = SIZES | dict(
    model_type="mistral", architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2,
    max_position_embeddings=32768, num_key_value_heads=2, rms_norm_eps=1e-05, rope_theta=10000.0,
    sliding_window=6, tie_word_embeddings=False, torch_dtype="bfloat16",
    transformers_version="4.34.0.dev0",
)  # fmt: skip
NEMO = MISTRAL | dict(
    attention_dropout=0.0, head_dim=8, hidden_size=40, num_attention_heads=4, num_key_value_heads=1,
    max_position_embeddings=1024000, rope_theta=1000000.0, sliding_window=None,
)  # fmt: skip
GEMMA = SIZES | dict(
    model_type="gemma", architectures=["GemmaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=2, eos_token_id=1, head_dim=16, hidden_act="gelu", max_position_embeddings=8192,
    num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=10000.0, torch_dtype="bfloat16", transformers_version="4.38.0.dev0",
)  # fmt: skip
GEMMA2 = GEMMA | dict(
    model_type="gemma2", architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0,
    cache_implementation="hybrid", final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh", num_attention_heads=4, num_hidden_layers=4,
    num_key_value_heads=2, query_pre_attn_scalar=256, sliding_window=6, torch_dtype="float32",
)  # fmt: skip
GEMMA3 = {k: v for k, v in GEMMA2.items() if k != "hidden_act"} | dict(
    model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], attn_logit_softcapping=None,
    eos_token_id=[1, 10], final_logit_softcapping=None, max_position_embeddings=32768,
    num_hidden_layers=7, num_key_value_heads=1, rope_local_base_freq=10000, rope_theta=1000000,
    sliding_window_pattern=6,
)  # fmt: skip
GEMMA4_E = SIZES | dict(
    model_type="gemma4_text", attention_bias=False, attention_dropout=0.0, attention_k_eq_v=False,
    bos_token_id=2, eos_token_id=1, enable_moe_block=False, final_logit_softcapping=30.0, global_head_dim=16,
    head_dim=8, hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=8,
    max_position_embeddings=131072, moe_intermediate_size=None, num_attention_heads=4, num_experts=None,
    num_global_key_value_heads=None, num_hidden_layers=6, num_key_value_heads=1, num_kv_shared_layers=3,
    pad_token_id=0, rms_norm_eps=1e-06, sliding_window=6, tie_word_embeddings=True, top_k_experts=None,
    torch_dtype="bfloat16", use_bidirectional_attention=None, use_double_wide_mlp=True,
    vocab_size_per_layer_input=96, layer_types=[SLIDING, SLIDING, FULL] * 2, rope_parameters={
        FULL: dict(partial_rotary_factor=0.25, rope_theta=1000000.0, rope_type="proportional"),
        SLIDING: dict(rope_theta=10000.0, rope_type="default"),
    },
)  # fmt: skip
GEMMA4_E = {k: v for k, v in GEMMA4_E.items() if k != "hidden_act"}
GEMMA4_A = GEMMA4_E | dict(
    attention_k_eq_v=True, enable_moe_block=True, hidden_size_per_layer_input=0, moe_intermediate_size=12,
    num_experts=8, top_k_experts=4, num_global_key_value_heads=2, num_kv_shared_layers=0,
    num_key_value_heads=4, use_bidirectional_attention="vision", use_double_wide_mlp=False,
)  # fmt: skip
QWEN2 = SIZES | dict(
    model_type="qwen2", architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=80,
    eos_token_id=81, max_position_embeddings=32768, max_window_layers=24, num_hidden_layers=3,
    num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=7,
    tie_word_embeddings=True, torch_dtype="bfloat16", use_mrope=False, use_sliding_window=False,
)  # fmt: skip
QWEN3 = {k: v for k, v in QWEN2.items() if k != "use_mrope"} | dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=16,
    max_position_embeddings=40960, rope_scaling=None, rope_theta=1000000, sliding_window=None,
)  # fmt: skip
PHI3 = SIZES | dict(
    model_type="phi3", _name_or_path="Phi-3-mini-4k-instruct", architectures=["Phi3ForCausalLM"],
    attention_bias=False, attention_dropout=0.0, bos_token_id=1, embd_pdrop=0.0, eos_token_id=90,
    hidden_size=64, max_position_embeddings=4096, num_key_value_heads=8, pad_token_id=90,
    original_max_position_embeddings=4096, resid_pdrop=0.0, rms_norm_eps=1e-05, rope_scaling=None,
    rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False, torch_dtype="bfloat16",
)  # fmt: skip
LONGROPE = dict(
    type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.5, 9.0, 30.0]
)
PHI4_MINI = PHI3 | dict(
    full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False, partial_rotary_factor=0.75,
    max_position_embeddings=131072, num_key_value_heads=2, sliding_window=262144,
    tie_word_embeddings=True, rope_scaling={k: v if k == "type" else v[:3] for k, v in LONGROPE.items()},
)  # fmt: skip
SMOLLM3 = SIZES | dict(
    model_type="smollm3", architectures=["SmolLM3ForCausalLM"], attention_bias=False, eos_token_id=91,
    attention_dropout=0.0, bos_token_id=90, max_position_embeddings=65536, max_window_layers=28,
    mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0], num_hidden_layers=4,
    num_key_value_heads=2, pad_token_id=92, pretraining_tp=2, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=5000000.0, sliding_window=None, torch_dtype="bfloat16", use_sliding_window=False,
    layer_types=[FULL] * 4,
)  # fmt: skip
OLMO2 = SIZES | dict(
    model_type="olmo2", architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    eos_token_id=90, max_position_embeddings=4096, num_key_value_heads=8, pad_token_id=91,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False,
    torch_dtype="bfloat16",
)  # fmt: skip
GRANITE = SIZES | dict(
    model_type="granite", architectures=["GraniteForCausalLM"], attention_bias=False, mlp_bias=False,
    attention_dropout=0.0, attention_multiplier=0.015625, bos_token_id=0, eos_token_id=0,
    embedding_multiplier=12.0, logits_scaling=8.0, max_position_embeddings=131072, num_key_value_heads=2,
    pad_token_id=0, residual_multiplier=0.22, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=1e7,
    tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip
GPT_OSS = SIZES | dict(
    model_type="gpt_oss", architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0,
    eos_token_id=91, experts_per_token=4, head_dim=8, initial_context_length=4096, intermediate_size=32,
    layer_types=[SLIDING, FULL], max_position_embeddings=131072, num_experts_per_tok=4,
    num_key_value_heads=2, num_local_experts=8, output_router_logits=False, pad_token_id=90,
    rms_norm_eps=1e-05, rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=6, swiglu_limit=7.0,
    tie_word_embeddings=False, rope_scaling=dict(
        beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096,
        rope_type="yarn", truncate=False,
    ),
)  # fmt: skip
DEEPSEEK_V2_LITE = SIZES | dict(
    model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], attention_bias=False,
    attention_dropout=0.0, aux_loss_alpha=0.001, bos_token_id=90, eos_token_id=91, first_k_dense_replace=1,
    kv_lora_rank=8, max_position_embeddings=163840, moe_intermediate_size=16, moe_layer_freq=1, n_group=1,
    n_routed_experts=8, n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6,
    num_key_value_heads=8, pretraining_tp=1, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4,
    rms_norm_eps=1e-06, rope_theta=10000, routed_scaling_factor=1.0, scoring_func="softmax", seq_aux=True,
    tie_word_embeddings=False, topk_group=1, topk_method="greedy", torch_dtype="bfloat16", v_head_dim=8,
    rope_scaling=dict(
        beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707,
        original_max_position_embeddings=4096, type="yarn",
    ),
)  # fmt: skip
DEEPSEEK_V3 = DEEPSEEK_V2_LITE | dict(
    model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"], ep_size=1, n_group=4, topk_group=2,
    n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=4, num_nextn_predict_layers=1,
    q_lora_rank=8, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc",
    rope_scaling=DEEPSEEK_V2_LITE["rope_scaling"] | dict(mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip
GPT2 = dict(
    activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=95,
    embd_pdrop=0.1, eos_token_id=95, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2",
    n_ctx=64, n_embd=32, n_head=4, n_layer=2, n_positions=64, n_special=0, predict_special_tokens=True,
    resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
    summary_type="cls_index", summary_use_proj=True, vocab_size=96,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
)  # fmt: skip
BERT = SIZES | dict(
    model_type="bert", architectures=["BertModel"], attention_probs_dropout_prob=0.1,
    gradient_checkpointing=False, hidden_act="gelu", hidden_dropout_prob=0.1, layer_norm_eps=1e-12,
    max_position_embeddings=64, pad_token_id=0, position_embedding_type="absolute", type_vocab_size=2,
)  # fmt: skip
VIT = dict(
    architectures=["ViTModel"], attention_probs_dropout_prob=0.0, encoder_stride=16, hidden_act="gelu",
    hidden_dropout_prob=0.0, hidden_size=32, image_size=16, initializer_range=0.02, intermediate_size=48,
    layer_norm_eps=1e-12, model_type="vit", num_attention_heads=4, num_channels=3, num_hidden_layers=2,
    patch_size=4, qkv_bias=True, transformers_version="4.13.0.dev0",
)  # fmt: skip
MIXTRAL = MISTRAL | dict(
    model_type="mixtral", architectures=["MixtralForCausalLM"], attention_dropout=0.0,
    num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, rope_theta=1000000.0,
    router_aux_loss_coef=0.02, sliding_window=None, transformers_version="4.36.0.dev0",
)  # fmt: skip
QWEN2_MOE = {k: v for k, v in QWEN2.items() if k != "use_mrope"} | dict(
    model_type="qwen2_moe", architectures=["Qwen2MoeForCausalLM"], decoder_sparse_step=1,
    max_window_layers=21, moe_intermediate_size=12, norm_topk_prob=False, num_experts=6,
    num_experts_per_tok=4, num_key_value_heads=8, output_router_logits=False, router_aux_loss_coef=0.001,
    shared_expert_intermediate_size=48, tie_word_embeddings=False,
)  # fmt: skip
QWEN3_MOE = {k: v for k, v in QWEN3.items()} | dict(
    model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], decoder_sparse_step=1,
    max_window_layers=48, mlp_only_layers=[], moe_intermediate_size=12, norm_topk_prob=True,
    num_experts=8, num_experts_per_tok=3, output_router_logits=False, router_aux_loss_coef=0.001,
    tie_word_embeddings=False,
)  # fmt: skip
QWEN3_NEXT = QWEN3_MOE | dict(
    model_type="qwen3_next", architectures=["Qwen3NextForCausalLM"], full_attention_interval=4,
    linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_value_head_dim=8, num_hidden_layers=4, partial_rotary_factor=0.25, rope_theta=10000000,
    shared_expert_intermediate_size=12, transformers_version="4.57.0.dev0", max_position_embeddings=262144,
)  # fmt: skip
QWEN35 = {
    k: v for k, v in QWEN3_NEXT.items() if "expert" not in k and k not in (
        "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
        "output_router_logits", "router_aux_loss_coef", "sliding_window", "max_window_layers",
        "use_sliding_window",
    )
} | dict(
    model_type="qwen3_5_text", architectures=["Qwen3_5ForCausalLM"], attn_output_gate=True,
    layer_types=["linear_attention"] * 3 + [FULL], mamba_ssm_dtype="float32", mlp_only_layers=[],
    mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, tie_word_embeddings=True,
)  # fmt: skip
OLMOE = OLMO2 | dict(
    model_type="olmoe", architectures=["OlmoeForCausalLM"], clip_qkv=None, intermediate_size=16,
    norm_topk_prob=False, num_experts=8, num_experts_per_tok=4, output_router_logits=False,
    rms_norm_eps=1e-05, rope_theta=10000.0, router_aux_loss_coef=0.01, transformers_version="4.43.0.dev0",
)  # fmt: skip
T5 = dict(
    model_type="t5", architectures=["T5ForConditionalGeneration"], d_ff=48, d_kv=8, d_model=32,
    decoder_start_token_id=0, dropout_rate=0.1, eos_token_id=1, initializer_factor=1.0,
    is_encoder_decoder=True, layer_norm_epsilon=1e-06, n_positions=512, num_heads=4, num_layers=2,
    output_past=True, pad_token_id=0, relative_attention_num_buckets=32, vocab_size=96,
    task_specific_params={"summarization": {"num_beams": 4, "prefix": "summarize: "}},
)  # fmt: skip
FLAN_T5 = {k: v for k, v in T5.items() if k != "task_specific_params"} | dict(
    feed_forward_proj="gated-gelu", num_decoder_layers=3, relative_attention_max_distance=128,
    tie_word_embeddings=False, transformers_version="4.23.1", use_cache=True,
)  # fmt: skip
BART = dict(
    model_type="bart", _num_labels=3, activation_dropout=0.1, activation_function="gelu",
    add_bias_logits=False, add_final_layer_norm=False, architectures=["BartForConditionalGeneration"],
    attention_dropout=0.1, bos_token_id=0, classif_dropout=0.1, classifier_dropout=0.0, d_model=32,
    decoder_attention_heads=4, decoder_ffn_dim=48, decoder_layerdrop=0.0, decoder_layers=2,
    decoder_start_token_id=2, dropout=0.1, early_stopping=True, encoder_attention_heads=4,
    encoder_ffn_dim=48, encoder_layerdrop=0.0, encoder_layers=2, eos_token_id=2, forced_eos_token_id=2,
    forced_bos_token_id=0, gradient_checkpointing=False, id2label={"0": "LABEL_0", "1": "LABEL_1"},
    init_std=0.02, is_encoder_decoder=True, label2id={"LABEL_0": 0, "LABEL_1": 1}, length_penalty=2.0,
    max_length=142, max_position_embeddings=64, min_length=56, no_repeat_ngram_size=3,
    normalize_before=False, num_beams=4, num_hidden_layers=2, pad_token_id=1, prefix=" ",
    scale_embedding=False, use_cache=True, vocab_size=96, task_specific_params={"summarization": {}},
)  # fmt: skip
MBART = {k: v for k, v in BART.items() if k not in ("early_stopping", "min_length", "prefix")} | dict(
    model_type="mbart", _name_or_path="facebook/mbart-large-50", add_final_layer_norm=True,
    architectures=["MBartForConditionalGeneration"], forced_bos_token_id=None, normalize_before=True,
    normalize_embedding=True, scale_embedding=True, static_position_embeddings=False,
    tokenizer_class="MBart50Tokenizer", max_length=200, num_beams=5,
)  # fmt: skip
MARIAN = {k: v for k, v in BART.items() if k not in ("early_stopping", "min_length", "prefix")} | dict(
    model_type="marian", activation_function="swish", architectures=["MarianMTModel"],
    bad_words_ids=[[95]], bos_token_id=0, decoder_start_token_id=95, decoder_vocab_size=96, eos_token_id=0,
    extra_pos_embeddings=96, forced_bos_token_id=None, forced_eos_token_id=0, max_length=512, num_beams=6,
    normalize_embedding=False, pad_token_id=95, scale_embedding=True, share_encoder_decoder_embeddings=True,
    static_position_embeddings=True,
)  # fmt: skip
WHISPER = dict(
    model_type="whisper", _name_or_path="openai/whisper-tiny.en", activation_dropout=0.0,
    activation_function="gelu", architectures=["WhisperForConditionalGeneration"], attention_dropout=0.0,
    begin_suppress_tokens=[20, 56], bos_token_id=57, d_model=32, decoder_attention_heads=4,
    decoder_ffn_dim=48, decoder_layerdrop=0.0, decoder_layers=2, decoder_start_token_id=57, dropout=0.0,
    encoder_attention_heads=4, encoder_ffn_dim=48, encoder_layerdrop=0.0, encoder_layers=2, eos_token_id=56,
    forced_decoder_ids=[[1, 62]], init_std=0.02, is_encoder_decoder=True, max_length=448,
    max_source_positions=15, max_target_positions=48, num_hidden_layers=2, num_mel_bins=80, pad_token_id=56,
    scale_embedding=False, suppress_tokens=[1, 2, 7, 8], torch_dtype="float32",
    transformers_version="4.27.0.dev0", use_cache=True, vocab_size=64,
)  # fmt: skip
YARN = dict(factor=4.0, original_max_position_embeddings=32768)

REAL = {
    "llama-7b": {
        k: v for k, v in LLAMA2.items() if k not in ("num_key_value_heads", "rope_scaling")
    }
    | dict(max_sequence_length=2048, pad_token_id=-1),
    "llama-2-7b": LLAMA2,
    "vicuna-16k": LLAMA2 | dict(rope_scaling=dict(factor=4.0, type="linear"), pad_token_id=0),
    "codellama-7b": LLAMA2 | dict(max_position_embeddings=16384, rope_theta=1000000),
    "llama-3-8b": LLAMA3,
    "llama-3.1-8b": LLAMA31,
    "llama-3.2-1b": LLAMA31 | dict(head_dim=4, tie_word_embeddings=True),
    "tinyllama": LLAMA2 | dict(attention_bias=False, num_key_value_heads=1, rope_theta=10000.0),
    "smollm2-135m": LLAMA3
    | dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, is_llama_config=True)
    | dict(rope_interleaved=False, rope_theta=100000, tie_word_embeddings=True)
    | {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "yi-6b": LLAMA3 | dict(rope_theta=5000000.0, pad_token_id=0),
    "deepseek-llm-7b": DEEPSEEK,
    "deepseek-coder": DEEPSEEK
    | dict(rope_scaling=dict(factor=4.0, type="linear"), rope_theta=100000),
    "mistral-7b-v0.1": MISTRAL,
    "mistral-7b-v0.3": MISTRAL | dict(sliding_window=None, rope_theta=1000000.0),
    "mistral-nemo": NEMO,
    "mistral-head-null": NEMO | dict(head_dim=None),
    "ministral-8b": NEMO | dict(sliding_window=7, rope_theta=100000000.0),
    "gemma-2b": GEMMA,
    "gemma-7b": GEMMA | dict(hidden_size=24, hidden_activation=None),
    "gemma-1.1": GEMMA | dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh"),
    "gemma-2-2b": GEMMA2,
    "gemma-2-9b": GEMMA2 | dict(eos_token_id=[1, 10], sliding_window_size=6),
    "gemma-2-27b": GEMMA2 | dict(query_pre_attn_scalar=9, _attn_implementation="eager"),
    "gemma-3-1b": GEMMA3,
    "gemma-3-4b-text": GEMMA3 | dict(rope_scaling=dict(factor=8.0, rope_type="linear")),
    "gemma-3-270m": {k: v for k, v in GEMMA3.items() if k != "sliding_window_pattern"}
    | dict(_sliding_window_pattern=6, layer_types=[*[SLIDING] * 5, FULL, SLIDING])
    | dict(use_bidirectional_attention=False),
    "gemma-4-e2b-text": GEMMA4_E,
    "gemma-4-26b-a4b-text": GEMMA4_A,
    "qwen2.5-0.5b": QWEN2,
    "qwen2.5-math": QWEN2
    | dict(sliding_window=None, rope_theta=10000.0, tie_word_embeddings=False),
    "qwen2.5-window": QWEN2 | dict(use_sliding_window=True, max_window_layers=1),
    "qwen2.5-yarn": QWEN2 | dict(rope_scaling=YARN | dict(type="yarn")),
    "qwen3-0.6b": QWEN3,
    "qwen3-8b-yarn": QWEN3
    | dict(rope_scaling=YARN | dict(rope_type="yarn"), tie_word_embeddings=False),
    "phi-3-mini-4k": PHI3,
    "phi-3-mini-128k": PHI3 | dict(max_position_embeddings=131072, rope_scaling=LONGROPE),
    "phi-4": PHI3 | dict(rope_theta=250000, sliding_window=None, max_position_embeddings=16384),
    "phi-4-mini": PHI4_MINI,
    "smollm3-3b": SMOLLM3,
    "qwen3-next-80b-a3b": QWEN3_NEXT,
    "qwen3.5-4b": QWEN35,
    "olmo-2-7b": OLMO2,
    "granite-3.3-2b": GRANITE,
    "gpt-oss-20b": GPT_OSS,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v2": DEEPSEEK_V2_LITE
    | dict(n_group=4, topk_group=2, topk_method="group_limited_greedy", q_lora_rank=8)
    | dict(num_experts_per_tok=4, routed_scaling_factor=16.0),
    "deepseek-v3": DEEPSEEK_V3,
    "mixtral-8x7b": MIXTRAL,
    "mixtral-8x22b": MIXTRAL | dict(router_jitter_noise=0.0, max_position_embeddings=65536),
    "qwen1.5-moe": QWEN2_MOE,
    "qwen2-moe": QWEN2_MOE | dict(mlp_only_layers=[], num_key_value_heads=2, bos_token_id=80),
    "qwen3-30b-a3b": QWEN3_MOE,
    "qwen3-coder-30b": QWEN3_MOE
    | dict(
        qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True, rope_theta=10000000
    ),
    "qwen3-moe-yarn": QWEN3_MOE | dict(rope_scaling=YARN | dict(rope_type="yarn")),
    "olmoe-1b-7b": OLMOE,
    "olmoe-0924-instruct": OLMOE | dict(clip_qkv=8.0),
    "t5-small": T5,
    "flan-t5-small": FLAN_T5,
    "flan-t5-saved": FLAN_T5
    | dict(classifier_dropout=0.0, dense_act_fn="gelu_new", is_gated_act=True),
    "bart-large-cnn": BART,
    "distilbart": BART | dict(decoder_layers=1, classif_dropout=0.0, extra_pos_embeddings=2),
    "mbart-large-50": MBART,
    "opus-mt": MARIAN,
    "whisper-tiny.en": WHISPER,
    "whisper-large-v3": WHISPER
    | dict(num_mel_bins=128, apply_spec_augment=False, mask_time_prob=0.05),
    "moonlight": {k: v for k, v in DEEPSEEK_V3.items() if k != "rope_scaling"}
    | dict(n_group=1, topk_group=1, q_lora_rank=None, rope_theta=50000.0),
    "gpt2-medium": GPT2,
    "distilgpt2": GPT2 | dict(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}),
    "gpt2-large": GPT2
    | dict(reorder_and_upcast_attn=False, scale_attn_by_inverse_layer_idx=False, n_inner=None)
    | dict(scale_attn_weights=True),
    "cerebras-gpt": GPT2 | dict(activation_function="gelu", n_inner=128),
    "bert-base": BERT | dict(architectures=["BertForMaskedLM"]),
    "all-minilm-l6": BERT | dict(classifier_dropout=None),
    "roberta-base": BERT
    | dict(
        model_type="roberta", architectures=["RobertaForMaskedLM"], bos_token_id=0, eos_token_id=2
    )
    | dict(layer_norm_eps=1e-05, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1),
    "vit-base": VIT,
    "vit-base-224": VIT
    | dict(architectures=["ViTForImageClassification"], id2label={"0": "a", "1": "b"})
    | dict(label2id={"a": 0, "b": 1}, pooler_act="tanh", pooler_output_size=32),
}


NO_ROPE = ("bert", "roberta", "vit", "t5", "bart", "mbart", "marian", "whisper", "gemma4_text")


def respelled(file: dict) -> dict:
    """The file of transformers 4 in the spelling of 5: dtype, rope_parameters, layer_types."""
    file = {k: v for k, v in file.items()} | {"transformers_version": "5.1.0"}
    if "torch_dtype" in file:
        file["dtype"] = file.pop("torch_dtype")
    name, layers = file["model_type"], file.get("num_hidden_layers")
    scaling, theta = file.pop("rope_scaling", None) or {}, file.pop("rope_theta", None)
    if layers and name not in NO_ROPE:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        rope = {k: v for k, v in scaling.items() if k != "type"}
        if name == "phi3":
            rope["partial_rotary_factor"] = file.pop("partial_rotary_factor", 1.0)
        rope |= {"rope_type": kind, "rope_theta": 10000.0 if theta is None else theta}
        if name == "gemma3_text":
            local = dict(rope_type="default", rope_theta=file.pop("rope_local_base_freq"))
            rope = {FULL: rope, SLIDING: local}
        file["rope_parameters"] = rope
    local = {
        "gemma2": lambda i: i % 2 == 0,
        "gemma3_text": lambda i: (i + 1) % 6 != 0,
        "qwen2": lambda i: file["use_sliding_window"] and i >= file["max_window_layers"],
        "qwen3": lambda i: False,
    }
    if name in local:
        file.pop("sliding_window_pattern", None)
        file["layer_types"] = [SLIDING if local[name](i) else FULL for i in range(layers)]
    return file
