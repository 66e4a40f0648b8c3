"""The record of SmolVLM."""

from __future__ import annotations

from jaxft.models.idefics3.record import tiled_family

SMOLVLM = tiled_family("smolvlm", "SmolVLMForConditionalGeneration")
