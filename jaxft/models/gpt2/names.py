"""The tensors of GPT-2."""

from __future__ import annotations

from jaxft.models import gguf
from jaxft.models.config import DecoderConfig
from jaxft.models.names import Entry, decoder_ignores, layer_norm, output_entries

MODULES = {
    "attn.c_attn": ("attention/query", "attention/key", "attention/value"),
    "attn.c_proj": ("attention/out",),
    "mlp.c_fc": ("mlp/up",),
    "mlp.c_proj": ("mlp/down",),
}
GGUF_MODULES = {
    "attn_qkv": MODULES["attn.c_attn"],
    "attn_output": MODULES["attn.c_proj"],
    "ffn_up": MODULES["mlp.c_fc"],
    "ffn_down": MODULES["mlp.c_proj"],
}
GGUF_POSITIONS = "position_embd.weight"
_LEAVES = ("kernel", "bias")


def entries(config: DecoderConfig) -> list[Entry]:
    """The tensors in the file's usual order.

    Its Conv1D stores [in, out] as in jaxft, with query, key and value side by side.
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
    """Returns whether the tensor is a causal mask, or a copy of the tied embeddings."""
    return name.endswith((".attn.bias", ".attn.masked_bias")) or decoder_ignores(name, config)


def gguf_entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a GGUF file, which stores [out, in], with query, key and value stacked by rows."""
    result = [
        Entry("token_embd.weight", ("embed/embedding",)),
        Entry(GGUF_POSITIONS, ("positions/embedding",)),
    ]
    for i in range(config.num_layers):
        theirs, ours = f"blk.{i}.", f"layers/{i}/"
        for name, paths in GGUF_MODULES.items():
            kernels, biases = (tuple(f"{ours}{p}/{leaf}" for p in paths) for leaf in _LEAVES)
            result.append(Entry(f"{theirs}{name}.weight", kernels, True))
            result.append(Entry(f"{theirs}{name}.bias", biases))
        for name, path in gguf.NORMS.items():
            result += layer_norm(f"{theirs}{name}", f"{ours}{path}")
    result += layer_norm("output_norm", "final_norm")
    return result + gguf.output_entries(config)
