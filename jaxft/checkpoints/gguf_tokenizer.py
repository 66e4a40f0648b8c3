"""Converts the tokenizer of a GGUF file to Hugging Face files, without torch.

Run: python -m jaxft.checkpoints.gguf_tokenizer FILE DIRECTORY

transformers' GGUF reader imports torch for the types of tensors, of which a tokenizer has none. A module
that is empty stands under its name here, in a process of its own, where nothing else can meet it.
"""

from __future__ import annotations

import pathlib
import sys
import types


def main(file: str, directory: str) -> None:
    """Writes the tokenizer's files to the directory."""
    stand_in = types.ModuleType("torch")
    stand_in.__getattr__ = lambda name: type(name, (), {})
    # AutoTokenizer would read the model's configuration too, for which it wants torch.
    from transformers import PreTrainedTokenizerFast

    sys.modules["torch"] = stand_in
    path = pathlib.Path(file)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(*sys.argv[1:])
