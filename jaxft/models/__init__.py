"""Models: Flax modules and their configurations."""

from jaxft.models.cache import Cache
from jaxft.models.config import DecoderConfig, Rope, tiny_config
from jaxft.models.decoder import Decoder, Output, project
from jaxft.models.encoder import Encoder, EncoderConfig, EncoderOutput, mean_pool
from jaxft.models.layers import read
from jaxft.models.layout import is_stacked, stack_layers, unstack_layers
from jaxft.models.soft import virtual_tokens

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "Output",
    "Rope",
    "is_stacked",
    "mean_pool",
    "project",
    "read",
    "stack_layers",
    "tiny_config",
    "unstack_layers",
    "virtual_tokens",
]
