"""Small random encoder-decoders of transformers, the oracles of the parity tests."""

import torch
import transformers as hf

T5 = dict(
    vocab_size=37, d_model=16, d_kv=6, d_ff=24, num_layers=1, num_decoder_layers=2, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=6, decoder_start_token_id=0,
)  # fmt: skip
BART = dict(
    vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=24,
)  # fmt: skip
MARIAN = BART | dict(
    scale_embedding=True, activation_function="silu", pad_token_id=36, decoder_start_token_id=36
)
MODELS = {
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "flan": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART, forced_bos_token_id=0)),
    "mbart": lambda: hf.MBartForConditionalGeneration(
        hf.MBartConfig(**BART, scale_embedding=True, decoder_start_token_id=33)
    ),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**MARIAN)),
}


def torch_model(name: str) -> torch.nn.Module:
    """A float32 model with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    if name == "flan":  # the files of T5 1.1 have a separate output projection
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(37, 16))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not parameter.requires_grad:  # Marian's positions are computed
                continue
            centre = 1.0 if "norm" in path and path.endswith("weight") else 0.0
            parameter.copy_(
                centre + (0.3 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
            )
        if name != "t5" and name != "flan":
            model.final_logits_bias.copy_(torch.randn(1, 37))
    return model
