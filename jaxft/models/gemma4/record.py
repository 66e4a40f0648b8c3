"""The record of Gemma 4's text model: Google, 2026, huggingface.co/google/gemma-4-E2B."""

from __future__ import annotations

import functools

from jaxft.models import hf_config, names
from jaxft.models.config import DecoderConfig, Experts
from jaxft.models.decoder import Decoder
from jaxft.models.family import Family
from jaxft.models.gemma2.names import NORMS
from jaxft.models.gemma4 import config
from jaxft.models.names import Entry
from jaxft.models.special_ids import SpecialIds

_EXPERT_NORMS = {
    "post_feedforward_layernorm_1": "post_dense_norm",
    "pre_feedforward_layernorm_2": "experts_norm",
    "post_feedforward_layernorm_2": "post_experts_norm",
}
_TABLE = {
    "embed_tokens_per_layer": "embed/embedding",
    "per_layer_model_projection": "projection/kernel",
    "per_layer_projection_norm": "norm/scale",
}
_INPUT = {
    "per_layer_input_gate": "per_layer/gate/kernel",
    "per_layer_projection": "per_layer/down/kernel",
    "post_per_layer_input_norm": "per_layer/norm/scale",
}


def _entries(decoder: DecoderConfig) -> list[Entry]:
    norms = NORMS | names.QK_NORMS | (_EXPERT_NORMS if decoder.experts is not None else {})
    experts = functools.partial(_expert_entries, size=decoder.hidden_size)
    entries = names.decoder_entries(decoder, norms=norms, experts=experts)
    table, own = ({}, {}) if decoder.per_layer is None else (_TABLE, _INPUT)
    entry = lambda name, path: Entry(f"{name}.weight", (path,), path.endswith("/kernel"))
    entries += [entry(f"model.{name}", f"per_layer/{path}") for name, path in table.items()]
    for i in range(decoder.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers/{i}/"
        entries += [entry(f"{theirs}{name}", f"{ours}{path}") for name, path in own.items()]
        entries.append(Entry(f"{theirs}layer_scalar", (f"{ours}layer_scale",)))
    return entries


def _expert_entries(experts: Experts, theirs: str, ours: str, size: int) -> list[Entry]:
    """One tensor [E, out, in] for all experts of a layer, whose kernels are [E, in, out] here."""
    router, count, width = f"{ours}mixture/router", experts.count, experts.width
    shapes = {"gate_up": (count, 2 * width, size), "down": (count, size, width)}
    kernels = [
        Entry(
            f"{theirs}experts.{name}_proj",
            (f"{ours}mixture/experts/{name}/kernel",),
            file_shape=shape,
            axes=(0, 2, 1),
        )
        for name, shape in shapes.items()
    ]
    return kernels + [
        Entry(f"{theirs}router.proj.weight", (f"{router}/kernel",), True),
        Entry(f"{theirs}router.scale", (f"{router}/scale",)),
        Entry(f"{theirs}router.per_expert_scale", (f"{router}/gains",)),
    ]


def _ignores(name: str, decoder: DecoderConfig) -> bool:
    """Returns whether a tensor is not needed: also keys and values of layers that read those of others."""
    parts = name.split(".")
    if name.startswith("model.layers.") and parts[3:4] == ["self_attn"] and parts[2].isdecimal():
        layer, unused = int(parts[2]), ("k_proj", "v_proj", "k_norm", "v_norm")
        if (
            layer < decoder.num_layers
            and decoder.reads_from(layer) is not None
            and parts[4] in unused
        ):
            return True
    return names.decoder_ignores(name, decoder)


GEMMA4 = Family(
    name="gemma4_text",
    module=Decoder,
    huggingface=hf_config.decoder_codec(
        architecture="Gemma4ForCausalLM",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.KEYS,
        entries=_entries,
        ignores=_ignores,
        special=SpecialIds(bos=2, eos=(1,), pad=0),
    ),
)
