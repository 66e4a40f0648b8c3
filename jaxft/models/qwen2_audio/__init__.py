"""Qwen2-Audio: answers to texts and sounds."""

from jaxft.models.qwen2_audio.record import QWEN2_AUDIO

__all__ = ["QWEN2_AUDIO"]
