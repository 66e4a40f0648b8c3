"""RoBERTa: BERT whose positions begin after the padding's."""

from jaxft.models.roberta.record import ROBERTA

__all__ = ["ROBERTA"]
