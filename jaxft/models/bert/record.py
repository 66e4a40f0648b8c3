"""The record of BERT."""

from __future__ import annotations

from jaxft.models.bert import config, names
from jaxft.models.encoder import Encoder
from jaxft.models.family import Family, HuggingFace
from jaxft.models.hf_encoders import ignores

BERT = Family(
    name="bert",
    module=Encoder,
    huggingface=HuggingFace(
        architecture="BertModel",
        read=config.read,
        write=config.write,
        reads=config.READS,
        entries=names.entries,
        rename=lambda name: name.removeprefix("bert."),
        ignores=ignores,
        task_type="FEATURE_EXTRACTION",
    ),
)
