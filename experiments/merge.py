"""Merges an adapter into its base model; writes a Hugging Face directory or GGUF file and compares it.

$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/qlora/adapter --quantise nf4 --output-dir merged
$ python experiments/merge.py --model smollm2 --adapter runs/sft/adapter --gguf q8_0 --output-dir merged
$ python experiments/merge.py --adapter runs/qdora/adapter --quantise nf4 --as-lora 64 --output-dir lora

--as-lora writes an adapter in PEFT's format, which peft, vLLM and SGLang load with the base: PaCA, VeRA and
LoRA convert exactly; others become the nearest LoRA of that rank, and the approximation error is printed.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import pathlib
from typing import Any, Literal

import tyro

from experiments.cli import cards, flags
from experiments.cli.models import keep_inputs, load_adapted
from jaxft import adapters, train
from jaxft import checkpoints as files


@dataclasses.dataclass(frozen=True)
class Config:
    """Adapter to merge, and output."""

    adapter: str  # directory in PEFT's format or jaxft's own, or a LoRA as a .gguf file
    output_dir: str  # directory for the output
    # write model.gguf, for llama.cpp, with matrices of this type; or adapter.gguf: only the LoRA, not merged
    gguf: Literal["f32", "f16", "bf16", "q8_0", "lora"] | None = None
    as_lora: int | None = None  # write a LoRA of at most this rank instead; 0: only if exact
    base: flags.Adapted = flags.Adapted()
    hub: flags.Hub = flags.Hub()
    debug: bool = False  # full tracebacks


def main(config: Config) -> adapters.Difference:
    """Merges; prints and returns the difference of the files' logits from the adapter's or its LoRA's."""
    cards.check(config)
    if config.base.target != flags.Adapted.target and config.base.quantise is None:
        raise ValueError(f"--target {config.base.target} has no effect without --quantise.")
    if config.as_lora is not None and config.gguf not in (None, "lora"):
        raise ValueError(
            f"--as-lora writes an adapter, --gguf {config.gguf} a whole model; give one."
        )
    train.keep_memory_warm()
    source, output = config.base.model, pathlib.Path(config.output_dir)
    written = {None: "", "lora": "adapter.gguf"}.get(config.gguf, "model.gguf")
    keep_inputs(output, written, source, config.adapter)
    train.writable_directory(output)
    tokenizer = None if config.gguf in (None, "lora") else _sayable_tokenizer(source)
    model, base, params = load_adapted(config.adapter, config.base)
    what, name = "merged model", pathlib.Path(source).stem
    if config.as_lora is not None:
        what, params = "adapter", _lora(config.as_lora, model, base, params)
    if config.gguf == "lora":
        what, file = "adapter", output / "adapter.gguf"
        difference = files.save_checked_gguf_adapter(file, model, params, name=name)
    elif config.gguf is not None:
        file, options = output / "model.gguf", {"kind": config.gguf, "tokenizer": tokenizer}
        difference = files.save_merged_gguf(file, model, params, name=name, **options)
    elif config.as_lora is not None:
        file = output
        difference = adapters.save_checked(output, model, params, base, base_model=source)
    else:
        file = output
        difference = files.save_merged(output, model, params, tokenizer_from=source)
    print(f"{what} saved to {file}; read again: {difference}")
    cards.publish(config, {}, output)
    return difference


def _lora(rank: int, model: Any, base: Any, params: Any) -> Any:
    """Converts the adapter to LoRA, and prints the fraction of its update that is lost."""
    lora, lost = adapters.as_lora(params, rank or None, base=base)
    print("\n".join(f"{name:56} lacks {share:.2%}" for name, share in lost.by_path.items()))
    print(f"{lost}; against the adapter: {adapters.logit_difference(model, params, lora)}")
    return lora


def _sayable_tokenizer(source: str) -> Any:
    """Returns the base's tokenizer, after checks that GGUF can represent it and the model."""
    opened, tokenizer = files.open_model(source), files.load_tokenizer(source)
    model = files.load_model("tiny")[0] if opened == "tiny" else opened.model
    files.check_gguf(model, tokenizer)
    return tokenizer


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
