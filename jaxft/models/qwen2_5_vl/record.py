"""The record of Qwen2.5-VL; videos are not read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.grid_vision import GridTower
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_keys import COMMON, Keys, complete
from jaxft.models.hf_parts import check_token, part_targets, text_entries
from jaxft.models.hf_vision import square
from jaxft.models.names import Entry
from jaxft.models.qwen2 import QWEN2
from jaxft.models.qwen2.config import write as write_qwen2
from jaxft.models.towers import one_position

READS = frozenset("text_config vision_config image_token_id tie_word_embeddings".split())
KEYS = Keys(
    COMMON
    | {
        "text_config": None,
        "vision_config": None,
        "image_token_id": 151655,
        "tie_word_embeddings": False,
    },
    unchecked=frozenset({"text_config", "vision_config"}),
    no_effect=frozenset({"video_token_id", "vision_start_token_id", "vision_end_token_id"}),
)
_VISION_READS = frozenset(
    "depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size "
    "temporal_patch_size window_size out_hidden_size fullatt_block_indexes rope_parameters".split()
)
_VISION_KEYS = Keys(
    COMMON
    | {
        "depth": 32,
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "rope_parameters": None,
    },
    unchecked=frozenset(
        {"patch_size", "temporal_patch_size", "fullatt_block_indexes", "rope_parameters"}
    ),
    no_effect=frozenset({"tokens_per_second", "tie_word_embeddings"}),
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "depth"},
)
# transformers' defaults of the text part that differ from Qwen 2's.
_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1e6,
}
_SECTIONS = [16, 24, 24]
_VISION = r"vision/(layers/.*/(query|key|value|out|gate|up|down)|merge|projection)/kernel"
TARGETS = part_targets("vision", _VISION)
# MLPs with and without a gate.
_GATED = {f"mlp.{name}_proj": (f"mlp/{name}",) for name in ("gate", "up", "down")}
_PLAIN = {"mlp.fc1": ("mlp/up",), "mlp.fc2": ("mlp/down",)}


def read(
    json: Json,
    tensors: Collection[str],
    family: str = "qwen2_5_vl",
    read_tower: Callable[[Json, DecoderConfig], GridTower] | None = None,
) -> DecoderConfig:
    """The DecoderConfig of a config.json: Qwen 2's, with a tower for images.

    Args:
        json, tensors: see `HuggingFace.read`.
        family: the model_type.
        read_tower: (config.json, config of the text part) -> the tower; None: that of Qwen2.5-VL.

    Raises:
        CheckpointError: for sizes that do not fit together.
    """
    text = json["text_config"]
    if text is None:  # The files of the hub have its keys beside vision_config.
        text = {key: json[key] for key in json if key not in ("text_config", "vision_config")}
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config is {text!r:.40}, expected an object.")
    ropes = [
        text[key] for key in ("rope_scaling", "rope_parameters") if isinstance(text.get(key), dict)
    ]
    sections = next((r["mrope_section"] for r in ropes if r.get("mrope_section")), _SECTIONS)
    text = {
        key: one_position(value) if key in ("rope_scaling", "rope_parameters") and value else value
        for key, value in text.items()
    }
    tied = {"model_type": "qwen2", "tie_word_embeddings": json["tie_word_embeddings"]}
    config = QWEN2.huggingface.config({**_TEXT, **text, **tied}, tensors)
    if 2 * sum(sections) != config.head_dim or len(sections) != 3:
        raise CheckpointError(
            f"config.json: mrope_section is {sections}; expected three numbers with the sum "
            f"{config.head_dim // 2}, half of a head's features."
        )
    rope = dataclasses.replace(config.rope, sections=tuple(sections))
    tower = (read_tower or _read_tower)(json, config)
    check_token("image_token_id", tower.token, config.vocab_size)
    return dataclasses.replace(config, rope=rope, towers=(tower,), family=family, source="")


def _read_tower(json, config):
    vision = read_vision(json, _VISION_KEYS, _VISION_READS, "out_hidden_size", config.hidden_size)
    return GridTower(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        token=json["image_token_id"],
        width=config.hidden_size,
        full_layers=tuple(vision["fullatt_block_indexes"]),
        window=vision["window_size"],
        **common_fields(vision),
    )


def read_vision(json: Json, keys: Keys, reads: frozenset[str], out: str, width: int) -> Json:
    """The vision_config of a config.json with the defaults of `keys`.

    Args:
        json: config.json.
        keys, reads: of the vision_config.
        out: the key of the width of embeddings.
        width: of the text part.

    Raises:
        CheckpointError: if there is none, or for another width or other positions than the model has.
    """
    vision = json["vision_config"]
    if not isinstance(vision, dict):
        raise CheckpointError(f"config.json: vision_config is {vision!r:.40}, expected an object.")
    vision = complete(vision, keys, reads)
    if vision[out] != width:
        raise CheckpointError(
            f"config.json: {out} of vision_config is {vision[out]}, expected the text part's hidden_size "
            f"{width}."
        )
    rope = vision["rope_parameters"] or {}
    if rope.get("rope_type", "axial") != "axial":
        raise CheckpointError(
            f"config.json: the vision_config has the rope_type {rope['rope_type']!r}, expected 'axial'."
        )
    return vision


def common_fields(vision: Json) -> dict[str, Any]:
    """The fields of a GridTower that have the same keys in Qwen2-VL and Qwen2.5-VL."""
    return dict(
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        patch_size=square(vision, "patch_size"),
        merge=vision["spatial_merge_size"],
        frames=square(vision, "temporal_patch_size"),
        channels=vision["in_channels"],
        theta=(vision["rope_parameters"] or {}).get("rope_theta", 1e4),
        activation=read_activation(vision["hidden_act"]),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with a tower."""
    (tower,) = config.towers
    own = {
        "hidden_size": tower.hidden_size,
        "intermediate_size": tower.intermediate_size,
        "window_size": tower.window,
        "out_hidden_size": tower.width,
        "fullatt_block_indexes": list(tower.full_layers),
    }
    return write_with(config, own)


