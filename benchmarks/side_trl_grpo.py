"""TRL's side of GRPO: GRPOTrainer on the same random Llama, as shipped except what a CPU lacks."""

import argparse

import datasets
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo import distinct_words, llama
from benchmarks.grpo_task import EOS, LEARNING_RATE, SETTINGS, questions, without_contrast
from benchmarks.harness import serve, warm_memory
from benchmarks.trl_common import on_cpu, random_llama
from benchmarks.words import words, words_tokenizer

parser = argparse.ArgumentParser()
parser.add_argument("--warm", action="store_true", help="give torch jaxft's malloc settings too")
parser.add_argument("--setting", choices=list(SETTINGS), default="short")


def main(args):
    """Builds the trainer and serves its steps."""
    if args.warm:
        warm_memory()
    setting = SETTINGS[args.setting]
    prompts = [words(row) for row in questions(setting)]
    sizes, flat = llama(setting.model), without_contrast(setting).tolist()
    settings = GRPOConfig(
        **on_cpu(),
        per_device_train_batch_size=setting.prompts * setting.group,
        num_generations=setting.group,
        max_completion_length=setting.new,
        max_steps=setting.steps,
        learning_rate=LEARNING_RATE,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
    )
    trainer = GRPOTrainer(
        model=random_llama(sizes, EOS),
        reward_funcs=lambda completions, flat, **_: distinct_words(
            completions, [{"flat": x} for x in flat]
        ),
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts, "flat": flat}),
        processing_class=words_tokenizer(sizes["vocab_size"]),
    )
    serve(trainer.train, steps=setting.steps, completions=setting.prompts * setting.group)


if __name__ == "__main__":
    main(parser.parse_args())
