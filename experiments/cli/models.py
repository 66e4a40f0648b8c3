"""Loading of the model that a script generates answers with."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import jax

from experiments.cli import choices, flags
from jaxft import checkpoints as files
from jaxft import data, train
from jaxft.adapters import adapt, load_adapter, merge, mergeable, quantised, rounding_loss
from jaxft.models import family_of


def renderer_of(
    settings: flags.Trained | flags.Model, sound: flags.Sound | None = None, **options: Any
) -> data.Renderer | data.SourceRenderer | data.SpeechRenderer:
    """Returns the renderer of the model's tokenizer and chat template; `options`: of `data.Renderer`."""
    tokenizer, config = files.load_tokenizer(settings.model), files.source_config(settings.model)
    if config is not None and config.mel:
        return _speech_renderer(settings, tokenizer, config, sound, options)
    if config is None:
        media = _readers(settings.model, data.media_readers(settings.model, tokenizer), sound)
        return data.Renderer(tokenizer, template=settings.template, media=media, **options)
    check_unheard(settings.model, sound)
    return data.SourceRenderer(tokenizer, config, template=settings.template, **options)


def _readers(model, media, sound):
    """The processors of images and clips, with the flags of clips."""
    sound = sound or flags.Sound()
    clips = lambda reader: isinstance(reader, data.ClipReader)
    if not any(map(clips, media)) or sound.language or sound.task:
        check_unheard(model, sound)
    how = {"resample": sound.resample, "mix": sound.mix}
    return tuple(dataclasses.replace(r, **how) if clips(r) else r for r in media)


def _speech_renderer(settings, tokenizer, config, sound, options):
    if sound is None:
        raise ValueError(
            f"--model {settings.model} writes the texts of clips, which this script does not take; sft.py, "
            "evaluate.py and transcribe.py do."
        )
    options = {"template": settings.template, **dataclasses.asdict(sound), **options}
    return data.speech_renderer(settings.model, tokenizer, config, **options)


def check_unheard(model: str, sound: flags.Sound | None) -> None:
    """Raises ValueError if flags of clips are given for a model that has no use for them."""
    if sound not in (None, flags.Sound()):
        raise ValueError(
            f"--resample and --mix have no effect with {model} unless it reads clips, and --language and "
            "--task unless it transcribes, as whisper-tiny-en does; leave them out, or choose another model."
        )


def supervised_renderer(config: Any) -> Any:
    """Returns the renderer of sft.py: of plain texts with --denoise ("span" as T5, "infill" as BART).

    Raises:
        DataError: for --denoise with a decoder, or a tokenizer without the tokens of this noise.
        ValueError: for flags without effect.
    """
    settings, kind = config.base, config.denoise
    if kind is None:
        return renderer_of(settings, config.sound, mask=config.mask, train_on=config.train_on)
    choices.check_excluded(config, ["mask", "train_on", "template"], f"--denoise {kind}")
    tokenizer, model = files.load_tokenizer(settings.model), files.source_config(settings.model)
    check_unheard(settings.model, config.sound)
    if model is not None and model.mel:
        raise data.DataError(
            f"--denoise {kind}: {settings.model} reads sound, not texts to restore."
        )
    if model is None:
        raise data.DataError(
            f"--denoise {kind} pretrains encoder-decoders, whose encoder reads the corrupted text; "
            f"{settings.model} has none. Train a decoder on the texts without --denoise."
        )
    room = config.rows.max_length - tokenizer.num_special_tokens_to_add()
    if kind == "span":
        noise, most = data.span_corruption(data.sentinel_ids(tokenizer)), data.longest_text(room)
    elif tokenizer.mask_token_id is None:
        raise data.DataError(
            "--denoise infill puts a mask token for each span, which this tokenizer lacks; use span."
        )
    else:
        # The target is the whole text, after the id with which the decoder begins.
        noise, most = data.text_infilling(tokenizer.mask_token_id), room - 1
    return data.DenoisingRenderer(tokenizer, model, noise, length=most, seed=config.seed)


def writable_file(place: str) -> pathlib.Path:
    """Returns the path of --output; OutputError if it is a directory, or its directory is not writable."""
    path = pathlib.Path(place)
    if path.is_dir():
        raise train.OutputError(f"--output {place} is a directory; name a file in it.")
    train.writable_directory(path.parent)
    return path


def keep_inputs(output: pathlib.Path, written: str, *inputs: str) -> None:
    """Raises ValueError if a run that writes into `output` would overwrite one of its inputs.

    Args:
        output: the directory.
        written: the only file that is written there; "": a model's or an adapter's files.
        inputs: directories, files or names.
    """
    for source in filter(os.path.exists, inputs):
        place = pathlib.Path(source).resolve()
        same = place == output.resolve() / written if written else place == output.resolve()
        if same:
            raise ValueError(
                f"--output-dir {output} holds {source}, which this run reads; choose another directory."
            )


def stop_ids(renderer: data.Renderer, model: Any) -> tuple[int, ...]:
    """Returns the ids that end the model's answers, for the tokenizer and chat template."""
    return files.end_tokens(renderer.tokenizer, model.config, renderer.template)


def check_positions(model: Any, name: str, length: int) -> None:
    """Raises ValueError if the model `name` has fewer positions than --max-length."""
    if length > model.config.max_length:
        raise ValueError(
            f"--max-length {length} is more than the {model.config.max_length} positions of {name}."
        )


def load_trained(trained: flags.Trained) -> tuple[Any, Any]:
    """Loads (model, params), with the adapter if one is given."""
    train.keep_memory_warm()
    if trained.adapter:
        tell_base(trained.adapter, trained.model)
    model, params = files.load_model(trained.model)
    if not trained.adapter:
        return model, params
    params = load_adapter(trained.adapter, model.config, params)
    # Merged once: sampling then costs as much as with the base model.
    return model, merge(params) if mergeable(params) else params


def tell_base(adapter: str, model: str) -> None:
    """Prints to standard error which base model the adapter's file names, if it is not `model`."""
    try:
        base = json.loads((pathlib.Path(adapter) / "adapter_config.json").read_text())
        base = base["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # jaxft's own format and GGUF files name none; load_adapter has errors for the others
    named = isinstance(base, str) and base
    if named and os.path.realpath(base) != os.path.realpath(model):
        print(
            f"note: {adapter} names {base!r} as its base model, and --model is {model!r}; "
            f"if this is another model, give --model {base}",
            file=sys.stderr,
        )


def load_adapted(adapter: str, settings: flags.Adapted) -> tuple[Any, Any, Any]:
    """Loads (model, base params, params with the adapter), quantised as during its training."""
    train.keep_memory_warm()
    tell_base(adapter, settings.model)
    model, base = files.load_model(settings.model)
    params, family = base, family_of(model.config)
    if settings.quantise is not None:
        rules = {family.targets.pattern(settings.target): quantised(settings.quantise)}
        params = adapt(jax.random.key(0), params, rules, stacked=family.stacked_axes)
    load = files.load_gguf_adapter if adapter.endswith(".gguf") else load_adapter
    params = load(adapter, model.config, params)
    if (lost := rounding_loss(params, base, family.layers)) is not None:
        print(f"{settings.quantise} lost up to {lost:.1%} of a kernel")
    return model, base, params
