"""The configuration of a transformer that reads a source sentence and writes its answer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

from jaxft.models.special_ids import SpecialIds, as_ids

# Relative and computed positions have no table that ends; the sampler needs a number.
UNBOUNDED = 1 << 20


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """The layers of an encoder or of a decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "gelu"
    gated_mlp: bool = False
    bias: bool = True  # of all projections
    norm: Literal["rms", "layer"] = "layer"
    norm_eps: float = 1e-5
    pre_norm: bool = False  # norms before each sublayer rather than after
    scaled: bool = True  # whether scores are multiplied by head_dim^-1/2
    relative_buckets: int = 0  # of T5's relative positions; 0: none
    relative_distance: int = 128  # tokens from which on all distances have the last bucket

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.scaled else 1.0

    @property
    def mlp_bias(self) -> bool:
        """Whether the MLP has biases, under the name that `Mlp` reads."""
        return self.bias


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder of the source and a decoder of the answer with attention to it: docs/models.md.

    `start`, `forced_bos` and `forced_eos` are ids of config.json; `decoder_start`, `first` and `last` are
    those that generation_config.json changes.
    """

    vocab_size: int
    encoder: StackConfig
    decoder: StackConfig
    positions: Literal["relative", "learned", "sinusoidal"] = "learned"
    max_length: int = 1024  # positions of the source and of the answer
    position_offset: int = 0  # rows of a learned table before that of the first token
    embedding_scale: float = 1.0
    embedding_norm: bool = False  # a norm after the embeddings of encoder and decoder
    final_norm: bool = False  # a norm after the last layer of encoder and decoder
    output_scale: float = 1.0  # of the hidden states that the output projection multiplies
    logits_bias: bool = False  # a constant for each token, added to the logits
    tie_embeddings: bool = True
    family: str = "t5"  # Hugging Face's model_type
    # Ids that a decoder's text begins with, and that is forced at its last position.
    start: int | None = dataclasses.field(default=None, compare=False)
    forced_bos: int | None = dataclasses.field(default=None, compare=False)
    forced_eos: int | None = dataclasses.field(default=None, compare=False)
    special: SpecialIds = dataclasses.field(default=SpecialIds(), compare=False)
    source: str = dataclasses.field(default="", compare=False, repr=False)  # see DecoderConfig

    @property
    def hidden_size(self) -> int:
        """Features of a token, in both stacks."""
        return self.decoder.hidden_size

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, which are those that `scan_layers` stacks."""
        return self.decoder.num_layers

    @property
    def decoder_start(self) -> int | None:
        """The id that begins a decoder's text; None: no file names one."""
        return self._generation("decoder_start_token_id", self.start)

    @property
    def first(self) -> int | None:
        """The id that is forced after `decoder_start`; None: none."""
        return self._generation("forced_bos_token_id", self.forced_bos)

    @property
    def last(self) -> int | None:
        """The id that is forced at the last place of an answer that did not end; None: none."""
        return self._generation("forced_eos_token_id", self.forced_eos)

    @property
    def banned(self) -> tuple[tuple[int, ...], ...]:
        """The sequences of ids that generation_config.json, or else config.json, forbids in answers."""
        found: Any = None
        for text in (self.source, self.special.generation):
            found = json.loads(text or "{}").get("bad_words_ids") or found
        return tuple(tuple(word) for word in found or ())

    def _generation(self, name, default):
        settings = json.loads(self.special.generation or "{}")
        ids = as_ids("generation_config.json", settings, name, () if default is None else default)
        return ids[0] if ids else None
