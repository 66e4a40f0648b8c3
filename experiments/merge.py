"""Merges an adapter into its base model and writes a Hugging Face directory, read again and compared.

$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/qlora/adapter --quantise nf4 --output-dir merged

experiments/as_lora.py writes an adapter that servers can load beside the base instead.
"""

from __future__ import annotations

import dataclasses
import pathlib

import tyro

from experiments.cli import cards, flags
from experiments.cli.models import load_adapted
from jaxft import checkpoints as files
from jaxft import train
from jaxft.adapters import Difference


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, and where to."""

    adapter: str  # directory in PEFT's format, or jaxft's own
    output_dir: str
    base: flags.Adapted = flags.Adapted()
    hub: flags.Hub = flags.Hub()
    debug: bool = False  # full tracebacks


def main(config: Config) -> Difference:
    """Prints and returns how far the files' logits are from the adapter's."""
    cards.check(config)
    train.writable_directory(config.output_dir)
    model, _, params = load_adapted(config.adapter, config.base)
    source = config.base.model
    difference = files.save_merged(config.output_dir, model, params, tokenizer_from=source)
    print(f"merged model saved to {config.output_dir}; read again: {difference}")
    cards.publish(config, {}, pathlib.Path(config.output_dir))
    return difference


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
