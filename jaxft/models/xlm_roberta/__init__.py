"""XLM-RoBERTa: RoBERTa over many languages; multilingual E5 and BGE-M3."""

from jaxft.models.xlm_roberta.record import XLM_ROBERTA

__all__ = ["XLM_ROBERTA"]
