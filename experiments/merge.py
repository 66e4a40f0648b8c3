"""Merges an adapter into its base model; a Hugging Face directory or a GGUF file is written and compared.

$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/qlora/adapter --quantise nf4 --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --gguf q8_0 --output-dir merged

experiments/as_lora.py writes an adapter that servers can load beside the base instead.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import tyro

from experiments.cli import cards, flags
from experiments.cli.models import load_adapted
from jaxft import checkpoints as files
from jaxft import train
from jaxft.adapters import Difference


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, and where to."""

    adapter: str  # directory in PEFT's format or jaxft's own, or a LoRA as a .gguf file
    output_dir: str
    base: flags.Adapted = flags.Adapted()
    hub: flags.Hub = flags.Hub()
    # write model.gguf, for llama.cpp, with matrices of this type; or adapter.gguf: the LoRA alone, not merged
    gguf: Literal["f32", "f16", "bf16", "q8_0", "lora"] | None = None
    debug: bool = False  # full tracebacks


def main(config: Config) -> Difference:
    """Prints and returns how far the files' logits are from the adapter's."""
    cards.check(config)
    train.writable_directory(config.output_dir)
    source, output = config.base.model, pathlib.Path(config.output_dir)
    tokenizer = None if config.gguf in (None, "lora") else _sayable_tokenizer(source)
    model, _, params = load_adapted(config.adapter, config.base)
    what, name = "merged model", pathlib.Path(source).stem
    if config.gguf is None:
        file = output
        difference = files.save_merged(output, model, params, tokenizer_from=source)
    elif config.gguf == "lora":
        what, file = "adapter", output / "adapter.gguf"
        difference = files.save_checked_gguf_adapter(file, model, params, name=name)
    else:
        file, options = output / "model.gguf", {"kind": config.gguf, "tokenizer": tokenizer}
        difference = files.save_merged_gguf(file, model, params, name=name, **options)
    print(f"{what} saved to {file}; read again: {difference}")
    cards.publish(config, {}, output)
    return difference


def _sayable_tokenizer(source: str) -> Any:
    """The tokenizer of the base, after the checks that a GGUF file can say it and the model."""
    opened, tokenizer = files.open_model(source), files.load_tokenizer(source)
    model = files.load_model("tiny")[0] if opened == "tiny" else opened.model
    files.check_gguf(model, tokenizer)
    return tokenizer


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
