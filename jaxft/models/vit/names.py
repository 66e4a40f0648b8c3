"""The tensors of ViT."""

from __future__ import annotations

from jaxft.models.encoder import EncoderConfig
from jaxft.models.hf_encoders import layer_entries, pooler_entries
from jaxft.models.names import Entry, layer_norm


def entries(config: EncoderConfig) -> list[Entry]:
    """The tensors of a ViTModel."""
    layers = layer_entries(config, "attention.attention", ("layernorm_before", "layernorm_after"))
    last = layer_norm("layernorm", "final_norm")
    return _embeddings(config) + layers + last + pooler_entries(config)


def _embeddings(config):
    width, size = config.hidden_size, config.patch_size
    projection = "embeddings.patch_embeddings.projection"
    return [
        Entry("embeddings.cls_token", ("patches/cls",), file_shape=(1, 1, width)),
        Entry(
            "embeddings.position_embeddings",
            ("patches/positions",),
            file_shape=(1, config.num_positions, width),
        ),
        # torch convolves [out, channel, row, column]; jaxft's patches are (row, column, channel).
        Entry(
            f"{projection}.weight",
            ("patches/projection/kernel",),
            file_shape=(width, config.channels, size, size),
            axes=(2, 3, 1, 0),
        ),
        Entry(f"{projection}.bias", ("patches/projection/bias",)),
    ]
