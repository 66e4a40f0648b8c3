"""The configuration of a transformer decoder, as one flat dataclass."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxft.models.special_ids import SpecialIds


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i/K), rescaled for contexts longer than trained.

    The frequencies of "dynamic" and "longrope" depend on the length of the text: see jaxft.models.rope.
    """

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    share: float = 1.0  # fraction of a head's features, from the first, that turn
    factor: float = 1.0  # new context length over the old
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_length: int = 8192  # dynamic, llama3, yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: see `attention_factor`
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    # [K/2] divisors of the frequencies: longrope's for short texts, or those that GGUF files carry
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # longrope: for texts longer than original_max_length

    @property
    def by_length(self) -> bool:
        """True if the frequencies depend on the length of the text."""
        return self.scaling in ("dynamic", "longrope")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixtures of experts in a decoder."""

    count: int
    per_token: int  # experts that a token passes
    width: int  # features of an expert's MLP
    normalised: bool = True  # whether a token's gates are divided by their sum
    shared_width: int = 0  # of the gated MLP that every token passes; 0: none
    dense_layers: tuple[int, ...] = ()  # layers with an MLP of intermediate_size instead
    balance: float = (
        0.0  # the file's coefficient of the balance loss: see jaxft.losses.balance_loss
    )

    def __post_init__(self):
        if not 1 <= self.per_token <= self.count or self.width < 1:
            raise ValueError(
                f"Experts: {self.per_token} of {self.count} experts per token with {self.width} features; "
                "expected 1 to all of them, of at least one feature."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: the families of docs/models.md that predict the next token.

    Lengths are in tokens. `windows` holds, for each layer, the number of tokens that it sees (including
    the query's own), or None for all; an empty tuple means None for every layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int = 2048
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma multiplies by 1 + scale
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False  # of query, key and value
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False  # one norm over all heads, not one per head
    clip_qkv: float | None = None  # largest magnitude of queries, keys and values
    experts: Experts | None = None  # instead of the MLPs
    pre_norms: bool = True  # norms before attention and MLP
    post_norms: bool = False  # norms after attention and MLP
    rope: Rope | None = Rope()
    local_rope: Rope | None = None  # of the layers with a window, if it differs
    unrotated: tuple[int, ...] = ()  # layers without rotary positions
    learned_positions: bool = False
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None  # None: head_dim^-1/2
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    output_scale: float = 1.0  # of the final hidden states, and so of the logits
    tie_embeddings: bool = True
    family: str = "llama"  # Hugging Face's model_type, under which files are written
    # The ids that begin, end and pad texts. No program depends on them, so a change recompiles none.
    special: SpecialIds = dataclasses.field(default=SpecialIds(), compare=False)
    # The config.json that it was read from; unchanged values are written again from it.
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"DecoderConfig: {name} must be positive, got {getattr(self, name)}."
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})."
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"DecoderConfig: windows has {len(self.windows)} entries for {self.num_layers} "
                "layers; give one per layer (None: no window) or none at all."
            )

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def has_experts(self, layer: int) -> bool:
        """True if `layer` has experts instead of an MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def window(self, layer: int) -> int | None:
        """The number of tokens that `layer` sees, or None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def shared_window(self) -> int | None:
        """The window, if all layers have the same one."""
        return self.windows[0] if len(set(self.windows)) == 1 else None


def tiny_config(vocab_size: int = 512, max_length: int = 512) -> DecoderConfig:
    """A Llama-like model of about 0.3 M parameters, for runs of seconds and for tests."""
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        max_length=max_length,
    )


def attention_factor(rope: Rope) -> float:
    """Factor of the cosines and sines under YaRN and LongRoPE, 1 otherwise.

    By default 0.1 ln s + 1 (YaRN, Peng et al., 2023, arxiv.org/abs/2309.00071) and sqrt(1 + ln s / ln L)
    (LongRoPE, Ding et al., 2024, arxiv.org/abs/2402.13753), s = factor, L = original_max_length.
    """
    if rope.scaling not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.scaling == "yarn":
        return 0.1 * math.log(rope.factor) + 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_length))
