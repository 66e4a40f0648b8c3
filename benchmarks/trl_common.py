"""Code that TRL's sides of the benchmarks share."""

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(sizes: dict[str, Any], eos: int) -> LlamaForCausalLM:
    """transformers' model of jaxft's config, of random weights."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    sizes = {k: v for k, v in sizes.items() if k not in ("model_type", "rope_theta")}
    special = dict(bos_token_id=1, eos_token_id=eos, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, **special))


def on_cpu() -> dict[str, Any]:
    """Arguments of a trainer's config: what a CPU lacks, no files, no logs; the rest is as shipped."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        lr_scheduler_type="constant",
        # Recomputation, TRL's default, would only slow it down here.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
