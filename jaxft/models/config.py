"""The configuration of a transformer decoder, as one flat dataclass."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

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
    # numbers of pairs that turn by the positions in time, height and width: see jaxft.models.grid_positions
    sections: tuple[int, ...] = ()

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
    sigmoid: bool = False  # an expert's score is the sigmoid of its logit, not the softmax of all
    correction: bool = False  # a term for each expert is added to its score to choose, not to weigh
    groups: int = 1  # experts are chosen from `chosen_groups` of so many groups, side by side
    chosen_groups: int = 1
    group_best: int = 1  # a group's score is the sum of so many of its best
    scale: float = 1.0  # of the gates
    bias: bool = False  # of the router and of the experts' kernels
    interleaved: bool = False  # the columns of gate_up are gate, up, gate, up, ...
    swiglu: tuple[float, float] | None = None  # alpha and limit of gpt-oss's clamped SwiGLU
    shared_width: int = 0  # of the gated MLP that every token passes; 0: none
    shared_gate: bool = True  # whether its output is scaled by a sigmoid
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
        size = self.count // max(self.groups, 1)
        whole = self.groups >= 1 and self.count % self.groups == 0
        if not whole or not 1 <= self.chosen_groups <= self.groups:
            raise ValueError(
                f"Experts: {self.chosen_groups} of {self.groups} groups of {self.count} experts; expected 1 "
                "to all of them, of equal sizes."
            )
        if self.per_token > self.chosen_groups * size or self.group_best > size:
            raise ValueError(
                f"Experts: {self.chosen_groups} groups of {size} experts do not have the {self.per_token} of "
                f"a token, or the {self.group_best} that score a group."
            )


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: keys and values of all heads are projections of one latent.

    DeepSeek-V2, 2024, arxiv.org/abs/2405.04434, section 2.1. A head's queries and keys have `plain` features
    and `turned` ones with rotary positions; the latter, of keys, are shared by all heads.
    """

    rank: int  # of keys and values
    query_rank: int | None  # of queries; None: they are projected from the input
    plain: int  # features of a head without positions
    turned: int  # features of a head with rotary positions
    value: int  # features of a head's values
    interleaved: bool = True  # rotary positions turn the pairs (x_2i, x_2i+1) as stored
    mscale: float = 0.0  # YaRN's mscale_all_dim, by which the scores grow; 0: they do not

    @property
    def size(self) -> int:
        """Features of a head's queries and keys."""
        return self.plain + self.turned


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
    sinks: bool = False  # a learned logit for each head joins its softmax
    latent: Latent | None = None  # keys and values come from it; head_dim is then its `turned`
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
    # Parts that read images or audio, whose embeddings stand at the places of their tokens.
    towers: tuple[Tower, ...] = ()
    prefix_attention: bool = False  # tokens before an answer see each other in both directions
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
    def cache_shape(self) -> tuple[int, int]:
        """(heads, features) of what a cache holds for a token in a layer."""
        if self.latent is not None:
            return 1, self.latent.rank + self.latent.turned
        return self.num_kv_heads, self.head_dim

    @property
    def shared_window(self) -> int | None:
        """The window, if all layers have the same one."""
        return self.windows[0] if len(set(self.windows)) == 1 else None


class Tower(Protocol):
    """The config of a decoder's part for images or audio: a hashable value, such as jaxft.models.vision's.

    Attributes:
        name: of its params.
        columns: of the batch, which its module is called with.
        token: the id at whose places its embeddings stand.
    """

    name: str
    columns: tuple[str, ...]
    token: int

    def module(self, dtype: Any, remat: Any) -> Any:
        """The linen module called `name`: columns [B, M, ...] -> embeddings [B, K, D]."""

    def example(self, batch: int) -> dict[str, Any]:
        """The smallest columns, for `init` and shapes."""


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
