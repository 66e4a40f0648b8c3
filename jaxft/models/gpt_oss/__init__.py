"""gpt-oss: experts with biases, windows on every other layer, a logit in each head's softmax."""

from jaxft.models.gpt_oss.record import GPT_OSS

__all__ = ["GPT_OSS"]
