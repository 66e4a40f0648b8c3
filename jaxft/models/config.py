"""The configuration of a transformer decoder, as one flat dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

from jaxft.models.special_ids import SpecialIds


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: frequencies theta^(-2i/K), rescaled for contexts longer than trained.

    The frequencies of "dynamic" and "longrope" depend on the length of the text: see jaxft.models.rope.
    """

    theta: float = 10_000.0
    scaling: Literal[
        "default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"
    ] = "default"
    # Fraction of a head's features that turn: the first, or, if "proportional", the first of each half.
    share: float = 1.0
    factor: float = 1.0  # new context length over the old
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_length: int = 8192  # dynamic, llama3, yarn, longrope
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: see jaxft.models.rope
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
    beside: bool = False  # the MLP of intermediate_size stays, and the outputs of both are added
    router_norm: bool = False  # the router reads its input normed, times a learned scale and D^-1/2
    gains: bool = False  # a learned factor of each expert's gates
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
class Delta:
    """Gated DeltaNet: layers that keep a state of fixed size instead of attending to past tokens.

    Yang et al., 2024, arxiv.org/abs/2412.06464; see jaxft.models.delta.
    """

    layers: tuple[int, ...]  # those that have it; the others attend
    key_heads: int  # of queries and keys, each for value_heads / key_heads heads of values
    value_heads: int
    key_size: int  # features of a head
    value_size: int
    taps: int = 4  # tokens that the short convolution sees, including the one at hand
    joined: bool = False  # the projections' columns are ordered by key heads, as in Qwen3-Next

    def __post_init__(self):
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"Delta: value_heads ({self.value_heads}) must be a multiple of key_heads ({self.key_heads})."
            )

    @property
    def widths(self) -> tuple[int, int, int]:
        """Features of the queries, keys and values of all heads."""
        keys = self.key_heads * self.key_size
        return keys, keys, self.value_heads * self.value_size


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of the layers without a window, where they differ from those of the others."""

    size: int  # features of a head
    groups: int  # heads of keys and values
    tied: bool = False  # values are the projected keys, before norm and positions


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A second table of embeddings, of which each layer has its own part: see jaxft.models.per_layer."""

    vocab_size: int  # rows of the table
    size: int  # features of a layer's part


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """The properties of a layer that its params, or its place in a cache, follow from."""

    heads: Heads
    width: int  # of its MLP
    sparse: bool = False  # it has experts
    source: int | None = None  # the layer whose keys and values it reads; None: it has its own
    is_source: bool = False  # whether another layer reads its keys and values
    recurrent: bool = False  # a Gated DeltaNet replaces attention

    def has(self, path: str) -> bool:
        """Returns whether the layer has the params of `Attention` or others at a path ("attention/key")."""
        if self.recurrent and path.startswith("attention/"):
            return False
        if path in ("attention/key", "attention/key_norm"):
            return self.source is None
        return path != "attention/value" or (self.source is None and not self.heads.tied)


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
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu"] = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False  # of query, key and value
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False  # one norm over all heads, not one per head
    clip_qkv: float | None = None  # largest magnitude of queries, keys and values
    sinks: bool = False  # a learned logit for each head joins its softmax
    gated_attention: bool = False  # a sigmoid of each feature scales the heads' outputs
    latent: Latent | None = None  # keys and values come from it; head_dim is then its `turned`
    delta: Delta | None = None  # layers with a state instead of attention
    value_norm: bool = False  # values of a head are divided by their root mean square
    full_heads: Heads | None = None  # of the layers without a window, if they differ
    shared_layers: int = (
        0  # the last so many layers read the keys and values of others: see `reads_from`
    )
    shared_width: int | None = None  # of the MLPs of those layers, if it is not intermediate_size
    per_layer: PerLayer | None = None  # an input of each layer, from the tokens
    layer_scales: bool = False  # the residual stream is scaled after each layer by a constant
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
        full = self.full_heads
        if full is not None and self.num_heads % full.groups:
            raise ValueError(
                f"DecoderConfig: num_heads ({self.num_heads}) must be a multiple of the {full.groups} heads "
                "of keys in layers without a window."
            )
        own = self.num_layers - self.shared_layers
        kinds = [self.window(i) is None for i in range(self.num_layers)]
        if not 0 < own <= self.num_layers or not set(kinds[own:]) <= set(kinds[:own]):
            raise ValueError(
                f"DecoderConfig: the last {self.shared_layers} of {self.num_layers} layers read the keys and "
                "values of an earlier layer of their kind (with or without a window), and not all kinds have "
                f"one; windows: {self.windows}."
            )

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def has_experts(self, layer: int) -> bool:
        """True if `layer` has experts instead of an MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def has_state(self, layer: int) -> bool:
        """True if `layer` is a Gated DeltaNet instead of attention."""
        return self.delta is not None and layer in self.delta.layers

    def window(self, layer: int) -> int | None:
        """The number of tokens that `layer` sees, or None for all."""
        return self.windows[layer] if self.windows else None

    def heads(self, layer: int) -> Heads:
        """The heads of keys and values of `layer`."""
        if self.full_heads is not None and self.window(layer) is None:
            return self.full_heads
        return Heads(self.head_dim, self.num_kv_heads)

    def reads_from(self, layer: int) -> int | None:
        """The layer whose keys and values `layer` reads; None: it has its own.

        It is the last one of the same kind that has its own; the kinds are layers with and without a window.
        """
        own = self.num_layers - self.shared_layers
        if layer < own:
            return None
        kind = self.window(layer) is None
        return next(i for i in reversed(range(own)) if (self.window(i) is None) == kind)

    def layer(self, layer: int) -> LayerShape:
        """The shape of `layer`."""
        source, shared = (
            self.reads_from(layer),
            range(self.num_layers - self.shared_layers, self.num_layers),
        )
        wide = source is not None and self.shared_width is not None
        return LayerShape(
            heads=self.heads(layer),
            width=self.shared_width if wide else self.intermediate_size,
            sparse=self.has_experts(layer),
            source=source,
            is_source=any(self.reads_from(i) == layer for i in shared),
            recurrent=self.has_state(layer),
        )

    @property
    def stackable(self) -> bool:
        """True if all layers have params of the same shapes, and their own keys and values."""
        return self.delta is None and len({self.layer(i) for i in range(self.num_layers)}) == 1

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, features) of what a cache holds for a token, of each layer with its own keys and values."""
        own = range(self.num_layers - self.shared_layers)
        own = [i for i in own if not self.has_state(i)]
        if self.latent is not None:
            return tuple((1, self.latent.rank + self.latent.turned) for _ in own)
        return tuple((heads.groups, heads.size) for heads in map(self.heads, own))

    @property
    def cache_places(self) -> tuple[int, ...]:
        """The place of each layer's keys and values in a cache, or of its memory if it has a state."""
        places, counts = [], [0, 0]
        for layer in map(self.layer, range(self.num_layers)):
            if layer.source is not None:
                places.append(places[layer.source])
                continue
            places.append(counts[layer.recurrent])
            counts[layer.recurrent] += 1
        return tuple(places)

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


def embeddings_column(tower: Tower) -> str:
    """The column [B, K, D] of a batch that holds the outputs of a tower, which then is not run."""
    return f"{tower.name}_embeddings"


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
