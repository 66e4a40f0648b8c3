"""Inspection of a data set as a model would see it, without a model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxft.data.batching import batches, packing_efficiency
from jaxft.data.columns import CONTENT, is_hidden
from jaxft.data.errors import BadRecords
from jaxft.data.length import TooLong
from jaxft.data.records import SHOWN, Record, as_messages, shown_text
from jaxft.data.rendered import explain, render
from jaxft.data.rendering import Renderer
from jaxft.data.sources import load


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Counts of a data set; str() is a table."""

    source: str
    records: int  # records read
    kinds: dict[str, int]
    sequences: int  # sequences left to train on
    tokens: int
    trained: float  # fraction of the tokens that train
    percentiles: dict[int, int]  # of the lengths before truncation
    not_shown: str  # "answer (5 records), solution (5 records)", or ""
    left_out: str  # "3 too_long, 1 no_loss_tokens", or ""
    duplicate_ids: int
    duplicates: int  # records with the same tokens as an earlier one
    packing_efficiency: float  # fraction of real tokens in packed rows
    merged_boundaries: int
    examples: list[str]

    def __str__(self) -> str:
        lengths = ", ".join(f"{p}%: {n}" for p, n in self.percentiles.items())
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.items())
        rows = [
            ("source", self.source),
            ("records", f"{self.records} ({kinds})"),
            ("sequences", f"{self.sequences}, of {self.tokens} tokens"),
            ("tokens that train", f"{self.trained:.1%}"),
            ("lengths", lengths),
            ("columns not shown", self.not_shown or "none"),
            ("left out or cut", self.left_out or "none"),
            ("duplicates", f"{self.duplicates} (ids: {self.duplicate_ids})"),
            ("packing efficiency", f"{self.packing_efficiency:.1%}"),
            ("boundaries kept apart", str(self.merged_boundaries)),
        ]
        table = "\n".join(f"{name:22}{value}" for name, value in rows)
        return "\n\n".join([table, *self.examples])


def inspect(
    spec: Any,
    renderer: Renderer,
    max_length: int,
    *,
    fields: Mapping[str, str] | None = None,
    limit: int | None = None,
    too_long: TooLong = "drop",
    color: bool = False,
) -> Inspection:
    """Reads and renders `spec` (see `load`) as training would, and returns counts.

    Bad records are counted and are not errors; `limit` reads only the first records.
    """
    bad = BadRecords(max_bad=1.0)
    records = load(spec, fields=fields, limit=limit, bad=bad)
    any_length = np.iinfo(np.int32).max
    lengths = [len(p.tokens) for p in render(records, renderer, any_length, bad=BadRecords(1.0))]
    renderer.merged_boundaries = 0
    parts = render(records, renderer, max_length, too_long=too_long, bad=bad)
    total = sum(len(part.tokens) for part in parts)
    rows = batches(parts, batch_size=1, max_length=max_length, epochs=1, process_count=1)
    # Not the number of records: one record may be several sequences.
    copies = collections.Counter(part.tokens.tobytes() for part in parts)
    ids = collections.Counter(str(record["id"]) for record in records)
    return Inspection(
        source=records[0]["_source"],
        records=len(records),
        kinds=dict(collections.Counter(map(_kind, records))),
        sequences=len(parts),
        tokens=total,
        trained=sum(int((part.loss_mask > 0).sum()) for part in parts) / total,
        percentiles={p: int(np.percentile(lengths, p)) for p in (50, 90, 99, 100)},
        not_shown=not_shown(records),
        left_out=bad.summary(),
        duplicate_ids=len(records) - len(ids),
        duplicates=len(parts) - len(copies),
        packing_efficiency=float(np.mean([packing_efficiency(row) for row in rows])),
        merged_boundaries=renderer.merged_boundaries,
        examples=[explain(part, renderer.tokenizer, color=color) for part in parts[:3]],
    )


def not_shown(records: Iterable[Record]) -> str:
    """Lists columns named like question, answer or text that records do not show, with counts; or ""."""
    counts: collections.Counter[str] = collections.Counter()
    for record in records:
        names = {name for name in record if name.strip().lower() in CONTENT}
        names -= {*SHOWN, "messages", "tokens"}
        if "text" in record and "prompt" not in record and record.get("messages") is None:
            names -= {"text"}
        shown = shown_text(record) if any(record[name] for name in names) else ""
        counts.update(name for name in names if is_hidden(record[name], shown))
    return ", ".join(f"{name} ({n} records)" for name, n in sorted(counts.items()))


def _kind(record) -> str:
    if as_messages(record) is not None:
        return "conversations"
    kinds = {"tokens": "token lists", "text": "texts", "prompt": "prompts with completion"}
    return next(kind for field, kind in kinds.items() if field in record)
