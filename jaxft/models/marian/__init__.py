"""Marian: translation, the opus-mt models."""

from jaxft.models.marian.record import MARIAN

__all__ = ["MARIAN"]
