"""Models: Flax modules and their configurations."""

from jaxft.models.cache import Cache, take_rows
from jaxft.models.columns import as_rows, of_group
from jaxft.models.config import (
    DecoderConfig,
    Delta,
    Experts,
    Heads,
    Latent,
    PerLayer,
    Rope,
    tiny_config,
)
from jaxft.models.decoder import Decoder, Output
from jaxft.models.encoder import Encoder, EncoderConfig, EncoderOutput
from jaxft.models.encoder_decoder import EncoderDecoder, SourceCache
from jaxft.models.encoder_decoder_config import EncoderDecoderConfig, StackConfig
from jaxft.models.errors import CheckpointError
from jaxft.models.experts import ExpertsMlp, Routing
from jaxft.models.families import FAMILIES, config_of, family_of, layers_of
from jaxft.models.family import Family, Gguf, HuggingFace
from jaxft.models.first_ids import languages, speech_begin
from jaxft.models.layers import read
from jaxft.models.names import Entry
from jaxft.models.prediction import Forward, Prediction, predict, project, with_noise
from jaxft.models.sentences import Embedding, Pooling, embedding_of, mean_pool
from jaxft.models.soft import virtual_tokens
from jaxft.models.special_ids import SpecialIds
from jaxft.models.stacking import is_stacked, stack_layers, unstack_layers
from jaxft.models.transformer import Targets

__all__ = [
    "FAMILIES",
    "Cache",
    "CheckpointError",
    "Decoder",
    "DecoderConfig",
    "Delta",
    "Embedding",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "EncoderOutput",
    "Entry",
    "Experts",
    "ExpertsMlp",
    "Family",
    "Gguf",
    "Heads",
    "HuggingFace",
    "Forward",
    "Latent",
    "Output",
    "PerLayer",
    "Pooling",
    "Prediction",
    "Rope",
    "Routing",
    "SourceCache",
    "SpecialIds",
    "StackConfig",
    "Targets",
    "config_of",
    "embedding_of",
    "family_of",
    "as_rows",
    "is_stacked",
    "languages",
    "layers_of",
    "mean_pool",
    "of_group",
    "predict",
    "project",
    "read",
    "speech_begin",
    "stack_layers",
    "take_rows",
    "tiny_config",
    "unstack_layers",
    "virtual_tokens",
    "with_noise",
]
