"""Whisper: texts from speech."""

from jaxft.models.whisper.record import WHISPER

__all__ = ["WHISPER"]
