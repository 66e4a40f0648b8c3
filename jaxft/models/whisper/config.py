"""config.json of Whisper."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models.encoder_decoder_config import EncoderDecoderConfig, StackConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_encoder_decoders import SIDES, SIZES, write_sizes
from jaxft.models.hf_keys import COMMON, Keys, check_multiple

_LENGTHS = {"max_source_positions": 1500, "max_target_positions": 448}
READS = frozenset(
    [f"{side}_{size}" for side in SIDES for size in SIZES]
    + "vocab_size d_model num_mel_bins activation_function decoder_start_token_id".split()
    + list(_LENGTHS)
)
_STACK = {"layers": 4, "ffn_dim": 1536, "attention_heads": 6}
KEYS = Keys(
    COMMON
    | {f"{side}_{name}": size for side in SIDES for name, size in _STACK.items()}
    | _LENGTHS
    | {
        "vocab_size": 51865,
        "d_model": 384,
        "num_mel_bins": 80,
        "activation_function": "gelu",
        "decoder_start_token_id": 50257,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
    },
    # transformers' Whisper does not scale its embeddings; the weighted sum is a classifier's; masks of the
    # features are drawn in its training mode only; the ids are rules of generation.
    no_effect=frozenset(
        "dropout activation_dropout init_std encoder_layerdrop decoder_layerdrop scale_embedding "
        "use_weighted_layer_sum classifier_proj_size median_filter_width apply_spec_augment mask_time_prob "
        "mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks "
        "suppress_tokens begin_suppress_tokens".split()
    ),
    aliases=dict(
        num_attention_heads="encoder_attention_heads",
        num_key_value_heads="encoder_attention_heads",
        hidden_size="d_model",
        num_hidden_layers="encoder_layers",
    ),
)


def read(json: Json, tensors: Collection[str]) -> EncoderDecoderConfig:
    """The EncoderDecoderConfig of a config.json.

    Raises:
        CheckpointError: for heads that do not divide the width, or a width without sines and cosines.
    """
    del tensors
    width = json["d_model"]
    if width < 4 or width % 2:
        raise CheckpointError(
            f"config.json: d_model is {width}, expected an even number of at least 4: half of the encoder's "
            "positions are sines."
        )

    def stack(side: str) -> StackConfig:
        check_multiple(json, "d_model", f"{side}_attention_heads")
        sizes = {ours: json[f"{side}_{theirs}"] for theirs, ours in SIZES.items()}
        return StackConfig(
            hidden_size=width,
            head_dim=width // sizes["num_heads"],
            activation=read_activation(json["activation_function"]),
            key_bias=False,
            pre_norm=True,
            **sizes,
        )

    return EncoderDecoderConfig(
        vocab_size=json["vocab_size"],
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        max_length=json["max_target_positions"],
        source_length=json["max_source_positions"],
        mel=json["num_mel_bins"],
        final_norm=True,
        family="whisper",
        start=json["decoder_start_token_id"],
    )


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The config.json of an EncoderDecoderConfig."""
    return write_sizes(config) | {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "num_mel_bins": config.mel,
        "max_source_positions": config.source_places,
        "max_target_positions": config.max_length,
        "activation_function": ACTIVATIONS[config.decoder.activation],
        "decoder_start_token_id": config.start,
    }
