"""The record of Qwen2-Audio (Chu et al., 2024, arxiv.org/abs/2407.10759)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxft.models import hf_config
from jaxft.models.config import DecoderConfig
from jaxft.models.decoder import Decoder
from jaxft.models.encoder_decoder_config import StackConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_encoder_decoders import layer_entries
from jaxft.models.hf_keys import COMMON, Keys, check_multiple, complete
from jaxft.models.hf_parts import check_token, part_targets, renamed, text_entries
from jaxft.models.names import Entry, layer_norm
from jaxft.models.qwen2 import QWEN2
from jaxft.models.sound import SoundTower
from jaxft.models.whisper.names import stem_entries

_READS = frozenset("text_config audio_config audio_token_index".split())
_KEYS = Keys(
    COMMON | {"text_config": None, "audio_config": None, "audio_token_index": 151646},
    unchecked=frozenset({"text_config", "audio_config"}),
    # transformers' class has no such key, and takes that of the text part.
    no_effect=frozenset({"tie_word_embeddings", "vocab_size", "hidden_size"}),
    aliases={"audio_token_id": "audio_token_index"},
)
# Keys of audio_config by our names; the defaults are those of the 7B model.
_SIZES = {
    "encoder_layers": "num_layers",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_attention_heads": "num_heads",
    "d_model": "hidden_size",
}
_AUDIO_READS = frozenset([*_SIZES, "num_mel_bins", "activation_function", "max_source_positions"])
_AUDIO_KEYS = Keys(
    COMMON
    | {
        "encoder_layers": 32,
        "encoder_ffn_dim": 5120,
        "encoder_attention_heads": 20,
        "d_model": 1280,
    }
    | {"num_mel_bins": 128, "activation_function": "gelu", "max_source_positions": 1500},
    no_effect=frozenset(
        "dropout activation_dropout encoder_layerdrop scale_embedding init_std tie_word_embeddings".split()
    ),
    aliases=dict(
        num_hidden_layers="encoder_layers",
        hidden_size="d_model",
        num_attention_heads="encoder_attention_heads",
        intermediate_size="encoder_ffn_dim",
    ),
)
# Early files have the whole text model as `language_model.`.
_EARLIER = {"language_model.lm_head.": "lm_head.", "language_model.model.": "language_model."}
_AUDIO = r"audio/(layers/.*/(query|key|value|out|up|down)|projection)/kernel"


def read(json: Json, tensors: Collection[str]) -> DecoderConfig:
    """The DecoderConfig of a config.json: Qwen 2's, with a tower for sound.

    Raises:
        CheckpointError: for a text part other than Qwen 2's, or sizes that do not fit together.
    """
    text = json["text_config"] or {}
    kind = text.get("model_type", "qwen2") if isinstance(text, dict) else text
    if kind != "qwen2":
        raise CheckpointError(
            f"config.json: text_config is {kind!r:.40}; jaxft's qwen2_audio has a qwen2 as its text."
        )
    config = QWEN2.huggingface.config({**text, "model_type": "qwen2"}, tensors)
    tower = _read_tower(json["audio_config"] or {}, json["audio_token_index"], config.hidden_size)
    check_token("audio_token_index", tower.token, config.vocab_size)
    return dataclasses.replace(config, towers=(tower,), family="qwen2_audio", source="")


def _read_tower(json, token, width):
    if not isinstance(json, dict):
        raise CheckpointError(f"config.json: audio_config is {json!r:.40}, expected an object.")
    json = complete({"model_type": "qwen2_audio_encoder", **json}, _AUDIO_KEYS, _AUDIO_READS)
    check_multiple(json, "d_model", "encoder_attention_heads")
    if json["d_model"] < 4 or json["d_model"] % 2:
        raise CheckpointError(
            f"config.json: audio_config: d_model is {json['d_model']}, expected an even number from 4 on."
        )
    sizes = {ours: json[theirs] for theirs, ours in _SIZES.items()}
    stack = StackConfig(
        head_dim=sizes["hidden_size"] // sizes["num_heads"],
        activation=read_activation(json["activation_function"]),
        key_bias=False,
        pre_norm=True,
        **sizes,
    )
    return SoundTower(stack, json["num_mel_bins"], json["max_source_positions"], token, width)


def write(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a DecoderConfig with a tower."""
    (tower,) = config.towers
    text = QWEN2.huggingface.write(dataclasses.replace(config, family="qwen2"))
    audio = {theirs: getattr(tower.encoder, ours) for theirs, ours in _SIZES.items()}
    return {
        "text_config": {"model_type": "qwen2"} | text,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": tower.mel,
            "max_source_positions": tower.places,
            "activation_function": ACTIVATIONS[tower.encoder.activation],
            **audio,
        },
        "audio_token_index": tower.token,
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a Qwen2AudioForConditionalGeneration."""
    (tower,) = config.towers
    theirs, ours = "model.audio_tower.", "audio/"
    found = stem_entries(theirs, f"{ours}stem/", tower.encoder.hidden_size, tower.mel)
    found.append(Entry(f"{theirs}embed_positions.weight", (f"{ours}positions/embedding",)))
    for i in range(tower.encoder.num_layers):
        layer = f"{theirs}layers.{i}.", f"{ours}layers/{i}/"
        found += layer_entries(*layer, decodes=False, key_bias=False)
    found += layer_norm(f"{theirs}layer_norm", f"{ours}final_norm")
    projection = "model.multi_modal_projector.linear"
    found.append(Entry(f"{projection}.weight", (f"{ours}projection/kernel",), True))
    found.append(Entry(f"{projection}.bias", (f"{ours}projection/bias",)))
    text = text_entries(QWEN2.huggingface.entries(config))
    return found + text


QWEN2_AUDIO = Family(
    name="qwen2_audio",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Qwen2AudioForConditionalGeneration",
        read=read,
        write=write,
        reads=_READS,
        keys=_KEYS,
        entries=entries,
        rename=renamed(_EARLIER),
    ),
    targets=part_targets("audio", _AUDIO),
)
