"""The norms of a layer of Gemma 2, in both formats."""

NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}
GGUF_NORMS = {
    "attn_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
    "post_attention_norm": "post_attention_norm",
    "post_ffw_norm": "post_mlp_norm",
}
