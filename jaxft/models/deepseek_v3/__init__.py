"""DeepSeek-V3 and R1, Moonlight, Kimi K2: DeepSeek-V2 with sigmoid scores and a corrected choice."""

from jaxft.models.deepseek_v3.record import DEEPSEEK_V3

__all__ = ["DEEPSEEK_V3"]
