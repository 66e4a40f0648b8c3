"""The tensors of GPT-2."""

from __future__ import annotations

from jaxft.models.config import DecoderConfig
from jaxft.models.names import Entry, decoder_ignores, layer_norm, output_entries

MODULES = {
    "attn.c_attn": ("attention/query", "attention/key", "attention/value"),
    "attn.c_proj": ("attention/out",),
    "mlp.c_fc": ("mlp/up",),
    "mlp.c_proj": ("mlp/down",),
}


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors in the file's usual order.

    Its Conv1D stores [in, out] as jaxft does, and query, key and value side by side.
    """
    result = [
        Entry("transformer.wte.weight", ("embed/embedding",)),
        Entry("transformer.wpe.weight", ("positions/embedding",)),
    ]
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"layers/{i}/"
        for name, paths in MODULES.items():
            for theirs_leaf, leaf in (("weight", "kernel"), ("bias", "bias")):
                joined = tuple(f"{ours}{path}/{leaf}" for path in paths)
                result.append(Entry(f"{theirs}{name}.{theirs_leaf}", joined))
        for name, path in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            result += layer_norm(f"{theirs}{name}", f"{ours}{path}")
    result += layer_norm("transformer.ln_f", "final_norm")
    return result + output_entries(config)


def ignores(name: str, config: DecoderConfig) -> bool:
    """Whether the tensor is a causal mask, or a copy of the tied embeddings."""
    return name.endswith((".attn.bias", ".attn.masked_bias")) or decoder_ignores(name, config)
