"""config.json and tensor names that BART, mBART and Marian share, and Whisper in part."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from jaxft.models.encoder_decoder import EncoderDecoder
from jaxft.models.encoder_decoder_config import IDS, EncoderDecoderConfig, StackConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Family, HuggingFace, Json
from jaxft.models.hf_config import ACTIVATIONS, read_activation
from jaxft.models.hf_keys import COMMON, Keys, check_multiple
from jaxft.models.names import Entry, layer_norm
from jaxft.models.special_ids import SpecialIds

LAYERS = "decoder/layers"  # those that scan_layers stacks; the encoder's stay separate
BIAS = "final_logits_bias"
SIDES = ("encoder", "decoder")
SIZES = {"layers": "num_layers", "ffn_dim": "intermediate_size", "attention_heads": "num_heads"}
READS = frozenset(
    [f"{side}_{size}" for side in SIDES for size in SIZES]
    + "vocab_size d_model max_position_embeddings activation_function scale_embedding".split()
    + list(IDS.values())
)
NO_EFFECT = frozenset(
    "dropout activation_dropout init_std encoder_layerdrop decoder_layerdrop".split()
)
_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}


@dataclasses.dataclass(frozen=True)
class Form:
    """The differences between the three families, which their config.json does not say."""

    pre_norm: bool = False
    embedding_norm: bool = True
    final_norm: bool = False
    sinusoidal: bool = False  # positions are computed, not learned


def keys(*nullable: str, **defaults: Any) -> Keys:
    """The keys of transformers' classes of the three; `defaults` are specific to one of them."""
    sizes = dict(layers=12, ffn_dim=4096, attention_heads=16)
    common = {f"{side}_{name}": size for side in SIDES for name, size in sizes.items()}
    common |= dict(vocab_size=50265, d_model=1024, max_position_embeddings=1024)
    common |= dict(activation_function="gelu", scale_embedding=False, tie_word_embeddings=True)
    common |= dict(is_encoder_decoder=True, is_decoder=False, decoder_start_token_id=None)
    common |= dict(forced_bos_token_id=None, forced_eos_token_id=2)
    aliases = dict(
        num_attention_heads="encoder_attention_heads",
        hidden_size="d_model",
        num_hidden_layers="encoder_layers",
    )
    null = frozenset({"forced_eos_token_id", *nullable})
    return Keys(COMMON | common | defaults, null, no_effect=NO_EFFECT, aliases=aliases)


def encoder_decoder_family(
    name: str, architecture: str, form: Form, keys: Keys, special: SpecialIds, **changes: Any
) -> Family:
    """The record of a family with BART's names.

    Args:
        name: Hugging Face's model_type.
        architecture: the class under which files are written.
        form: see `Form`.
        keys: of its config.json.
        special: the ids of its configuration class.
        changes: other fields of the HuggingFace codec.
    """
    codec = HuggingFace(
        architecture=architecture,
        read=functools.partial(read, name=name, form=form),
        write=write,
        reads=READS,
        keys=keys,
        entries=entries,
        rename=rename,
        ignores=ignores,
        task_type="SEQ_2_SEQ_LM",
        special=special,
    )
    codec = dataclasses.replace(codec, **changes)
    return Family(name=name, module=EncoderDecoder, huggingface=codec, layers=LAYERS)


def read_ids(json: Json) -> dict[str, int | None]:
    """The ids of generation as fields of an EncoderDecoderConfig."""
    return {field: json[key] for field, key in IDS.items()}


def write_ids(config: EncoderDecoderConfig) -> dict[str, int | None]:
    """The inverse of `read_ids`."""
    return {key: getattr(config, field) for field, key in IDS.items()}


