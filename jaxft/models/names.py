"""Maps the tensors of a file to leaves of a params tree; the names that Llama-like decoders share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxft.models.config import DecoderConfig, Delta, Experts


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file and the leaves in it, side by side on the leaves' last axis."""

    name: str
    paths: tuple[str, ...]  # "layers/0/attention/query/kernel"
    transposed: bool = False  # the file stores [out, in]
    permuted_heads: int = 0  # GGUF: rows interleave the rotary halves of this many heads
    offset: float = 0.0  # GGUF of Gemma stores 1 + scale
    file_shape: tuple[int, ...] = ()  # the file's shape if it differs from the leaf's
    axes: tuple[int, ...] = ()  # the file's axes in the leaf's order
    expert: int | None = None  # the tensor is this expert's part of a leaf [E, in, out]
    columns: tuple[int, int] | None = None  # it holds these columns of that part, not all of them
    as_stored: bool = False  # the leaf keeps the file's data type, whichever is asked for


LINEAR: Mapping[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("attention/query",),
    "self_attn.k_proj": ("attention/key",),
    "self_attn.v_proj": ("attention/value",),
    "self_attn.o_proj": ("attention/out",),
    "mlp.gate_proj": ("mlp/gate",),
    "mlp.up_proj": ("mlp/up",),
    "mlp.down_proj": ("mlp/down",),
}
_UNBIASED = ("attention/query", "attention/query_up", "attention/latent_up")  # of latent attention
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
QK_NORMS = {
    "self_attn.q_norm": "attention/query_norm",
    "self_attn.k_norm": "attention/key_norm",
}


# Projections of Gated DeltaNets: Qwen3-Next's, whose columns are ordered by key heads, and Qwen3.5's.
_JOINED = {"in_proj_qkvz": "mixed", "in_proj_ba": "rates"}
_SEPARATE = {
    "in_proj_qkv": "mixed", "in_proj_z": "gate", "in_proj_b": "beta", "in_proj_a": "decay"
}  # fmt: skip


class ExpertNames(NamedTuple):
    """The names of a layer's experts in a file, and of their kernels."""

    module: str  # "block_sparse_moe"
    gate: str
    up: str
    down: str
    shared: str = "shared_expert"


EXPERTS = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")


def expert_entries(
    experts: Experts, theirs: str, ours: str, names: ExpertNames = EXPERTS
) -> list[Entry]:
    """One tensor for each kernel of each expert of a layer, as in all versions of transformers' files."""
    theirs += f"{names.module}."
    up, down = (f"{ours}mlp/experts/{name}/kernel" for name in ("gate_up", "down"))
    entries = [Entry(f"{theirs}gate.weight", (f"{ours}mlp/router/kernel",), True)]
    if experts.correction:
        # Its differences are too small for 16 bits.
        path = (f"{ours}mlp/router/correction",)
        entries.append(Entry(f"{theirs}gate.e_score_correction_bias", path, as_stored=True))
    width = experts.width
    for e in range(experts.count):
        name = f"{theirs}experts.{e}."
        halves = ((names.gate, (0, width)), (names.up, (width, 2 * width)))
        for half, columns in halves:
            entry = Entry(f"{name}{half}.weight", (up,), True, expert=e, columns=columns)
            entries.append(entry)
        entries.append(Entry(f"{name}{names.down}.weight", (down,), True, expert=e))
    if experts.shared_width:
        for name in ("gate", "up", "down"):
            shared = (f"{ours}mlp/shared/{name}/kernel",)
            entries.append(Entry(f"{theirs}{names.shared}.{name}_proj.weight", shared, True))
    if experts.shared_width and experts.shared_gate:
        gate = (f"{ours}mlp/shared_gate/kernel",)
        entries.append(Entry(f"{theirs}{names.shared}_gate.weight", gate, True))
    return entries


