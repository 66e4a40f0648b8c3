"""A small random Qwen2-Audio with its tokenizer and features of sound, as a directory."""

import json

import jax

from jaxft.checkpoints import save_model
from jaxft.checkpoints.tiny import byte_tokenizer
from jaxft.models import Decoder, config_of

AUDIO = dict(
    d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8,
    max_source_positions=50,
)  # fmt: skip
TEXT = dict(
    model_type="qwen2", hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{% if p['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\n{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """A byte tokenizer with the tokens of clips and the form of Qwen2-Audio's template."""
    made = byte_tokenizer()
    tokens = ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    made.add_special_tokens({"extra_special_tokens": tokens})
    made.chat_template = TEMPLATE
    return made


def write_random(path):
    """Writes the directory of a Qwen2-Audio with one layer in each part, by jaxft; it reads one second."""
    tokens = tokenizer()
    config = config_of(
        {
            "model_type": "qwen2_audio",
            "audio_config": AUDIO | {"encoder_layers": 1},
            "text_config": TEXT | {"vocab_size": len(tokens), "num_hidden_layers": 1},
            "audio_token_index": tokens.convert_tokens_to_ids("<|AUDIO|>"),
        }
    )
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), model.example_input())["params"]
    save_model(path, model, params, tokenizer_from=tokens)
    features = {"feature_size": AUDIO["num_mel_bins"], "chunk_length": 1, "sampling_rate": 16000}
    (path / "preprocessor_config.json").write_text(json.dumps(features))
