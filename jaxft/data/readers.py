"""The processors of a model's images, made of its files: preprocessor_config.json and config.json."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxft.checkpoints import resolve
from jaxft.data.clips import ClipReader
from jaxft.data.errors import DataError
from jaxft.data.grid_images import GridImages
from jaxft.data.images import CroppedImages, Pixels, SquareImages, TiledImages
from jaxft.data.log_mel import read_log_mel
from jaxft.data.media_rows import MediaReader
from jaxft.data.processor_files import channels, number, processor_settings, sizes
from jaxft.models import FAMILIES
from jaxft.models.json_files import read_json

_LANCZOS, _BICUBIC = 1, 3
HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# A conversation as PaliGemma's processor writes a prompt and its answer; its files have no chat template.
PALIGEMMA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != ('user', 'assistant')[loop.index0] %}"
    "{{ raise_exception('PaliGemma reads one user message and writes one answer') }}"
    "{% elif m['role'] == 'user' %}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>{% endfor %}{{ bos_token }}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{{ '\n' }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
# A conversation as LLaVA 1.5 is trained on, for files without a chat template.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# Settings whose other value has no counterpart here.
_FIXED = {"do_convert_rgb": True, "do_resize": True, "do_pad": True, "do_center_crop": False}


def media_readers(model: str | os.PathLike, tokenizer: Any) -> tuple[MediaReader, ...]:
    """The processors of the images and audio that a model reads; () for a text model.

    Args:
        model: a directory, a name or a hub id, as for `load_model`.
        tokenizer: of the model.

    Raises:
        DataError: for settings of an image processor that jaxft does not have, or a tokenizer without the
            model's token for an image.
    """
    if model == "tiny":
        return ()
    path = resolve(model)
    file = path / "config.json"
    json = read_json(file) if path.is_dir() and file.exists() else {}
    known = next((family for family in FAMILIES if family.name == json.get("model_type")), None)
    make = _READERS.get(known.name) if known else None
    if make is None:
        return ()
    (tower,) = known.huggingface.config(json).towers
    settings = {} if make is _clips else _settings(path)
    reader = make(settings, tower, path)
    if tokenizer.convert_tokens_to_ids(reader.placeholder) != tower.token:
        raise DataError(
            f"{path}: the tokenizer's id of {reader.placeholder} is "
            f"{tokenizer.convert_tokens_to_ids(reader.placeholder)}, config.json's image_token_id "
            f"{tower.token}; take the tokenizer of this model."
        )
    return (reader,)


def _settings(path: pathlib.Path) -> Mapping[str, Any]:
    """The image processor's settings."""
    file, found = processor_settings(path, "image_processor")
    if not found:
        raise DataError(
            f"{path}: no {file.name}, which says how its images are resized; copy it there."
        )
    sides = ("size", "max_image_size")
    return found | {name: sizes(file, found, name) for name in sides if name in found}


def _tiled(settings, tower, path) -> TiledImages:
    size = tower.encoder.image_size
    tile = (settings.get("max_image_size") or {}).get("longest_edge", 364)
    longest = (settings.get("size") or {}).get("longest_edge")
    if tile != size or not isinstance(longest, int) or longest < 1:
        raise DataError(
            f"{path}: preprocessor_config.json has squares of {tile} pixels (max_image_size) and the longest "
            f"side {longest!r}; expected {size}, the image_size of config.json, and a number of pixels."
        )
    pixels = _pixels(settings, path, _LANCZOS)
    split = bool(settings.get("do_image_splitting", True))
    return TiledImages(size, longest, tower.tokens, pixels, split)


def _square(settings, tower, path) -> SquareImages:
    size, given = tower.encoder.image_size, settings.get("size") or {}
    if (given.get("height"), given.get("width")) != (size, size):
        raise DataError(
            f"{path}: preprocessor_config.json has the size {given}; expected height and width {size}, the "
            "image_size of config.json."
        )
    pixels, text = _pixels(settings, path, _BICUBIC), "<image>" * tower.tokens
    return SquareImages(size, pixels, text, template=PALIGEMMA_TEMPLATE)


