"""Reads and writes the special ids of a model's files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxft.models.errors import CheckpointError

NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys that transformers adds, which are not settings.
_METADATA = ("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash")


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of config.json or of a GGUF file, and the settings of generation_config.json.

    Attributes:
        bos: begins a text.
        eos: each of these ends one.
        pad: fills rows.
        assumed: whether `eos` is the default of transformers' configuration class, because no file names it.
        generation: the JSON text of generation_config.json without the ids of `bos`, `eos` and `pad`; "": it
            has nothing else, or there is none.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    assumed: bool = False
    generation: str = ""

    @property
    def generation_ends(self) -> tuple[int, ...]:
        """The ids that end a text by generation_config.json, if they differ from config.json."""
        settings = json.loads(self.generation or "{}")
        return as_ids("generation_config.json", settings, "eos_token_id")

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a text."""
        return tuple(dict.fromkeys((*self.generation_ends, *self.eos)))


def read_special_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], default: SpecialIds
) -> SpecialIds:
    """The ids of a config.json, whose `text_config` counts too, and the settings of its generation config.

    Args:
        config: config.json. Absent keys are as in `default`; null means no id.
        generation: generation_config.json; {}: there is none.
        default: the ids of transformers' configuration class.

    Raises:
        CheckpointError: for an id that is not a number.
    """
    table = {**(config.get("text_config") or {}), **config}
    # A default outside the embedding can never occur.
    fits = lambda i: i is not None and i < table.get("vocab_size", i + 1)
    assumed = dict(zip(NAMES, ([default.bos], default.eos, [default.pad]), strict=True))
    find = lambda name: as_ids("config.json", table, name, tuple(filter(fits, assumed[name])))
    bos, eos, pad = map(find, NAMES)
    ids = SpecialIds(
        bos=bos[0] if bos else None,
        eos=eos,
        pad=pad[0] if pad else None,
        assumed="eos_token_id" not in table and bool(eos),
    )
    for name in NAMES:
        as_ids("generation_config.json", generation, name)
    written = write_ids(ids)
    same = lambda name: as_ids("", generation, name) == as_ids("", written, name)
    known = {name for name in NAMES if same(name)}.union(_METADATA)
    settings = {k: v for k, v in generation.items() if v is not None and k not in known}
    return dataclasses.replace(ids, generation=_text(settings))


def write_ids(ids: SpecialIds) -> dict[str, Any]:
    """The keys of config.json; null if there is no id, because absent keys mean defaults."""
    eos: Any = list(ids.eos) if len(ids.eos) > 1 else next(iter(ids.eos), None)
    written = {"bos_token_id": ids.bos, "pad_token_id": ids.pad}
    return written if ids.assumed else written | {"eos_token_id": eos}


def write_generation(ids: SpecialIds) -> dict[str, Any]:
    """The generation_config.json: `ids` and the loaded model's settings; {}: nothing is known."""
    known = {name: value for name, value in write_ids(ids).items() if value is not None}
    return known | json.loads(ids.generation or "{}")


def with_ends(ids: SpecialIds, ends: tuple[int, ...]) -> SpecialIds:
    """The ids, with `ends` as further ids that end a text.

    They are added to config.json only if it names none, so that its content stays; generation_config.json,
    which transformers follows, gets those that it lacks.
    """
    if ids.assumed or not ids.eos:
        ids = dataclasses.replace(ids, eos=ends or ids.eos, assumed=ids.assumed and not ends)
    settings = json.loads(ids.generation or "{}")
    said = as_ids("generation_config.json", settings, "eos_token_id") or ids.eos
    union = tuple(dict.fromkeys((*said, *ends)))
    if union == said:
        return ids
    return dataclasses.replace(ids, generation=_text(settings | {"eos_token_id": list(union)}))


def as_ids(file: str, table: Mapping[str, Any], name: str, default: Any = ()) -> tuple[int, ...]:
    """The ids under a key, which may hold one, a list or null; absent: the default."""
    value = table.get(name) if name in table else default
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(
            f"{file}: {name} is {value!r}, expected an id, a list of ids or null; correct the file."
        )
    return tuple(ids)


def _text(settings):
    return json.dumps(settings, sort_keys=True) if settings else ""
