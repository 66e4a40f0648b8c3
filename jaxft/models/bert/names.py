"""The tensors of BERT and RoBERTa."""

from __future__ import annotations

from jaxft.models.encoder import EncoderConfig
from jaxft.models.hf_encoders import layer_entries, pooler_entries
from jaxft.models.names import Entry, layer_norm

NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


def entries(config: EncoderConfig) -> list[Entry]:
    """The tensors of a BertModel or RobertaModel."""
    layers = layer_entries(config, "attention.self", NORMS)
    return _embeddings(config) + layers + pooler_entries(config)


def _embeddings(config):
    tables = {"word": "embed", "position": "positions"}
    if config.token_types:
        tables["token_type"] = "token_types"
    result = [
        Entry(f"embeddings.{theirs}_embeddings.weight", (f"{ours}/embedding",))
        for theirs, ours in tables.items()
    ]
    return result + layer_norm("embeddings.LayerNorm", "embed_norm")
