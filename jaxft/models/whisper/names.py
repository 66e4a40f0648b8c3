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
            found += stem_entries(theirs, "stem/", config.hidden_size, config.mel)
        else:
            found.append(Entry(f"{theirs}embed_tokens.weight", ("embed/embedding",)))
        found.append(Entry(f"{theirs}embed_positions.weight", (f"{side}/positions/embedding",)))
        for i in range(getattr(config, side).num_layers):
            found += layer_entries(
                f"{theirs}layers.{i}.", f"{side}/layers/{i}/", side == "decoder", key_bias=False
            )
        found += layer_norm(f"{theirs}layer_norm", f"{side}/final_norm")
    return found


def stem_entries(theirs: str, ours: str, width: int, mel: int) -> list[Entry]:
    """The tensors of the two convolutions, given both prefixes."""
    found = []
    for name, inputs in (("conv1", mel), ("conv2", width)):
        # torch convolves [out, in, frame].
        shape, kernel = (width, inputs, _WIDTH), (f"{ours}{name}/kernel",)
        found.append(Entry(f"{theirs}{name}.weight", kernel, file_shape=shape, axes=(2, 1, 0)))
        found.append(Entry(f"{theirs}{name}.bias", (f"{ours}{name}/bias",)))
    return found


def rename(name: str) -> str:
    """The name of a tensor in files of the whole model, for one in files of the bare base model."""
    return name if name.startswith(("model.", "proj_out.")) else f"model.{name}"


def ignores(name: str, config: EncoderDecoderConfig) -> bool:
    """Returns whether the tensor is a copy of the embeddings."""
    del config
    return name == "proj_out.weight"
