"""TRL's side of DPO: DPOTrainer on the same random Llama, as shipped except what a CPU lacks."""

import argparse

import datasets
from trl import DPOConfig, DPOTrainer

from benchmarks.dpo import BETA, EOS, LEARNING_RATE, MODEL, PAIRS, PROMPT, STEPS, pairs
from benchmarks.harness import serve, warm_memory
from benchmarks.trl_common import on_cpu, random_llama
from benchmarks.words import words, words_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")


def main(args):
    """Builds the trainer and serves its steps."""
    if args.warm:
        warm_memory()
    rows = [
        {"prompt": words(a[:PROMPT]), "chosen": words(a[PROMPT:]), "rejected": words(b[PROMPT:])}
        for a, b in pairs()
    ]
    settings = DPOConfig(
        **on_cpu(),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        beta=BETA,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(
        model=random_llama(MODEL, EOS),
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words_tokenizer(MODEL["vocab_size"]),
    )
    serve(trainer.train, steps=STEPS)


if __name__ == "__main__":
    main(parser.parse_args())
