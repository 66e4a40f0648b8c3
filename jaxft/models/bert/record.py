"""The record of BERT."""

from __future__ import annotations

from jaxft.models.bert import config, names
from jaxft.models.encoder import Encoder
from jaxft.models.family import Family, Score
from jaxft.models.hf_encoders import encoder_codec

BERT = Family(
    name="bert",
    module=Encoder,
    huggingface=encoder_codec(
        architecture="BertModel",
        read=config.read,
        write=config.write,
        reads=config.READS,
        keys=config.keys(),
        entries=names.entries,
        rename=lambda name: name.removeprefix("bert."),
        score=Score("classifier.weight", "classifier.bias", prefix="bert."),
    ),
)
