"""Generation: decoding rules and the KV-cache sampler."""

from jaxft.generation.decoding import SamplingConfig, transform_logits
from jaxft.generation.sampler import (
    Generation,
    State,
    append,
    bucket,
    decode,
    fork,
    generate,
    left_pad,
    prefill,
)
from jaxft.generation.server import ServerError, server_sampler

__all__ = [
    "Generation",
    "SamplingConfig",
    "ServerError",
    "State",
    "append",
    "bucket",
    "decode",
    "fork",
    "generate",
    "left_pad",
    "prefill",
    "server_sampler",
    "transform_logits",
]
