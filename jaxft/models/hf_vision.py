"""config.json and tensor names of the vision transformers of SigLIP and CLIP."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxft.models.encoder import EncoderConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_keys import COMMON, Keys, check_multiple, complete
from jaxft.models.hf_parts import part_targets
from jaxft.models.names import Entry, layer_norm
from jaxft.models.transformer import Targets

READS = frozenset(
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
    "hidden_act layer_norm_eps".split()
)
_LINEAR = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.out_proj": "attention/out",
    "mlp.fc1": "mlp/up",
    "mlp.fc2": "mlp/down",
}
_VISION = r"vision/(encoder/layers/.*/(query|key|value|out|up|down)|up|projection)/kernel"
# PEFT's "all-linear", and the linear kernels of each part; the projection belongs to the part for images.
VISION_TARGETS: Targets = part_targets("vision", _VISION)


def siglip_keys(**defaults: Any) -> Keys:
    """The keys of a class of SigLIP's vision config, whose defaults are Idefics3's with these changes."""
    own = {
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    free = frozenset({"image_size", "patch_size"})
    return Keys(
        COMMON | own | defaults,
        unchecked=free,
        no_effect=frozenset({"tie_word_embeddings", "vision_use_head"}),
    )


def read_siglip(json: Json, keys: Keys, *, ragged: bool) -> EncoderConfig:
    """The EncoderConfig of the vision_config in a config.json.

    Args:
        json: the vision_config.
        keys: of transformers' class of it.
        ragged: whether the model computes the positions of patches as for images of any proportions
            (Idefics3), rather than in order.

    Raises:
        CheckpointError: if there is none, or its images or patches are not square.
    """
    if not isinstance(json, dict):
        raise CheckpointError(f"config.json: vision_config is {json!r:.40}, expected an object.")
    json = complete(json, keys, READS)
    check_multiple(json, "hidden_size", "num_attention_heads")
    size, patch = square(json, "image_size"), square(json, "patch_size")
    side = size // patch
    places = ragged_positions(side) if ragged else ()
    return EncoderConfig(
        hidden_size=json["hidden_size"],
        intermediate_size=json["intermediate_size"],
        num_layers=json["num_hidden_layers"],
        num_heads=json["num_attention_heads"],
        num_positions=side**2,
        norm_eps=json["layer_norm_eps"],
        activation=read_activation(json["hidden_act"]),
        pre_norm=True,
        pooler=False,
        class_token=False,
        patch_positions=() if places == tuple(range(side**2)) else places,
        image_size=size,
        patch_size=patch,
        channels=json["num_channels"],
        family="siglip_vision_model",
    )


def clip_keys() -> Keys:
    """The keys of transformers' class of CLIP's vision config."""
    keys = siglip_keys(
        hidden_size=768,
        num_attention_heads=12,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    own = {"projection_dim", "initializer_factor", "tie_word_embeddings"}
    return dataclasses.replace(keys, no_effect=frozenset(own))


def read_clip(json: Json, keys: Keys) -> EncoderConfig:
    """The EncoderConfig of the vision_config of a CLIP in a config.json.

    Radford et al., 2021, arxiv.org/abs/2103.00020, section 2.4: a class token, and a norm before the layers.

    Raises:
        CheckpointError: as for `read_siglip`.
    """
    config = read_siglip(json, keys, ragged=False)
    return dataclasses.replace(
        config,
        num_positions=config.num_positions + 1,
        class_token=True,
        patch_bias=False,
        patch_norm=True,
        family="clip_vision_model",
    )


def write_siglip(config: EncoderConfig) -> dict[str, Any]:
    """The vision_config of an EncoderConfig."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": config.channels,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }


def siglip_entries(config: EncoderConfig, theirs: str, ours: str) -> list[Entry]:
    """The tensors of a SigLIP or CLIP vision transformer.

    Args:
        config: of it.
        theirs: the beginning of their names in a file.
        ours: the beginning of the leaves' paths.
    """
    width, size, patch = (
        config.hidden_size,
        config.patch_size,
        f"{theirs}embeddings.patch_embedding",
    )
    entries = []
    if config.class_token:
        name = f"{theirs}embeddings.class_embedding"
        entries.append(Entry(name, (f"{ours}patches/cls",), file_shape=(width,)))
    # torch convolves [out, channel, row, column]; jaxft's patches are (row, column, channel).
    kernel = Entry(
        f"{patch}.weight",
        (f"{ours}patches/projection/kernel",),
        file_shape=(width, config.channels, size, size),
        axes=(2, 3, 1, 0),
    )
    entries.append(kernel)
    if config.patch_bias:
        entries.append(Entry(f"{patch}.bias", (f"{ours}patches/projection/bias",)))
    positions = (f"{ours}patches/positions",)
    entries.append(Entry(f"{theirs}embeddings.position_embedding.weight", positions))
    if config.patch_norm:
        entries += layer_norm(f"{theirs}pre_layrnorm", f"{ours}embed_norm")
    for i in range(config.num_layers):
        layer, block = f"{theirs}encoder.layers.{i}.", f"{ours}layers/{i}/"
        for name, path in _LINEAR.items():
            entries.append(Entry(f"{layer}{name}.weight", (f"{block}{path}/kernel",), True))
            entries.append(Entry(f"{layer}{name}.bias", (f"{block}{path}/bias",)))
        entries += layer_norm(f"{layer}layer_norm1", f"{block}attention_norm")
        entries += layer_norm(f"{layer}layer_norm2", f"{block}mlp_norm")
    return entries + layer_norm(f"{theirs}post_layernorm", f"{ours}final_norm")


def ragged_positions(side: int) -> tuple[int, ...]:
    """The row of the position table for each of side x side patches, as Idefics3 computes it in float32.

    The coordinates i / side are sorted into buckets with the boundaries k / side. Rounding puts some of them
    one bucket too low, and the models are trained so.
    """
    step = np.float32(1) / np.float32(side)
    coordinates = np.minimum(np.arange(side, dtype=np.float32) * step, np.float32(1 - 1e-6))
    boundaries = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    places = np.searchsorted(boundaries, coordinates, side="right")
    return tuple((places[:, None] * side + places[None]).reshape(-1).tolist())


def square(json: Json, name: str) -> int:
    """A side in pixels, which transformers also takes as [height, width]."""
    sides = json[name] if isinstance(json[name], (list, tuple)) else [json[name]]
    if len(set(map(str, sides))) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise CheckpointError(
            f"config.json: {name} is {json[name]!r}; jaxft takes squares: one integer."
        )
    return sides[0]
