"""The configuration of a transformer that reads a source sentence and writes its answer."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

from jaxft.models.special_ids import SpecialIds, as_ids

# Relative and computed positions have no table that ends; the sampler needs a number.
UNBOUNDED = 1 << 20
# Ids that generation needs: field of the config -> key of config.json and generation_config.json.
IDS = {
    "start": "decoder_start_token_id",
    "forced_bos": "forced_bos_token_id",
    "forced_eos": "forced_eos_token_id",
}
# Further settings of generation in old config.json files.
_GENERATION = (
    "bad_words_ids num_beams length_penalty early_stopping no_repeat_ngram_size min_length max_length "
    "suppress_tokens begin_suppress_tokens"
).split()


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
    key_bias: bool = True  # of the keys too: not in Whisper
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
        """Returns whether the MLP has biases, under the name that `Mlp` reads."""
        return self.bias


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder of the source and a decoder of the answer with attention to it: docs/models.md.

    `start`, `forced_bos` and `forced_eos` are ids of config.json. If there is a generation_config.json, its
    ids count instead: `decoder_start`, `first` and `last`.
    """

    vocab_size: int
    encoder: StackConfig
    decoder: StackConfig
    positions: Literal["relative", "learned", "sinusoidal"] = "learned"
    max_length: int = 1024  # positions of the source and of the answer
    source_length: int = 0  # positions of the source, if there are more or fewer; 0: max_length
    mel: int = 0  # log-mel features of each frame that the encoder reads; 0: it reads tokens
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

    def __post_init__(self):
        # Without a generation_config.json, transformers takes these settings from config.json.
        if not self.special.generation:
            given = json.loads(self.source or "{}")
            settings = {key: given[key] for key in _GENERATION if given.get(key) is not None}
            ids = {key: getattr(self, field) for field, key in IDS.items()}
            settings |= {key: i for key, i in ids.items() if i is not None}
            text = json.dumps(settings, sort_keys=True) if settings else ""
            special = dataclasses.replace(self.special, generation=text)
            object.__setattr__(self, "special", special)

    @property
    def hidden_size(self) -> int:
        """Features of a token, in both stacks."""
        return self.decoder.hidden_size

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, which are those that `scan_layers` stacks."""
        return self.decoder.num_layers

    @property
    def source_places(self) -> int:
        """Positions of the source."""
        return self.source_length or self.max_length

    @property
    def decoder_start(self) -> int | None:
        """The id that begins a decoder's text; None: no file names one."""
        return self._id("start")

    @property
    def first(self) -> int | None:
        """The id that is forced after `decoder_start`; None: none."""
        return self._id("forced_bos")

    @property
    def last(self) -> int | None:
        """The id that is forced at the last place of an answer that did not end; None: none."""
        return self._id("forced_eos")

    @property
    def banned(self) -> tuple[tuple[int, ...], ...]:
        """The sequences of ids that must not be in answers."""
        settings = json.loads(self.special.generation or "{}")
        words = settings.get("bad_words_ids") or ()
        alone = as_ids("generation_config.json", settings, "suppress_tokens")
        return (*(tuple(word) for word in words), *((i,) for i in alone))

    @property
    def banned_first(self) -> tuple[int, ...]:
        """The ids with which no answer begins."""
        settings = json.loads(self.special.generation or "{}")
        return as_ids("generation_config.json", settings, "begin_suppress_tokens")

    def _id(self, field):
        settings = json.loads(self.special.generation or "{}")
        ids = as_ids("generation_config.json", settings, IDS[field])
        return ids[0] if ids else None
