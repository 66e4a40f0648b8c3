"""A small random SmolVLM with its tokenizer and image processor, as a directory that transformers wrote."""

import json

import numpy as np

from jaxft.checkpoints.tiny import byte_tokenizer

SIZE, LONGEST = 16, 32  # pixels of a square, and of an image's longest side before it is split
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
SPECIAL += [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% if m['content'][0]['type'] != 'image' %} {% endif %}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PROCESSOR = dict(
    do_convert_rgb=True,
    do_image_splitting=True,
    do_normalize=True,
    do_pad=True,
    do_rescale=True,
    do_resize=True,
    image_mean=[0.5, 0.4, 0.3],
    image_std=[0.5, 0.25, 0.5],
    max_image_size={"longest_edge": SIZE},
    resample=1,
    rescale_factor=1 / 255,
    size={"longest_edge": LONGEST},
)
SQUARES = PROCESSOR | dict(size={"height": SIZE, "width": SIZE}, resample=3)
TEXT = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=SIZE,
    patch_size=4,
)


def tokenizer(kind="smolvlm"):
    """A byte tokenizer with SmolVLM's special tokens and the form of its template, or PaliGemma's."""
    made = byte_tokenizer()
    made.add_special_tokens({"extra_special_tokens": SPECIAL})
    made.eos_token, made.chat_template = "<end_of_utterance>", TEMPLATE
    if kind.startswith("paligemma"):
        made.bos_token, made.chat_template = "<|im_start|>", None
    return made


def torch_model(kind="smolvlm"):
    """A float32 model of transformers with weights large enough that every part shows in the logits."""
    import torch
    import transformers as hf

    tokens = tokenizer(kind)
    image, text = tokens.convert_tokens_to_ids("<image>"), TEXT | {"vocab_size": len(tokens)}
    if kind.startswith("paligemma"):
        own = {"model_type": kind.replace("paligemma", "gemma"), "head_dim": 12, "sliding_window": 24}
        config = hf.PaliGemmaConfig(
            text_config=text | own,
            vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=image,
            projection_dim=TEXT["hidden_size"],
        )
    else:
        config = {"smolvlm": hf.SmolVLMConfig, "idefics3": hf.Idefics3Config}[kind](
            text_config=text,
            vision_config=VISION,
            image_token_id=image,
            scale_factor=2,
            tie_word_embeddings=kind == "idefics3",
        )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
            centre = 0.0 if "language_model" in name else centre  # Gemma multiplies by 1 + scale
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return model


def write(path, kind="smolvlm"):
    """Writes the directory; returns the torch model."""
    model = torch_model(kind)
    model.save_pretrained(path)
    tokenizer(kind).save_pretrained(path)
    settings = SQUARES if kind.startswith("paligemma") else PROCESSOR
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def image(seed, height, width):
    """A random image [height, width, 3] in uint8, smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width]