def read(json: Json, tensors: Collection[str], name: str, form: Form) -> EncoderDecoderConfig:
    """The EncoderDecoderConfig of a config.json; the tensors' names show a bias of the logits.

    Embeddings are tied: without that, transformers 5 has three separate tables for encoder and decoder.
    """
    for key in sorted(READS - frozenset(IDS.values()) - {"scale_embedding"}):
        if json[key] is None:
            raise CheckpointError(
                f"config.json: {key} is null, expected a value; correct the file."
            )
    width, offset = json["d_model"], 0 if form.sinusoidal else 2

    def stack(side: str) -> StackConfig:
        check_multiple(json, "d_model", f"{side}_attention_heads")
        sizes = {ours: json[f"{side}_{theirs}"] for theirs, ours in SIZES.items()}
        return StackConfig(
            hidden_size=width,
            head_dim=width // sizes["num_heads"],
            activation=read_activation(json["activation_function"]),
            pre_norm=form.pre_norm,
            **sizes,
        )

    return EncoderDecoderConfig(
        vocab_size=json["vocab_size"],
        encoder=stack("encoder"),
        decoder=stack("decoder"),
        positions="sinusoidal" if form.sinusoidal else "learned",
        max_length=json["max_position_embeddings"],
        position_offset=offset,
        embedding_scale=width**0.5 if json["scale_embedding"] else 1.0,
        embedding_norm=form.embedding_norm,
        final_norm=form.final_norm,
        logits_bias=BIAS in tensors or not tensors,
        family=name,
        **read_ids(json),
    )


def write_sizes(config: EncoderDecoderConfig) -> dict[str, int]:
    """The keys of config.json that say the sizes of encoder and decoder."""
    return {
        f"{side}_{theirs}": getattr(getattr(config, side), ours)
        for side in SIDES
        for theirs, ours in SIZES.items()
    }


def write(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The config.json of an EncoderDecoderConfig."""
    return write_sizes(config) | {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "max_position_embeddings": config.max_length,
        "activation_function": ACTIVATIONS[config.decoder.activation],
        "scale_embedding": config.embedding_scale != 1,
        **write_ids(config),
    }


def entries(config: EncoderDecoderConfig) -> list[Entry]:
    """The tensors in the order of transformers' files."""
    found = []
    if config.logits_bias:
        found.append(Entry(BIAS, ("logits_bias",), file_shape=(1, config.vocab_size)))
    found.append(Entry("model.shared.weight", ("embed/embedding",)))
    for side in SIDES:
        theirs = f"model.{side}."
        if config.positions == "learned":
            found.append(Entry(f"{theirs}embed_positions.weight", (f"{side}/positions/embedding",)))
        for i in range(getattr(config, side).num_layers):
            found += layer_entries(f"{theirs}layers.{i}.", f"{side}/layers/{i}/", side == "decoder")
        if config.embedding_norm:
            found += layer_norm(f"{theirs}layernorm_embedding", f"{side}/embed_norm")
        if config.final_norm:
            found += layer_norm(f"{theirs}layer_norm", f"{side}/final_norm")
    return found


def layer_entries(theirs: str, ours: str, decodes: bool, key_bias: bool = True) -> list[Entry]:
    """The tensors of a layer of the encoder or decoder, given both prefixes."""
    parts = {"self_attn": "attention"} | ({"encoder_attn": "cross"} if decodes else {})
    linear, norms = {}, {"final_layer_norm": "mlp_norm"}
    for module, path in parts.items():
        linear |= {f"{module}.{name}": f"{path}/{kernel}" for name, kernel in _ATTENTION.items()}
        norms[f"{module}_layer_norm"] = f"{path}_norm"
    found = []
    for name, path in (linear | {"fc1": "mlp/up", "fc2": "mlp/down"}).items():
        found.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True))
        if key_bias or not path.endswith("/key"):
            found.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",)))
    for name, path in norms.items():
        found += layer_norm(f"{theirs}{name}", f"{ours}{path}")
    return found


def rename(name: str) -> str:
    """The name of a tensor in files of the whole model; both sides' embeddings are the shared ones."""
    if not name.startswith(("model.", "lm_head.", BIAS)):
        name = f"model.{name}"
    tables = [f"model.{side}.embed_tokens.weight" for side in SIDES]
    return "model.shared.weight" if name in tables else name


def ignores(name: str, config: EncoderDecoderConfig) -> bool:
    """Returns whether the tensor is a copy of the embeddings, a computed table or a version number."""
    computed = name.endswith(".embed_positions.weight") and config.positions != "learned"
    return computed or name == "lm_head.weight" or name.endswith("coder.version")