def write_with(config: DecoderConfig, own: dict[str, Any]) -> dict[str, Any]:
    """The config.json whose vision_config has the keys `own` and those that all families have."""
    (tower,) = config.towers
    text = write_qwen2(config)
    sections = {"mrope_section": list(config.rope.sections)}
    scaling = text["rope_scaling"] or {"rope_type": "default", "type": "mrope"}
    text |= {"rope_scaling": scaling | sections}
    text |= {"rope_parameters": text["rope_parameters"] | sections}
    return {
        "text_config": {"model_type": f"{config.family}_text"} | text,
        "vision_config": {
            "model_type": f"{config.family}_vision",
            "depth": tower.num_layers,
            "hidden_act": ACTIVATIONS[tower.activation],
            "num_heads": tower.num_heads,
            "in_channels": tower.channels,
            "patch_size": tower.patch_size,
            "spatial_merge_size": tower.merge,
            "temporal_patch_size": tower.frames,
            "rope_parameters": {"rope_type": "axial", "rope_theta": tower.theta},
        }
        | own,
        "image_token_id": tower.token,
        "tie_word_embeddings": config.tie_embeddings,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a Qwen2_5_VLForConditionalGeneration, or of a Qwen2VLForConditionalGeneration."""
    (tower,) = config.towers
    text = text_entries(names.decoder_entries(config))
    p, width = tower.patch_size, tower.hidden_size
    rms = lambda theirs, ours: [Entry(f"{theirs}.weight", (f"{ours}/scale",))]
    norm = names.layer_norm if tower.norm == "layer" else rms
    found = [
        Entry(
            "model.visual.patch_embed.proj.weight",
            ("vision/patches/kernel",),
            file_shape=(width, tower.channels, tower.frames, p, p),
            axes=(1, 2, 3, 4, 0),
        )
    ]
    for i in range(tower.num_layers):
        theirs, ours = f"model.visual.blocks.{i}.", f"vision/layers/{i}/"
        linear = {"attn.qkv": ("attention/query", "attention/key", "attention/value")}
        linear |= {"attn.proj": ("attention/out",)}
        linear |= _GATED if tower.gated_mlp else _PLAIN
        for name, paths in linear.items():
            kernels, biases = (
                tuple(f"{ours}{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias")
            )
            found.append(Entry(f"{theirs}{name}.weight", kernels, True))
            found.append(Entry(f"{theirs}{name}.bias", biases))
        found += norm(f"{theirs}norm1", f"{ours}attention_norm")
        found += norm(f"{theirs}norm2", f"{ours}mlp_norm")
    found += norm("model.visual.merger.ln_q", "vision/final_norm")
    for name, path in (("0", "merge"), ("2", "projection")):
        theirs = f"model.visual.merger.mlp.{name}"
        found.append(Entry(f"{theirs}.weight", (f"vision/{path}/kernel",), True))
        found.append(Entry(f"{theirs}.bias", (f"vision/{path}/bias",)))
    return found + text


def rename(name: str) -> str:
    """Early files have the text part as `model.` and the part for images as `visual.`."""
    if name.startswith(("lm_head.", "score.")):
        return name
    name = name.removeprefix("model.")
    if name.startswith(("layers.", "norm.", "embed_tokens.")):
        name = f"language_model.{name}"
    return f"model.{name}"


QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen2_5_VLForConditionalGeneration",
        read=read,
        write=write,
        reads=READS,
        keys=KEYS,
        entries=entries,
        rename=rename,
    ),
    targets=TARGETS,
)