def unpack_experts(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a file by the names of `expert_entries`, if one tensor [E, out, in] holds all experts.

    Qwen3.5's own files have `experts.gate_up_proj`, gate before up, and `experts.down_proj`; transformers
    writes one tensor for each expert. The parts are views, so that memory-mapped tensors are not read.
    """
    found = {}
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        if not (place.endswith(".experts") and last in ("gate_up_proj", "down_proj")):
            found[name] = tensor
            continue
        half = tensor.shape[1] // 2
        parts = {"down_proj": slice(None)}
        if last == "gate_up_proj":
            parts = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
        for e in range(tensor.shape[0]):
            found |= {f"{place}.{e}.{n}.weight": tensor[e, rows] for n, rows in parts.items()}
    return found


def delta_entries(delta: Delta, theirs: str, ours: str) -> list[Entry]:
    """The tensors of a layer's Gated DeltaNet."""
    theirs, ours = f"{theirs}linear_attn.", f"{ours}attention/"
    linear = (_JOINED if delta.joined else _SEPARATE) | {"out_proj": "out"}
    size = sum(delta.widths), 1, delta.taps
    taps = (f"{ours}convolution",)
    return [
        Entry(f"{theirs}dt_bias", (f"{ours}dt_bias",)),
        Entry(f"{theirs}A_log", (f"{ours}a_log",)),
        Entry(f"{theirs}conv1d.weight", taps, file_shape=size, axes=(2, 1, 0)),
        Entry(f"{theirs}norm.weight", (f"{ours}norm/scale",)),
        *(
            Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True)
            for name, path in linear.items()
        ),
    ]


def decoder_entries(
    config: DecoderConfig,
    norms: Mapping[str, str] = NORMS,
    experts: Callable[[Experts, str, str], list[Entry]] = expert_entries,
    linear: Mapping[str, tuple[str, ...]] = LINEAR,
) -> list[Entry]:
    """The tensors of a Llama-like decoder in a Hugging Face checkpoint, in the file's usual order.

    Args:
        config: of the model.
        norms: name in the file -> path in a block, for the norms of each layer.
        experts: (experts, prefix in the file, prefix of the leaves) -> the tensors of a layer's experts.
        linear: name in the file -> paths in a block of the layers that it holds side by side.
    """
    entries = [Entry("model.embed_tokens.weight", ("embed/embedding",))]
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}.", f"layers/{i}/"
        shape, replaced = config.layer(i), config.has_experts(i) and not config.experts.beside
        for name, paths in linear.items():
            if (paths[0].startswith("mlp/") and replaced) or not shape.has(paths[0]):
                continue
            kernels, biases = (
                tuple(f"{ours}{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias")
            )
            entries.append(Entry(f"{theirs}{name}.weight", kernels, True))
            if _has_bias(config, paths[0]):
                entries.append(Entry(f"{theirs}{name}.bias", biases))
        if config.has_state(i):
            entries += delta_entries(config.delta, theirs, ours)
        if config.has_experts(i):
            entries += experts(config.experts, theirs, ours)
        for name, path in norms.items():
            if not shape.has(path):
                continue
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/scale",)))
    entries.append(Entry("model.norm.weight", ("final_norm/scale",)))
    return entries + output_entries(config)


def output_entries(config: DecoderConfig) -> list[Entry]:
    """The output projection of a causal language model, if its embeddings are not tied."""
    return [] if config.tie_embeddings else [Entry("lm_head.weight", ("head/kernel",), True)]


def layer_norm(theirs: str, ours: str) -> list[Entry]:
    """The scale and bias of a LayerNorm."""
    return [
        Entry(f"{theirs}.weight", (f"{ours}/scale",)),
        Entry(f"{theirs}.bias", (f"{ours}/bias",)),
    ]


def with_prefix(prefix: str) -> Callable[[str], str]:
    """A function that adds `prefix` to names that lack it, such as those of bare base models.

    Heads are outside the base model and keep their names.
    """
    return lambda name: name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name


def decoder_ignores(name: str, config: DecoderConfig) -> bool:
    """Returns whether no Llama-like decoder needs the tensor: a buffer, or a copy of the tied embeddings."""
    return name.endswith(".rotary_emb.inv_freq") or _tied_head(name, config)


def _tied_head(name: str, config: DecoderConfig) -> bool:
    return name == "lm_head.weight" and config.tie_embeddings


def _has_bias(config: DecoderConfig, path: str) -> bool:
    if path.startswith("mlp/"):
        return config.mlp_bias
    if path == "attention/out":
        return config.output_bias
    unbiased = () if config.latent is None else _UNBIASED
    return config.attention_bias and path not in unbiased