def _cropped(settings, tower, path) -> CroppedImages:
    size, given = tower.encoder.image_size, settings.get("crop_size") or {}
    given = given if isinstance(given, Mapping) else {"height": given, "width": given}
    shortest = settings.get("size")
    shortest = shortest.get("shortest_edge") if isinstance(shortest, Mapping) else shortest
    fits = isinstance(shortest, int) and shortest >= size
    if (given.get("height"), given.get("width")) != (size, size) or not fits:
        raise DataError(
            f"{path}: preprocessor_config.json has the crop_size {given} and the shortest_edge {shortest!r}; "
            f"expected {size}, the image_size of config.json, and at least as many pixels."
        )
    fixed = _FIXED | {"do_center_crop": True, "do_pad": False}
    pixels = _pixels(settings, path, _BICUBIC, CLIP_MEAN, CLIP_STD, fixed)
    text = "<image>" * tower.tokens
    return CroppedImages(shortest, size, pixels, text, template=LLAVA_TEMPLATE, adds_bos=True)


def _grid(settings, tower, path) -> GridImages:
    edges, given = settings.get("size") or {}, (tower.patch_size, tower.merge, tower.frames)
    names = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    if tuple(settings.get(name, value) for name, value in names.items()) != given:
        raise DataError(
            f"{path}: preprocessor_config.json has patches of {[settings.get(name) for name in names]} "
            f"({', '.join(names)}); expected those of config.json, {list(given)}."
        )
    least = settings.get("min_pixels") or edges.get("shortest_edge") or 56 * 56
    most = settings.get("max_pixels") or edges.get("longest_edge") or 28 * 28 * 1280
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        if type(value) is not int or value < 1:
            raise DataError(f"{path}: {name} of its processor is {value!r:.60}, expected pixels.")
    window = tower.window // tower.merge // tower.patch_size
    pixels = _pixels(settings, path, _BICUBIC, CLIP_MEAN, CLIP_STD)
    return GridImages(tower.patch_size, tower.merge, window, least, most, pixels)


def _pixels(settings, path, resample, mean=HALF, std=HALF, fixed=_FIXED) -> Pixels:
    for name, value in fixed.items():
        if settings.get(name, value) not in (value, None):
            raise DataError(
                f"{path}: preprocessor_config.json has {name} = {settings[name]!r}, which jaxft lacks; "
                f"expected {value!r}."
            )
    file, normalised = path / "preprocessor_config.json", settings.get("do_normalize", True)
    of = lambda name, default: channels(file, name, settings.get(name) or default)
    factor = settings.get("rescale_factor")
    scale = number(file, "rescale_factor", 1 / 255 if factor is None else factor)
    chosen = settings.get("resample")
    chosen = resample if chosen is None else chosen
    if type(chosen) is not int or not 0 <= chosen <= 5:
        raise DataError(f"{file}: resample is {chosen!r:.60}, expected 0 to 5, a filter of Pillow.")
    return Pixels(
        resample=chosen,
        scale=scale if settings.get("do_rescale", True) else None,
        mean=of("image_mean", mean) if normalised else None,
        std=of("image_std", std) if normalised else None,
    )


def _clips(settings, tower, path) -> ClipReader:
    del settings
    token = "<|AUDIO|>"
    features = read_log_mel(path, tower.mel, tower.places)
    column, lengths = tower.columns
    return ClipReader(features, column, placeholder=token, token=token, lengths=lengths)


_READERS = {"idefics3": _tiled, "smolvlm": _tiled, "paligemma": _square, "qwen2_5_vl": _grid}
_READERS |= {"qwen2_vl": _grid}
_READERS |= {"llava": _cropped, "qwen2_audio": _clips}
