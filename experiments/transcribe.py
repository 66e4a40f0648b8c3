"""Writes the texts of clips of speech, with a model such as Whisper and an adapter.

$ python experiments/transcribe.py --audio clip.wav other.flac
$ python experiments/transcribe.py --model openai/whisper-small --audio talk.wav --language de
$ python experiments/transcribe.py --adapter runs/sft/adapter --audio *.wav --output texts.jsonl

A clip is at most as long as the model's window, 30 seconds for Whisper.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import json

import jax
import numpy as np
import tyro

from experiments.cli import beams, flags, limits, own_settings
from experiments.cli.models import load_trained, renderer_of, stop_ids, writable_file
from jaxft import data, train
from jaxft.generation import transcribe
from jaxft.keys import stream
from jaxft.output import writing


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, clips and sampling."""

    trained: flags.Trained = flags.Trained(model="whisper-tiny-en")
    # files to transcribe: WAV, or FLAC and others with the package soundfile
    audio: tuple[str, ...] = ()
    sound: flags.Sound = flags.Sound()
    sampling: flags.Sampling = flags.Sampling(max_new_tokens=224, temperature=0.0)
    beams: beams.BeamSearch = beams.BeamSearch()
    batch_size: int = 8  # clips that are transcribed at once
    output: str | None = None  # JSON lines of {"audio", "text"}; None: only printed
    seed: int = 0  # of the draws, which a --temperature above 0 has
    debug: bool = False  # full tracebacks


def main(config: Config) -> list[str]:
    """Prints and returns the texts."""
    beams.check(limits.check(config))
    if not config.audio:
        raise ValueError("--audio names no clip; give one or several files.")
    renderer = renderer_of(config.trained, config.sound)
    if not isinstance(renderer, data.SpeechRenderer):
        raise ValueError(
            f"--model {config.trained.model} does not transcribe; choose one that does, such as "
            "whisper-tiny-en or openai/whisper-small."
        )
    output = writable_file(config.output) if config.output else None
    reader, tokenizer = renderer.reader, renderer.tokenizer
    config.sampling.rules(tokenizer)  # errors before the model is loaded
    clips = [data.Media("audio", path) for path in config.audio]
    for clip in clips:
        reader.text(clip)
    (model, params), texts = load_trained(config.trained), []
    own_settings.tell(model, config)
    rules = config.sampling.rules(tokenizer, stop_ids(renderer, model))
    for start in range(0, len(clips), config.batch_size):
        part = clips[start : start + config.batch_size]
        features = np.concatenate([reader.arrays(clip)[reader.column] for clip in part])
        how = dict(
            language=config.sound.language, task=config.sound.task, beams=config.beams.settings
        )
        if how["beams"] is None:
            how["tokenizer"] = tokenizer
        key = stream(jax.random.key(config.seed), "sample", start)
        out = transcribe(model, params, features, key, rules, **how)
        texts += [
            tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in out.completions
        ]
        for path, text in zip(config.audio[start:], texts[start:], strict=False):
            print(f"{path}: {text}" if len(clips) > 1 else text, flush=True)
    if output is not None:
        pairs = zip(config.audio, texts, strict=True)
        lines = [json.dumps({"audio": path, "text": text}) + "\n" for path, text in pairs]
        with writing(output):
            output.write_text("".join(lines))
    return texts


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
