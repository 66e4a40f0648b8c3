"""DeepSeek-V3, R1 and Moonlight: DeepSeek-V2 with sigmoid scores and a corrected choice."""

from jaxft.models.deepseek_v3.record import DEEPSEEK_V3

__all__ = ["DEEPSEEK_V3"]
