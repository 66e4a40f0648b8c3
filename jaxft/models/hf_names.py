"""Which tensor of a file holds which leaf of a params tree."""

from __future__ import annotations

import dataclasses

from jaxft.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file and the leaves in it, side by side on the last axis of ours."""

    name: str
    paths: tuple[str, ...]  # "layers/0/attention/query/kernel"
    transposed: bool = False  # the file stores [out, in]
    permuted_heads: int = 0  # GGUF: rows interleave the rotary halves of so many heads
    offset: float = 0.0  # GGUF of Gemma stores 1 + scale
    file_shape: tuple[int, ...] = ()  # where the file's shape is another than ours
    axes: tuple[int, ...] = ()  # order in which our leaf runs through the file's axes


def huggingface_entries(config: DecoderConfig) -> list[Entry]:
    """The tensors of a Hugging Face checkpoint of this architecture, in the file's usual order."""
    return _gpt2(config) if config.family == "gpt2" else _llama_like(config)


def is_ignorable(name: str, config: DecoderConfig) -> bool:
    """Tensors that old files carry and no model needs: buffers, a copy of the tied embeddings."""
    buffers = (".rotary_emb.inv_freq", ".attn.masked_bias")
    mask = config.family == "gpt2" and name.endswith(".attn.bias")
    return name.endswith(buffers) or mask or (name == "lm_head.weight" and config.tie_embeddings)


LINEAR = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/out",
    "mlp.gate_proj": "mlp/gate",
    "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
}


def _llama_like(config: DecoderConfig) -> list[Entry]:
    entries = [Entry("model.embed_tokens.weight", ("embed/embedding",))]
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.post_norms:
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "post_mlp_norm",
        }
    if config.qk_norm:
        norms |= {
            "self_attn.q_norm": "attention/query_norm",
            "self_attn.k_norm": "attention/key_norm",
        }
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers/{i}/"
        for name, path in LINEAR.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True))
            if _has_bias(config, path):
                entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",)))
        for name, path in norms.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/scale",)))
    entries.append(Entry("model.norm.weight", ("final_norm/scale",)))
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", ("head/kernel",), True))
    return entries


def _has_bias(config: DecoderConfig, path: str) -> bool:
    if path.startswith("mlp/"):
        return config.mlp_bias
    return config.output_bias if path == "attention/out" else config.attention_bias


def _gpt2(config: DecoderConfig) -> list[Entry]:
    # GPT-2's Conv1D stores [in, out] as we do, and query, key and value side by side.
    entries = [
        Entry("transformer.wte.weight", ("embed/embedding",)),
        Entry("transformer.wpe.weight", ("positions/embedding",)),
    ]
    modules = {
        "attn.c_attn": ("attention/query", "attention/key", "attention/value"),
        "attn.c_proj": ("attention/out",),
        "mlp.c_fc": ("mlp/up",),
        "mlp.c_proj": ("mlp/down",),
    }
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"layers/{i}/"
        for name, paths in modules.items():
            for theirs_leaf, leaf in (("weight", "kernel"), ("bias", "bias")):
                joined = tuple(f"{ours}{path}/{leaf}" for path in paths)
                entries.append(Entry(f"{theirs}{name}.{theirs_leaf}", joined))
        for name, path in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
            entries += layer_norm(f"{theirs}{name}", f"{ours}{path}")
    entries += layer_norm("transformer.ln_f", "final_norm")
    if not config.tie_embeddings:
        entries.append(Entry("lm_head.weight", ("head/kernel",), True))
    return entries


def layer_norm(theirs: str, ours: str) -> list[Entry]:
    """The scale and bias of a LayerNorm."""
    return [
        Entry(f"{theirs}.weight", (f"{ours}/scale",)),
        Entry(f"{theirs}.bias", (f"{ours}/bias",)),
    ]
