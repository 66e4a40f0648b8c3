"""A small random SmolVLM with its tokenizer and image processor, as a directory that transformers wrote."""

import json

import jax
import numpy as np

from jaxft.checkpoints import save_model
from jaxft.checkpoints.tiny import byte_tokenizer
from jaxft.models import Decoder, config_of
from tests.checkpoints.small_bert import quiet

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
GRID = PROCESSOR | dict(
    patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
)
GRID |= dict(resample=3)
CROPS = PROCESSOR | dict(
    size={"shortest_edge": SIZE + 2}, crop_size={"height": SIZE, "width": SIZE}, resample=3
)
CROPS |= dict(do_center_crop=True, do_pad=False)
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


QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_VISION = dict(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    window_size=16,
    out_hidden_size=32,
    fullatt_block_indexes=[1],
)


# Qwen2-VL's keys; the sizes are the same.
QWEN2_VISION = dict(
    depth=2, embed_dim=16, hidden_size=32, mlp_ratio=2, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2,
)  # fmt: skip


def tokenizer(kind="smolvlm"):
    """A byte tokenizer with SmolVLM's special tokens and the form of its template, or another kind's."""
    made = byte_tokenizer()
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        tokens = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
        made.add_special_tokens({"extra_special_tokens": tokens})
        made.chat_template = QWEN_TEMPLATE
        return made
    made.add_special_tokens({"extra_special_tokens": SPECIAL})
    made.eos_token, made.chat_template = "<end_of_utterance>", TEMPLATE
    if kind.startswith("llava"):
        made.chat_template = None
    if kind.startswith("paligemma"):
        made.bos_token, made.chat_template = "<|im_start|>", None
    return made


def torch_model(kind="smolvlm"):
    """A float32 model of transformers with weights large enough that every part shows in the logits."""
    import torch
    import transformers as hf

    tokens = tokenizer(kind)
    image, text = tokens.convert_tokens_to_ids("<image>"), TEXT | {"vocab_size": len(tokens)}
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
        own = {} if kind == "qwen2_5_vl" else QWEN2_VISION
        config = {"qwen2_vl": hf.Qwen2VLConfig, "qwen2_5_vl": hf.Qwen2_5_VLConfig}[kind](
            text_config={
                **text,
                "model_type": f"{kind}_text",
                "rope_parameters": rope,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            vision_config=own or QWEN_VISION,
            image_token_id=tokens.convert_tokens_to_ids("<|image_pad|>"),
            vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
            video_token_id=1,
        )
    elif kind.startswith("llava"):
        full = dict(
            vision_feature_layer=[0, -1],
            vision_feature_select_strategy="full",
            multimodal_projector_bias=False,
        )
        config = hf.LlavaConfig(
            **full if kind == "llava_full" else {},
            text_config=text,
            vision_config=VISION | {"model_type": "clip_vision_model"},
            image_token_index=image,
        )
    elif kind.startswith("paligemma"):
        own = {"model_type": kind.replace("paligemma", "gemma"), "head_dim": 12}
        own |= {"sliding_window": 24} if kind == "paligemma2" else {}
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
            norms = "norm" in name or name.endswith("ln_q.weight")
            norms = norms or "layrnorm" in name
            centre = 1.0 if norms and not name.endswith("bias") else 0.0
            if kind.startswith("paligemma") and "language_model" in name:
                centre = 0.0  # Gemma multiplies by 1 + scale.
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return model


def write(path, kind="smolvlm"):
    """Writes the directory; returns the torch model."""
    model = torch_model(kind)
    with quiet():
        model.save_pretrained(path)
    tokenizer(kind).save_pretrained(path)
    settings = SQUARES if kind.startswith("paligemma") else PROCESSOR
    settings = {"qwen2_vl": GRID, "qwen2_5_vl": GRID, "llava": CROPS, "llava_full": CROPS}.get(
        kind, settings
    )
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def write_random(path):
    """Writes the directory of a SmolVLM with one layer in each part, by jaxft, which reads whole images."""
    tokens = tokenizer()
    image = tokens.convert_tokens_to_ids("<image>")
    json_of = smolvlm_json(len(tokens), image)
    for part in ("text_config", "vision_config"):
        json_of[part] = json_of[part] | {"num_hidden_layers": 1}
    config = config_of(json_of)
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), model.example_input())["params"]
    save_model(path, model, params, tokenizer_from=tokens)
    whole = PROCESSOR | {"do_image_splitting": False}
    (path / "preprocessor_config.json").write_text(json.dumps(whole))


def smolvlm_json(vocabulary, image):
    """The config.json of a SmolVLM."""
    return {
        "model_type": "smolvlm",
        "text_config": TEXT | {"vocab_size": vocabulary},
        "vision_config": VISION,
        "image_token_id": image,
    }


def image(seed, height, width):
    """A random image [height, width, 3] in uint8, smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width]
