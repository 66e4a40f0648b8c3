"""The record of T5."""

from __future__ import annotations

from jaxft.models.encoder_decoder import EncoderDecoder
from jaxft.models.encoder_decoder_config import EncoderDecoderConfig
from jaxft.models.family import Family, HuggingFace
from jaxft.models.hf_encoder_decoders import LAYERS
from jaxft.models.names import Entry
from jaxft.models.special_ids import SpecialIds
from jaxft.models.t5 import config

_KERNELS = {"q": "query", "k": "key", "v": "value", "o": "out"}
_SOURCE_BIAS = (
    "layer.1.EncDecAttention.relative_attention_bias.weight"  # of the first files; unused
)


def entries(config: EncoderDecoderConfig) -> list[Entry]:
    """The tensors of a T5ForConditionalGeneration."""
    found = [Entry("shared.weight", ("embed/embedding",))]
    for side in ("encoder", "decoder"):
        stack, parts = getattr(config, side), [("SelfAttention", "attention")]
        parts += [("EncDecAttention", "cross")] if side == "decoder" else []
        for i in range(stack.num_layers):
            theirs, ours = f"{side}.block.{i}.layer.", f"{side}/layers/{i}/"
            for j, (module, path) in enumerate(parts):
                for name, kernel in _KERNELS.items():
                    place = (f"{ours}{path}/{kernel}/kernel",)
                    found.append(Entry(f"{theirs}{j}.{module}.{name}.weight", place, True))
                if i == j == 0:
                    table = f"{theirs}0.SelfAttention.relative_attention_bias.weight"
                    found.append(Entry(table, (f"{side}/relative/embedding",)))
                norm = f"{theirs}{j}.layer_norm.weight"
                found.append(Entry(norm, (f"{ours}{path}_norm/scale",)))
            last, up = f"{theirs}{len(parts)}.", "wi_1" if stack.gated_mlp else "wi"
            linear = {"wi_0": "gate"} if stack.gated_mlp else {}
            for name, kernel in (linear | {up: "up", "wo": "down"}).items():
                place = (f"{ours}mlp/{kernel}/kernel",)
                found.append(Entry(f"{last}DenseReluDense.{name}.weight", place, True))
            found.append(Entry(f"{last}layer_norm.weight", (f"{ours}mlp_norm/scale",)))
        found.append(Entry(f"{side}.final_layer_norm.weight", (f"{side}/final_norm/scale",)))
    if not config.tie_embeddings:
        found.append(Entry("lm_head.weight", ("head/kernel",), True))
    return found


def _rename(name: str) -> str:
    tables = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return "shared.weight" if name in tables else name


def _ignores(name: str, config: EncoderDecoderConfig) -> bool:
    """Returns whether the tensor is a copy of the embeddings, or a table that no layer reads."""
    return name.endswith(_SOURCE_BIAS) or (name == "lm_head.weight" and config.tie_embeddings)


T5 = Family(
    name="t5",
    module=EncoderDecoder,
    huggingface=HuggingFace(
        architecture="T5ForConditionalGeneration",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.KEYS,
        entries=entries,
        rename=_rename,
        ignores=_ignores,
        task_type="SEQ_2_SEQ_LM",
        special=SpecialIds(eos=(1,), pad=0),
    ),
    layers=LAYERS,
)
