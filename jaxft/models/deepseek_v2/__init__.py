"""DeepSeek-V2: multi-head latent attention, shared experts, experts chosen within groups."""

from jaxft.models.deepseek_v2.record import DEEPSEEK_V2

__all__ = ["DEEPSEEK_V2"]
