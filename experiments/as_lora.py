"""Writes an adapter as LoRA in PEFT's format, which peft, vLLM, SGLang and llama.cpp serve.

$ python experiments/as_lora.py --model smollm2 --adapter runs/paca/adapter --output-dir lora
$ python experiments/as_lora.py --model smollm2 --adapter runs/dora/adapter --rank 64 --output-dir lora

PaCA, VeRA and LoRA itself are LoRA exactly. DoRA, LoHa, LoKr and Monarch, and what has a rank above
--rank, become the nearest LoRA of that rank; the share of the update that this loses is printed.
"""

from __future__ import annotations

import dataclasses
import pathlib

import tyro

from experiments.cli import cards, flags
from experiments.cli.models import load_adapted
from jaxft import train
from jaxft.adapters import Lost, as_lora, logit_difference, save_checked


@dataclasses.dataclass(frozen=True)
class Config:
    """What to write as LoRA, and where to."""

    adapter: str  # directory in PEFT's format, or jaxft's own
    output_dir: str
    rank: int | None = None  # the largest that is wanted; None: only what is LoRA exactly
    base: flags.Adapted = flags.Adapted()
    hub: flags.Hub = flags.Hub()
    debug: bool = False  # full tracebacks


def main(config: Config) -> Lost:
    """Prints and returns what the LoRA lacks of the adapter's update, 0 to 1."""
    cards.check(config)
    train.writable_directory(config.output_dir)
    model, base, params = load_adapted(config.adapter, config.base)
    converted, lost = as_lora(params, config.rank, base=base)
    for name, share in sorted(lost.by_path.items()):
        print(f"{name:60} lacks {share:.2%} of its update")
    source = config.base.model
    difference = save_checked(config.output_dir, model, converted, base, base_model=source)
    print(f"{lost}; against the adapter: {logit_difference(model, params, converted)}")
    print(f"LoRA saved to {config.output_dir}; read again: {difference}")
    metrics = {"lost share of the update": lost.overall}
    cards.publish(config, metrics, pathlib.Path(config.output_dir))
    return lost


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
