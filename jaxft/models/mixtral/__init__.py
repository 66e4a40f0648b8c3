"""Mixtral: Mistral with experts instead of MLPs."""

from jaxft.models.mixtral.record import MIXTRAL

__all__ = ["MIXTRAL"]
