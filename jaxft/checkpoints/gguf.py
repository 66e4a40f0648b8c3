"""GGUF files, the format of llama.cpp, through the `gguf` package: read only."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jaxft.checkpoints.errors import CheckpointError
from jaxft.models import DecoderConfig, Rope
from jaxft.models.hf_names import Entry

FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


class GgufTensor:
    """A tensor [out, in] of a GGUF file, of which the blocks are dequantised that an index touches."""

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: Any):
        gguf = _package()
        self._data, self._type = tensor.data, tensor.tensor_type
        self._dequantize = gguf.dequantize
        self._block, size = gguf.GGML_QUANT_SIZES[self._type]  # values and bytes
        self._width = size // self._data.itemsize
        self.shape = tuple(int(n) for n in tensor.shape[::-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part in float32; `index`: ..., or for each axis a slice or, but on the last, rows."""
        if index is ...:
            index = tuple(slice(0, n) for n in self.shape)
        *rows, columns = index
        first, last = columns.start // self._block, -(-columns.stop // self._block)
        data = self._data[(*rows, slice(first * self._width, last * self._width))]
        values = self._dequantize(np.ascontiguousarray(data), self._type)
        start, stop = (edge - first * self._block for edge in (columns.start, columns.stop))
        return values[..., start:stop].astype(np.float32, copy=False)


class GgufFile:
    """A GGUF file: `config`, `names`, and `read(name)` -> GgufTensor [out, in]."""

    def __init__(self, file: pathlib.Path):
        gguf = _package()
        try:
            self._reader = gguf.GGUFReader(str(file))
        except (ValueError, IndexError, OSError) as error:
            raise CheckpointError(
                f"{file}: not a whole GGUF file ({error}); download it again."
            ) from None
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.file = file
        self.names = set(self._tensors) - {"rope_freqs.weight"}
        self.config = _config(self)

    def value(self, name: str, default: Any = None) -> Any:
        """A metadata field's value."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors

    def read(self, name: str) -> GgufTensor:
        """The tensor, which is dequantised where it is indexed."""
        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        if kind not in TYPES:
            raise CheckpointError(
                f"{self.file}: tensor {name!r} is stored as {kind}; supported: {', '.join(TYPES)}."
            )
        return GgufTensor(tensor)

    def entries(self) -> list[Entry]:
        """Where each leaf of the params lies in the file."""
        return _entries(self)


def _package():
    try:
        import gguf
    except ImportError:
        raise ModuleNotFoundError(
            "reading GGUF files needs the package gguf: pip install 'jaxft[text]'"
        ) from None
    return gguf


def _config(file: GgufFile) -> DecoderConfig:
    name = file.value("general.architecture")
    if name not in FAMILIES:
        raise CheckpointError(
            f"{file.file}: unsupported architecture {name!r}; supported: {', '.join(FAMILIES)}."
        )
    get = lambda key, default=None: file.value(f"{name}.{key}", default)
    heads, width = get("attention.head_count"), get("embedding_length")
    layers, family = get("block_count"), FAMILIES[name]
    size = get("attention.key_length") or get("rope.dimension_count") or width // heads
    config = DecoderConfig(
        vocab_size=int(file._tensors["token_embd.weight"].shape[1]),
        hidden_size=width,
        intermediate_size=get("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=size,
        max_length=get("context_length", 2048),
        # Stored in float32: 1e-5 comes back as 9.99999975e-06, its decimal is meant.
        norm_eps=float(
            np.format_float_positional(np.float32(get("attention.layer_norm_rms_epsilon")))
        ),
        attention_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "gemma3_text"),
        rope=_rope(file, get),
        tie_embeddings=not file.has("output.weight"),
        family=family,
    )
    return _gemma(config, get) if family.startswith("gemma") else config


def _rope(file: GgufFile, get) -> Rope:
    theta = float(get("rope.freq_base", 10_000.0))
    if file.has("rope_freqs.weight"):
        return Rope(theta=theta, factors=tuple(map(float, file.read("rope_freqs.weight")[...])))
    kind = get("rope.scaling.type", "none")
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(get("rope.scaling.factor", 1.0)))
    if kind != "none":
        raise CheckpointError(f"{file.file}: unsupported rope scaling {kind!r}.")
    return Rope(theta=theta)


def _gemma(config: DecoderConfig, get) -> DecoderConfig:
    window, second = get("attention.sliding_window"), config.family == "gemma2"
    period = 2 if second else 6
    local = lambda i: i % 2 == 0 if second else (i + 1) % period != 0
    windows = tuple(window if local(i) else None for i in range(config.num_layers))
    scale = None
    if config.num_layers == (46 if second else 62):  # The 27B models, whose files don't say so.
        scale = (config.hidden_size // config.num_heads) ** -0.5
    return dataclasses.replace(
        config,
        norm_offset=1.0,
        activation="gelu_tanh",
        post_norms=True,
        embedding_scale=config.hidden_size**0.5,
        local_rope=None if second else Rope(theta=10_000.0),
        windows=windows if window else (),
        attention_scale=scale,
        attention_softcap=get("attn_logit_softcapping"),
        final_softcap=get("final_logit_softcapping"),
    )


def _entries(file: GgufFile) -> list[Entry]:
    config = file.config
    offset = 1.0 if config.norm_offset else 0.0
    llama = config.family == "llama"  # whose converter permutes rows for llama.cpp's rotary order
    entries = [Entry("token_embd.weight", ("embed/embedding",))]
    linear = {
        "attn_q": ("attention/query", config.num_heads if llama else 0),
        "attn_k": ("attention/key", config.num_kv_heads if llama else 0),
        "attn_v": ("attention/value", 0),
        "attn_output": ("attention/out", 0),
        "ffn_gate": ("mlp/gate", 0),
        "ffn_up": ("mlp/up", 0),
        "ffn_down": ("mlp/down", 0),
    }
    norms = {"attn_norm": "attention_norm", "ffn_norm": "mlp_norm"}
    if config.post_norms:
        norms |= {"post_attention_norm": "post_attention_norm", "post_ffw_norm": "post_mlp_norm"}
    if config.qk_norm:
        norms |= {"attn_q_norm": "attention/query_norm", "attn_k_norm": "attention/key_norm"}
    for i in range(config.num_layers):
        theirs, ours = f"blk.{i}.", f"layers/{i}/"
        for name, (path, heads) in linear.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True, heads))
            if config.attention_bias and name in ("attn_q", "attn_k", "attn_v"):
                entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",)))
        for name, path in norms.items():
            scale = (f"{ours}{path}/scale",)
            entries.append(Entry(f"{theirs}{name}.weight", scale, offset=offset))
    entries.append(Entry("output_norm.weight", ("final_norm/scale",), offset=offset))
    if not config.tie_embeddings:
        entries.append(Entry("output.weight", ("head/kernel",), True))
    return entries
