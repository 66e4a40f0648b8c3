"""Which tensor of an encoder's file holds which leaf of a params tree."""

from __future__ import annotations

from jaxft.models.encoder import EncoderConfig
from jaxft.models.hf_names import Entry, layer_norm

HEADS = ("cls.", "lm_head.", "classifier.", "qa_outputs.")  # of tasks, which an encoder has not
BUFFERS = ("position_ids", "token_type_ids")


def encoder_entries(config: EncoderConfig) -> list[Entry]:
    """The tensors of a BertModel, RobertaModel or ViTModel."""
    vit = config.family == "vit"
    entries = _vit_embeddings(config) if vit else _token_embeddings(config)
    for i in range(config.num_layers):
        theirs, ours = f"encoder.layer.{i}.", f"layers/{i}/"
        own = "attention.attention" if vit else "attention.self"
        linear = {
            **{f"{own}.{name}": f"attention/{name}" for name in ("query", "key", "value")},
            "attention.output.dense": "attention/out",
            "intermediate.dense": "mlp/up",
            "output.dense": "mlp/down",
        }
        for name, path in linear.items():
            entries.append(Entry(f"{theirs}{name}.weight", (f"{ours}{path}/kernel",), True))
            if config.attention_bias or not name.startswith(own):
                entries.append(Entry(f"{theirs}{name}.bias", (f"{ours}{path}/bias",)))
        first = "layernorm_before" if vit else "attention.output.LayerNorm"
        second = "layernorm_after" if vit else "output.LayerNorm"
        entries += layer_norm(f"{theirs}{first}", f"{ours}attention_norm")
        entries += layer_norm(f"{theirs}{second}", f"{ours}mlp_norm")
    if config.pre_norm:
        entries += layer_norm("layernorm", "final_norm")
    if config.pooler:
        entries.append(Entry("pooler.dense.weight", ("pooler/kernel",), True))
        entries.append(Entry("pooler.dense.bias", ("pooler/bias",)))
    return entries


def _token_embeddings(config: EncoderConfig) -> list[Entry]:
    tables = {"word": "embed", "position": "positions"}
    if config.token_types:
        tables["token_type"] = "token_types"
    entries = [
        Entry(f"embeddings.{theirs}_embeddings.weight", (f"{ours}/embedding",))
        for theirs, ours in tables.items()
    ]
    return entries + layer_norm("embeddings.LayerNorm", "embed_norm")


def _vit_embeddings(config: EncoderConfig) -> list[Entry]:
    width, size = config.hidden_size, config.patch_size
    projection = "embeddings.patch_embeddings.projection"
    return [
        Entry("embeddings.cls_token", ("patches/cls",), file_shape=(1, 1, width)),
        Entry(
            "embeddings.position_embeddings",
            ("patches/positions",),
            file_shape=(1, config.num_positions, width),
        ),
        # torch convolves [out, channel, row, column]; our patches are (row, column, channel).
        Entry(
            f"{projection}.weight",
            ("patches/projection/kernel",),
            file_shape=(width, config.channels, size, size),
            axes=(2, 3, 1, 0),
        ),
        Entry(f"{projection}.bias", ("patches/projection/bias",)),
    ]
