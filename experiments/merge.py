"""Merges an adapter into its base model and writes a Hugging Face directory, read again and compared.

$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --output-dir merged
$ python experiments/merge.py --adapter runs/qdora/adapter --quantise nf4 --as-lora 64 --output-dir lora
"""

from __future__ import annotations

import dataclasses
import pathlib

import tyro

from experiments.cli import cards, flags
from experiments.cli.models import load_adapted
from jaxft import adapters, train
from jaxft import checkpoints as files


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, and where to."""

    adapter: str  # directory in PEFT's format, or jaxft's own
    output_dir: str
    as_lora: int | None = None  # an adapter instead: LoRA of at most this rank; 0: if exact
    base: flags.Adapted = flags.Adapted()
    hub: flags.Hub = flags.Hub()
    debug: bool = False  # full tracebacks


def main(config: Config) -> adapters.Difference:
    """Prints and returns how far the files' logits are from the adapter's, or its LoRA's."""
    cards.check(config)
    train.writable_directory(config.output_dir)
    model, base, params = load_adapted(config.adapter, config.base)
    if config.as_lora is None:
        source = config.base.model
        said = files.save_merged(config.output_dir, model, params, tokenizer_from=source)
    else:
        said = save_lora(config, model, base, params)
    print(f"saved to {config.output_dir}; read again: {said}")
    cards.publish(config, {}, pathlib.Path(config.output_dir))
    return said


def save_lora(config: Config, model, base, params) -> adapters.Difference:
    """Writes the adapter as LoRA, and prints the share of its update that this loses."""
    lora, lost = adapters.as_lora(params, config.as_lora or None, base=base)
    print("\n".join(f"{name:56} lacks {share:.2%}" for name, share in lost.by_path.items()))
    print(f"{lost}; against the adapter: {adapters.logit_difference(model, params, lora)}")
    return adapters.save_checked(config.output_dir, model, lora, base, base_model=config.base.model)


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
