"""TRL's side of GRPO: GRPOTrainer on the same random Llama, as shipped except what a CPU lacks."""

import argparse

import datasets
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo import (
    EOS,
    GROUP,
    LEARNING_RATE,
    MODEL,
    NEW,
    PROMPTS,
    STEPS,
    distinct_words,
    questions,
)
from benchmarks.harness import serve, warm_memory
from benchmarks.trl_common import on_cpu, random_llama
from benchmarks.words import words, words_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")


def main(args):
    """Builds the trainer and serves its steps."""
    if args.warm:
        warm_memory()
    prompts = [words(row) for row in questions()]
    settings = GRPOConfig(
        **on_cpu(),
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
    )
    trainer = GRPOTrainer(
        model=random_llama(MODEL, EOS),
        reward_funcs=lambda completions, **_: distinct_words(completions, None),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=words_tokenizer(MODEL["vocab_size"]),
    )
    serve(trainer.train, steps=STEPS, completions=PROMPTS * GROUP)


if __name__ == "__main__":
    main(parser.parse_args())
