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

__all__ = [
    "Generation",
    "SamplingConfig",
    "State",
    "append",
    "bucket",
    "decode",
    "fork",
    "generate",
    "left_pad",
    "prefill",
    "transform_logits",
]
