"""Answers prompts, or chats, with a model and an adapter.

$ python experiments/generate.py --prompt "What is the capital of France?"
$ python experiments/generate.py --adapter runs/sft/adapter          an interactive chat
$ python experiments/generate.py --prompt "Summarise: ..." --num-beams 4 --no-repeat-ngram-size 3
$ python experiments/generate.py --model SMOLVLM --image cat.png --prompt "What is this?"
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import sys

import jax
import tyro

from experiments.cli import beams, flags, limits, own_settings
from experiments.cli.models import load_trained, renderer_of, stop_ids
from jaxft import data, train
from jaxft.generation import beam_search, generate
from jaxft.keys import stream


@dataclasses.dataclass(frozen=True)
class Config:
    """Model and sampling."""

    trained: flags.Trained = flags.Trained()
    prompt: tuple[str, ...] = ()  # prompts to answer; none: chat on the terminal
    image: tuple[str, ...] = ()  # images before each prompt or chat, of a model that reads images
    audio: tuple[str, ...] = ()  # clips before each prompt or chat, of a model that hears
    sound: flags.Sound = flags.Sound()
    system: str | None = None  # system message before each prompt or chat; None: none
    sampling: flags.Sampling = flags.Sampling(max_new_tokens=200, temperature=0.0)
    beams: beams.BeamSearch = beams.BeamSearch()
    seed: int = 0  # seed of the sampling
    debug: bool = False  # full tracebacks


def main(config: Config) -> list[str]:
    """Prints and returns the answers."""
    beams.check(limits.check(config))
    renderer = renderer_of(config.trained, config.sound)
    if isinstance(renderer, data.SpeechRenderer):
        raise ValueError(f"{config.trained.model} writes the texts of clips: use transcribe.py.")
    config.sampling.rules(renderer.tokenizer)  # an error before the model is loaded
    start = [{"role": "system", "content": config.system}] if config.system else []
    for prompt in config.prompt or ("?",):
        renderer.prompt(_shown(config, [*start, {"role": "user", "content": prompt}]))
    model, params = load_trained(config.trained)
    own_settings.tell(model, config)
    rules = config.sampling.rules(renderer.tokenizer, stop_ids(renderer, model))

    def answer(messages, number):
        record = _shown(config, messages)
        prompt, columns = renderer.prompt(record), data.prompt_columns(renderer, [record])
        if search := config.beams.settings:
            out = beam_search(model, params, [prompt], search, rules, columns=columns)
        else:
            key = stream(jax.random.key(config.seed), "sample", number)
            how = dict(tokenizer=renderer.tokenizer, columns=columns)
            out = generate(model, params, [prompt], key, rules, **how)
        return renderer.tokenizer.decode(out.completions[0], skip_special_tokens=True).strip()

    if not config.prompt:
        return _chat(answer, start, remembers=not isinstance(renderer, data.SourceRenderer))
    answers = []
    for number, prompt in enumerate(config.prompt):
        answers.append(answer([*start, {"role": "user", "content": prompt}], number))
        print(answers[-1], flush=True)
    return answers


def _shown(config, messages):
    """The conversation as a record, with the images and clips before its first user message."""
    media = {"images": list(config.image), "audios": list(config.audio)}
    return data.place_media({"messages": messages} | media)


def _chat(answer, start, remembers):
    """Answers lines of the terminal; an encoder-decoder reads each by itself."""
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
        answered = [*messages, {"role": "assistant", "content": answers[-1]}]
        messages = answered if remembers else list(start)
        print(answers[-1], flush=True)


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
