"""Merges an adapter into its base model; a Hugging Face directory or a GGUF file is written and compared.

$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/qlora/adapter --quantise nf4 --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --gguf q8_0 --output-dir merged
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Literal

import jax
import tyro

from jaxft import checkpoints as files
from jaxft import train
from jaxft.adapters import Difference, Quantisation, adapt, load_adapter, quantised, rounding_loss
from jaxft.models import family_of


@dataclasses.dataclass(frozen=True)
class Config:
    """What to merge, and where to."""

    adapter: str  # directory in PEFT's format or jaxft's own, or a LoRA as a .gguf file
    output_dir: str
    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    quantise: Quantisation | None = None  # merge into the rounded kernels that it was trained over
    target: str = "all-linear"  # or a pattern of the paths of kernels to quantise
    # write model.gguf, for llama.cpp, with matrices of this type; or adapter.gguf: the LoRA alone, not merged
    gguf: Literal["f32", "f16", "bf16", "q8_0", "lora"] | None = None
    debug: bool = False  # full tracebacks


def main(config: Config) -> Difference:
    """Prints and returns how far the files' logits are from the adapter's."""
    train.keep_memory_warm()
    train.writable_directory(config.output_dir)
    model, base = files.load_model(config.model)
    params, family, tokenizer = base, family_of(model.config), None
    if config.gguf is not None:
        tokenizer = None if config.gguf == "lora" else files.load_tokenizer(config.model)
        files.check_gguf(model, tokenizer)
    if config.quantise is not None:
        rules = {family.targets.pattern(config.target): quantised(config.quantise)}
        params = adapt(jax.random.key(0), params, rules, stacked=family.stacked_axes)
    load = files.load_gguf_adapter if config.adapter.endswith(".gguf") else load_adapter
    params = load(config.adapter, model.config, params)
    if (lost := rounding_loss(params, base, family.layers)) is not None:
        print(f"{config.quantise} took up to {lost:.1%} of a kernel")
    output, name = pathlib.Path(config.output_dir), pathlib.Path(config.model).stem
    if config.gguf == "lora":
        what, output = "adapter", output / "adapter.gguf"
        difference = files.save_checked_gguf_adapter(output, model, params, name=name)
    elif config.gguf is not None:
        what, output = "merged model", output / "model.gguf"
        options = {"kind": config.gguf, "tokenizer": tokenizer, "name": name}
        difference = files.save_merged_gguf(output, model, params, **options)
    else:
        what = "merged model"
        difference = files.save_merged(output, model, params, tokenizer_from=config.model)
    print(f"{what} saved to {output}; read again: {difference}")
    return difference


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
