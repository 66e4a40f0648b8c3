"""TRL's side of DPO: DPOTrainer on the same random Llama, as shipped but for what a CPU lacks."""

import argparse
import tempfile

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from benchmarks.dpo import BETA, EOS, LEARNING_RATE, MODEL, PAIRS, PROMPT, STEPS, pairs
from benchmarks.harness import serve, warm_memory
from benchmarks.words import words, words_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")


def main(args):
    """Builds the trainer and serves its steps."""
    if args.warm:
        warm_memory()
    torch.manual_seed(0)
    sizes = {k: v for k, v in MODEL.items() if k not in ("model_type", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": MODEL["rope_theta"]}
    special = dict(bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, **special))
    rows = [
        {"prompt": words(a[:PROMPT]), "chosen": words(a[PROMPT:]), "rejected": words(b[PROMPT:])}
        for a, b in pairs()
    ]
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        precompute_ref_log_probs=True,
        # Recomputation, TRL's default, would only slow it down here; the rest is as shipped.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words_tokenizer(MODEL["vocab_size"]),
    )
    serve(trainer.train, steps=STEPS)


if __name__ == "__main__":
    main(parser.parse_args())
