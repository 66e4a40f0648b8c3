"""Answers prompts, or chats, with a model and an adapter.

$ python experiments/generate.py --prompt "What is the capital of France?"
$ python experiments/generate.py --adapter runs/sft/adapter          an interactive chat
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import tyro

from experiments.cli.models import load_trained
from jaxft import checkpoints as files
from jaxft import data, train
from jaxft.generation import SamplingConfig, generate
from jaxft.keys import stream


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, and how to sample."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    adapter: str | None = None  # directory of a PEFT adapter
    prompt: tuple[str, ...] = ()  # none: chat on the terminal
    system: str | None = None
    template: str | None = None  # chat template that replaces the model's
    max_new_tokens: int = 200
    temperature: float = 0.0  # 0 is greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0
    debug: bool = False  # full tracebacks


def main(config: Config) -> list[str]:
    """Prints the answers; returns them."""
    train.keep_memory_warm()
    tokenizer = files.load_tokenizer(config.model)
    renderer = data.Renderer(tokenizer, template=config.template)
    model, params = load_trained(config)
    sampling = SamplingConfig(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        stop_ids=(tokenizer.eos_token_id,),
    )
    start = [{"role": "system", "content": config.system}] if config.system else []

    def answer(messages, number):
        prompt = renderer.prompt({"messages": messages})
        key = stream(jax.random.key(config.seed), "sample", number)
        out = generate(model, params, [prompt], key, sampling)
        return tokenizer.decode(out.completions[0], skip_special_tokens=True).strip()

    if not config.prompt:
        return _chat(answer, start)
    answers = []
    for number, prompt in enumerate(config.prompt):
        answers.append(answer([*start, {"role": "user", "content": prompt}], number))
        print(answers[-1], flush=True)
    return answers


def _chat(answer, start):
    messages, answers = list(start), []
    print("An empty line or Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
        if not line:
            return answers
        messages.append({"role": "user", "content": line})
        answers.append(answer(messages, len(answers)))
        messages.append({"role": "assistant", "content": answers[-1]})
        print(answers[-1], flush=True)


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
