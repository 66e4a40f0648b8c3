"""The outputs of a model's frozen part for images or sounds, computed once for each image or clip."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxft.adapters import partition
from jaxft.data.media import Media
from jaxft.data.media_rows import Columns, MediaReader, Shown, media_columns
from jaxft.data.rendering import Tokenised
from jaxft.models.config import embeddings_column

_ROWS = 8  # images or clips that are computed at a time
_POSITIONS = ("places",)  # columns that the decoder reads too


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddedMedia:
    """A `MediaReader` of images or clips whose embeddings are known.

    Attributes:
        reader: of the images or clips themselves.
        shapes: column -> the shape of one of its entries.
        stored: the columns of each image or clip, or the file that holds them.
    """

    reader: MediaReader
    shapes: Mapping[str, tuple[int, ...]]
    stored: dict[Media, Columns | pathlib.Path]

    @property
    def kind(self) -> str:
        """The reader's kind."""
        return self.reader.kind

    @property
    def placeholder(self) -> str:
        """The reader's placeholder."""
        return self.reader.placeholder

    def text(self, media: Media) -> str:
        """The reader's text."""
        return self.reader.text(media)

    def counts(self, media: Media) -> dict[str, int]:
        """Column -> the number of entries of this image or clip."""
        return {name: len(entries) for name, entries in self.arrays(media).items()}

    def arrays(self, media: Media) -> Columns:
        """Column -> entries [count, *shape]."""
        found = self.stored[media]
        return load_file(found) if isinstance(found, pathlib.Path) else found


def cache_tower(
    model: Any,
    params: Any,
    sources: Sequence[Sequence[Tokenised]],
    folder: str | os.PathLike | None = None,
) -> list[list[Tokenised]]:
    """Returns the records with the embeddings of their images or clips instead of pixels or features.

    A batch then has the column "vision_embeddings" or "audio_embeddings" [B, K, D] in float32, and the
    decoder does not run its part for images or sounds. Results differ by the rounding of another program.

    Args:
        model: a Decoder with one tower.
        params: of training, in which no param of the tower trains.
        sources: rendered records. Equal images and clips are computed once.
        folder: keeps the embeddings for later runs, in a file for each image or clip. The name of a file is
            a hash of what the tower reads, its params and its config. None: they are held in memory.

    Raises:
        ValueError: for a model without a tower, a tower that trains, or several processes, each of which
            would read other records.
    """
    tower = _tower(model, params)
    folder = None if folder is None else pathlib.Path(folder)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts = itertools.chain(*sources)
    shown = list(dict.fromkeys(one for part in parts for one in part.media))
    width = (model.config.hidden_size,)
    readers = {}
    for reader in dict.fromkeys(one.reader for one in shown):
        kept = {name: reader.shapes[name] for name in _POSITIONS if name in reader.shapes}
        readers[reader] = EmbeddedMedia(reader, {embeddings_column(tower): width} | kept, {})
    salt = _fingerprint(model, tower, params[tower.name])
    run = _program(model, tower, params[tower.name])
    # Of similar numbers of entries, so that few shapes are compiled.
    shown.sort(key=lambda one: max(one.reader.counts(one.media).values()))
    for i in range(0, len(shown), _ROWS):
        _compute(tower, run, salt, shown[i : i + _ROWS], readers, folder)
    put = lambda one: Shown(one.media, readers[one.reader])
    with_media = lambda part: dataclasses.replace(part, media=tuple(map(put, part.media)))
    return [[with_media(part) for part in source] for source in sources]


def _tower(model, params):
    """The tower, if its outputs never change."""
    towers = getattr(model.config, "towers", ())
    if len(towers) != 1:
        raise ValueError(
            f"cache_tower: {getattr(model.config, 'family', type(model).__name__)} has {len(towers)} parts "
            "for images or sounds, expected one; leave the cache out."
        )
    leaves = jax.tree_util.tree_leaves_with_path(partition(params)[0])
    paths = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    if trained := next((path for path in paths if path.startswith(f"{towers[0].name}/")), None):
        raise ValueError(
            f"cache_tower: {trained} trains, so that its outputs change at each step; adapt the text part "
            "only (--target language), or leave the cache out (--cache-tower)."
        )
    if jax.process_count() > 1:
        raise ValueError(
            "cache_tower: several processes read different records; leave the cache out (--cache-tower)."
        )
    return towers[0]


def _fingerprint(model, tower, params) -> bytes:
    digest = hashlib.sha256(f"{tower} {jnp.dtype(model.dtype)}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode() + str(leaf.dtype).encode())
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.digest()


def _program(model, tower, params):
    module = tower.module(model.dtype, "none")
    names = tower.columns
    embed = jax.jit(
        lambda params, columns: module.apply({"params": params}, *(columns[n] for n in names))
    )
    return lambda columns: np.asarray(embed(params, columns), np.float32)


def _compute(tower, run, salt, shown, readers, folder):
    """Stores the embeddings of at most _ROWS images or clips, by one call of the tower if any are new."""
    own = [readers[one.reader] for one in shown]
    arrays = [one.reader.arrays(one.media) for one in shown]
    files = [None if folder is None else folder / f"{_key(salt, a)}.safetensors" for a in arrays]
    new = [file is None or not file.exists() for file in files]
    found = [None] * len(shown)
    if any(new):
        rows = [[one] for one in shown] + [[]] * (_ROWS - len(shown))
        found = run(media_columns(rows, shown))
    for one, reader, given, file, fresh, row in zip(
        shown, own, arrays, files, new, found, strict=False
    ):
        if fresh:
            count = one.reader.text(one.media).count(one.reader.placeholder)
            entries = {embeddings_column(tower): row[:count].copy()}
            entries |= {name: given[name] for name in reader.shapes if name in given}
            if file is not None:
                part = file.with_suffix(f".{os.getpid()}.part")
                save_file(entries, part)
                part.replace(file)
        reader.stored[one.media] = entries if file is None else file


def _key(salt: bytes, arrays: Columns) -> str:
    digest = hashlib.sha256(salt)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]
