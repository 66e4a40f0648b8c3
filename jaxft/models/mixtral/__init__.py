"""Mixtral: Mistral with experts in place of its MLPs."""

from jaxft.models.mixtral.record import MIXTRAL

__all__ = ["MIXTRAL"]
