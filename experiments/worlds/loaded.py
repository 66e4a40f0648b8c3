"""Model and data from disk or the hub for `--preset full`: the settings of an everyday script.

A paper's script takes the model, the data and the mesh from the flags of `Source`, everything else from
the paper, and passes the result to the functions that preference.py or sft.py are made of. One host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.cli import choices, flags
from jaxft.data.media import media_in, with_media
from jaxft.generation import Generation, SamplingConfig, generate
from jaxft.rl.prompts import rows_of_column
from jaxft.rl.rollouts import columns_of

# The settings of every --preset full --smoke.
SMALL = dict(
    max_length=128, max_new_tokens=4, batch_size=2, gradient_accumulation_steps=1, rank=2, alpha=4.0,
    bfloat16=False, scan_layers=False, remat="none",
)  # fmt: skip


@flags.without_prefix
@dataclasses.dataclass(frozen=True)
class Source:
    """The model and the data of --preset full; the flags have no effect without it."""

    model: str | None = None  # directory, .gguf file or hub id; None: the paper's
    data: str | None = None  # file or hub id; None: the paper's
    # held-out records; None: the paper's or, with --data, a part of it
    eval_data: str | None = None
    # columns of the data with other names, as in sft.py
    fields: Annotated[dict[str, str], tyro.conf.arg(metavar="OURS THEIRS ...")] = dataclasses.field(
        default_factory=dict
    )
    # parts of a batch that are processed in turn; None: the preset's
    microbatches: int | None = None
    fsdp: int = -1  # shards of the params and the batch; -1: as many as the devices allow
    tensor: int = 1  # shards of each projection


def check(config: Any) -> Any:
    """Returns a script's config; raises ValueError for flags of `config.source` without --preset full."""
    choices.check_companions(config, dict.fromkeys(flags.flat(config.source), "preset"))
    return config


def everyday(settings: Any, config: Any, paper: Mapping[str, Any], **more: Any) -> Any:
    """Returns the settings of an everyday script for `config.source`.

    Args:
        settings: the Config of preference.py or sft.py, at its defaults.
        config: a paper's config, with `source` and `smoke`.
        paper: flags of the everyday script with the paper's values, `model` and `data` among them.
        more: flags that neither `source` nor --smoke changes.
    """
    source = config.source
    data = {} if source.data is None else {"data": (source.data,), "eval_data": "", "fields": {}}
    given = {
        "model": source.model,
        "eval_data": source.eval_data,
        "fields": source.fields or None,
        "gradient_accumulation_steps": source.microbatches,
    }
    given = {name: value for name, value in given.items() if value is not None}
    # A smoke run's batch is smaller than a host's devices are many.
    fsdp = 1 if config.smoke and source.fsdp == -1 else source.fsdp
    common = dict(bfloat16=True, scan_layers=True, remat="dots", fsdp=fsdp, tensor=source.tensor)
    small = {name: x for name, x in SMALL.items() if name in flags.flat(settings)}
    chosen = common | dict(paper) | data | (small if config.smoke else {}) | given | more
    return flags.replace(settings, **chosen)


def in_parts(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    *,
    at_once: int,
    limits: Sequence[int] | None = None,
    columns: Mapping[str, Any] | None = None,
    **more: Any,
) -> Generation:
    """Calls `generate` for `at_once` prompts at a time; the answers are those of one call.

    Images of `columns` that are loaded late are loaded with their prompts.
    """
    rows = np.arange(len(prompts))
    some = lambda i: {
        name: rows_of_column(column, rows[i : i + at_once])
        for name, column in (columns or {}).items()
    }
    parts = [
        generate(
            model,
            params,
            prompts[i : i + at_once],
            key,
            config,
            row_ids=rows[i : i + at_once],
            limits=None if limits is None else limits[i : i + at_once],
            **columns_of(some(i)),
            **more,
        )
        for i in range(0, len(prompts), at_once)
    ]
    *arrays, ends = zip(*parts, strict=True)
    return Generation(*map(np.concatenate, arrays), [end for part in ends for end in part])


def with_other_media(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The records with the images or clips of the next record that has as many, in a circle: a control."""
    made = list(records)
    for count in {len(media_in(record)) for record in records} - {0}:
        rows = [i for i, record in enumerate(records) if len(media_in(record)) == count]
        for i, j in zip(rows, np.roll(rows, -1).tolist(), strict=True):
            made[i] = with_media(records[i], media_in(records[j]))
    return made
