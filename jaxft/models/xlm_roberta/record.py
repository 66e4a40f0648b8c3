"""The record of XLM-RoBERTa."""

from jaxft.models.roberta.record import roberta_family

XLM_ROBERTA = roberta_family("xlm-roberta", "XLMRobertaModel", 30522)
