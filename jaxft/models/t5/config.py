"""config.json of T5."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxft.models.encoder_decoder_config import IDS, UNBOUNDED, EncoderDecoderConfig, StackConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_encoder_decoders import read_ids, write_ids
from jaxft.models.hf_keys import COMMON, Keys

_SIZES = dict(
    vocab_size=32128,
    d_model=512,
    d_kv=64,
    d_ff=2048,
    num_layers=6,
    num_decoder_layers=None,
    num_heads=8,
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6,
    feed_forward_proj="relu",
    tie_word_embeddings=True,
    scale_decoder_outputs=None,
)
READS = frozenset({*_SIZES, *IDS.values(), "dense_act_fn", "is_gated_act"})
KEYS = Keys(
    COMMON | _SIZES | dict(is_encoder_decoder=True, is_decoder=False) | dict.fromkeys(IDS.values()),
    nullable=frozenset({"tie_word_embeddings"}),
    no_effect=frozenset({"dropout_rate", "initializer_factor"}),
    aliases=dict(
        hidden_size="d_model",
        num_attention_heads="num_heads",
        num_hidden_layers="num_layers",
        head_dim="d_kv",
    ),
)


def read(json: Json, tensors: Collection[str]) -> EncoderDecoderConfig:
    """The EncoderDecoderConfig of a config.json.

    transformers' class scales the decoder's output by d_model^-1/2 unless tie_word_embeddings is false, as
    in files of T5 1.1, or scale_decoder_outputs, which its own files have beside a true
    tie_word_embeddings. The tensors decide if embeddings are tied.
    """
    scaled = json["scale_decoder_outputs"]
    scaled = json["tie_word_embeddings"] is not False if scaled is None else scaled
    activation, gated = _activation(json["feed_forward_proj"])
    _check_derived(json, gated)
    buckets, distance = (
        json[f"relative_attention_{name}"] for name in ("num_buckets", "max_distance")
    )
    if buckets < 4 or buckets % 2 or distance <= buckets // 2:
        raise CheckpointError(
            f"config.json: relative_attention_num_buckets is {buckets} and relative_attention_max_distance "
            f"{distance}; expected an even number from 4 on, and a distance above half of it."
        )

    def stack(layers: int) -> StackConfig:
        return StackConfig(
            hidden_size=json["d_model"],
            intermediate_size=json["d_ff"],
            num_layers=layers,
            num_heads=json["num_heads"],
            head_dim=json["d_kv"],
            activation=activation,
            gated_mlp=gated,
            bias=False,
            norm="rms",
            norm_eps=json["layer_norm_epsilon"],
            pre_norm=True,
            scaled=False,
            relative_buckets=buckets,
            relative_distance=distance,
        )

    layers, written = json["num_layers"], json["num_decoder_layers"]
    return EncoderDecoderConfig(
        vocab_size=json["vocab_size"],
        encoder=stack(layers),
        decoder=stack(layers if written is None else written),
        positions="relative",
        max_length=UNBOUNDED,
        final_norm=True,
        output_scale=json["d_model"] ** -0.5 if scaled else 1.0,
        tie_embeddings=scaled or (bool(tensors) and "lm_head.weight" not in tensors),
        family="t5",
        **read_ids(json),
    )


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The config.json of an EncoderDecoderConfig."""
    stack = config.encoder
    name = ACTIVATIONS[stack.activation]
    # "gated-gelu" means the approximation by tanh, "gelu" does not.
    name = {"gelu_pytorch_tanh": "gelu"}.get(name, name) if stack.gated_mlp else name
    return {
        "vocab_size": config.vocab_size,
        "d_model": stack.hidden_size,
        "d_kv": stack.head_dim,
        "d_ff": stack.intermediate_size,
        "num_layers": stack.num_layers,
        "num_decoder_layers": config.decoder.num_layers,
        "num_heads": stack.num_heads,
        "relative_attention_num_buckets": stack.relative_buckets,
        "relative_attention_max_distance": stack.relative_distance,
        "layer_norm_epsilon": stack.norm_eps,
        "feed_forward_proj": f"gated-{name}" if stack.gated_mlp else name,
        "tie_word_embeddings": config.output_scale != 1,
        **write_ids(config),
    }


def _check_derived(json, gated):
    """Checks the keys that transformers writes from feed_forward_proj, and follows if they differ."""
    name = json["feed_forward_proj"].removeprefix("gated-")
    name = "gelu_new" if gated and name == "gelu" else name
    for key, expected in {"dense_act_fn": name, "is_gated_act": gated}.items():
        if json.get(key, expected) != expected:
            raise CheckpointError(
                f"config.json: {key} is {json[key]!r}, but feed_forward_proj is "
                f"{json['feed_forward_proj']!r}, from which it follows as {expected!r}; correct the file."
            )


def _activation(name: str) -> tuple[str, bool]:
    """(activation, whether it gates) of a feed_forward_proj."""
    if name == "gated-gelu":
        return "gelu_tanh", True
    first, _, rest = name.partition("-")
    if rest and (first != "gated" or rest == "gelu"):
        raise CheckpointError(
            f"config.json: feed_forward_proj is {name!r}, expected an activation or 'gated-' before one; "
            "correct the file."
        )
    return read_activation(rest or first), bool(rest)
