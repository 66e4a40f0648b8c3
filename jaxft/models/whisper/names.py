"""The tensors of Whisper."""

from __future__ import annotations

from jaxft.models.encoder_decoder_config import EncoderDecoderConfig
from jaxft.models.hf_encoder_decoders import SIDES, layer_entries
from jaxft.models.names import Entry, layer_norm

_WIDTH = 3  # frames that each convolution reads


def entries(config: EncoderDecoderConfig) -> list[Entry]:
    """The tensors in the order of transformers' files."""
    found = []
    for side in SIDES:
        theirs = f"model.{side}."
        if side == "encoder":
            found += _stem(theirs, config)
        else:
            found.append(Entry(f"{theirs}embed_tokens.weight", ("embed/embedding",)))
        found.append(Entry(f"{theirs}embed_positions.weight", (f"{side}/positions/embedding",)))
        for i in range(getattr(config, side).num_layers):
            found += layer_entries(
                f"{theirs}layers.{i}.", f"{side}/layers/{i}/", side == "decoder", key_bias=False
            )
        found += layer_norm(f"{theirs}layer_norm", f"{side}/final_norm")
    return found


def _stem(theirs, config):
    found = []
    for name, inputs in (("conv1", config.mel), ("conv2", config.hidden_size)):
        # torch convolves [out, in, frame].
        shape = (config.hidden_size, inputs, _WIDTH)
        kernel = (f"stem/{name}/kernel",)
        found.append(Entry(f"{theirs}{name}.weight", kernel, file_shape=shape, axes=(2, 1, 0)))
        found.append(Entry(f"{theirs}{name}.bias", (f"stem/{name}/bias",)))
    return found


def rename(name: str) -> str:
    """The name of a tensor in files of the whole model, for one in files of the bare base model."""
    return name if name.startswith(("model.", "proj_out.")) else f"model.{name}"


def ignores(name: str, config: EncoderDecoderConfig) -> bool:
    """Returns whether the tensor is a copy of the embeddings."""
    del config
    return name == "proj_out.weight"
