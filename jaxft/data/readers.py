"""The processors of a model's images, made of its files: preprocessor_config.json and config.json."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxft.checkpoints import resolve
from jaxft.data.errors import DataError
from jaxft.data.images import Pixels, TiledImages
from jaxft.data.media_rows import MediaReader
from jaxft.models import FAMILIES
from jaxft.models.json_files import read_json

_TILED = ("idefics3", "smolvlm")
_LANCZOS = 1
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
    if known is None or known.name not in _TILED:
        return ()
    (tower,) = known.huggingface.config(json).towers
    settings = _settings(path)
    reader = _tiled(settings, tower, path)
    if tokenizer.convert_tokens_to_ids(reader.placeholder) != tower.token:
        raise DataError(
            f"{path}: the tokenizer's id of {reader.placeholder} is "
            f"{tokenizer.convert_tokens_to_ids(reader.placeholder)}, config.json's image_token_id "
            f"{tower.token}; take the tokenizer of this model."
        )
    return (reader,)


def _settings(path: pathlib.Path) -> Mapping[str, Any]:
    """The image processor's settings; newer files hold them inside processor_config.json."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (path / name).exists():
            found = read_json(path / name)
            found = found if key is None else found.get(key)
            if found:
                return found
    raise DataError(
        f"{path}: no preprocessor_config.json, which says how its images are resized; copy it there."
    )


def _tiled(settings, tower, path) -> TiledImages:
    size = tower.encoder.image_size
    tile = (settings.get("max_image_size") or {}).get("longest_edge", 364)
    longest = (settings.get("size") or {}).get("longest_edge")
    if tile != size or not isinstance(longest, int) or longest < 1:
        raise DataError(
            f"{path}: preprocessor_config.json has squares of {tile} pixels (max_image_size) and the longest side "
            f"{longest!r}; expected {size}, the image_size of config.json, and a number of pixels."
        )
    pixels = _pixels(settings, path, _LANCZOS)
    split = bool(settings.get("do_image_splitting", True))
    return TiledImages(size, longest, tower.tokens, pixels, split)


def _pixels(settings, path, resample) -> Pixels:
    for name, value in _FIXED.items():
        if settings.get(name, value) not in (value, None):
            raise DataError(
                f"{path}: preprocessor_config.json has {name} = {settings[name]!r}, which jaxft does not have; "
                f"expected {value!r}."
            )
    channels = lambda name: tuple(float(x) for x in settings.get(name) or (0.5, 0.5, 0.5))
    normalised = settings.get("do_normalize", True)
    return Pixels(
        resample=int(settings.get("resample", resample)),
        scale=float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else None,
        mean=channels("image_mean") if normalised else None,
        std=channels("image_std") if normalised else None,
    )
