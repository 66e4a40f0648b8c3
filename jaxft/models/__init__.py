"""Models: Flax modules and their configurations."""

from jaxft.models.cache import Cache
from jaxft.models.columns import as_rows, of_group
from jaxft.models.config import DecoderConfig, Rope, tiny_config
from jaxft.models.decoder import Decoder, Output
from jaxft.models.encoder import Encoder, EncoderConfig, EncoderOutput, mean_pool
from jaxft.models.layout import is_stacked, stack_layers, unstack_layers
from jaxft.models.prediction import Forward, Prediction, project, with_noise
from jaxft.models.soft import virtual_tokens

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "Forward",
    "Output",
    "Prediction",
    "Rope",
    "as_rows",
    "is_stacked",
    "mean_pool",
    "of_group",
    "project",
    "stack_layers",
    "tiny_config",
    "unstack_layers",
    "virtual_tokens",
    "with_noise",
]
