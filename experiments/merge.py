"""Merges an adapter into its base model and writes a Hugging Face directory, read again and compared.

$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/qlora/adapter --quantise nf4 --output-dir merged
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses

import jax
import tyro

from jaxft import checkpoints as files
from jaxft import train
from jaxft.adapters import Difference, Quantisation, adapt, load_adapter, quantised, rounding_loss
from jaxft.models import family_of


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, and where to."""

    adapter: str  # directory in PEFT's format, or jaxft's own
    output_dir: str  # directory for the merged model, in Hugging Face's format
    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    quantise: Quantisation | None = None  # merge into the rounded kernels that it was trained over
    target: str = "all-linear"  # or a pattern of the paths of kernels to quantise
    debug: bool = False  # full tracebacks


def main(config: Config) -> Difference:
    """Prints and returns how far the files' logits are from the adapter's."""
    if config.target != Config.target and config.quantise is None:
        raise ValueError(f"--target {config.target} has no effect without --quantise.")
    train.keep_memory_warm()
    train.writable_directory(config.output_dir)
    model, base = files.load_model(config.model)
    params, family = base, family_of(model.config)
    if config.quantise is not None:
        rules = {family.targets.pattern(config.target): quantised(config.quantise)}
        params = adapt(jax.random.key(0), params, rules, stacked=family.stacked_axes)
    params = load_adapter(config.adapter, model.config, params)
    if (lost := rounding_loss(params, base, family.layers)) is not None:
        print(f"{config.quantise} took up to {lost:.1%} of a kernel")
    difference = files.save_merged(config.output_dir, model, params, tokenizer_from=config.model)
    print(f"merged model saved to {config.output_dir}; read again: {difference}")
    return difference


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
