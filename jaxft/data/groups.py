"""Groups of sequences, such as the two completions of a pair: rendered, and batched as [B, G, T]."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxft.data.batching import (
    Batch,
    DataIterator,
    ahead,
    bucket,
    own_rows,
    padded_row,
    read,
    source_columns,
)
from jaxft.data.errors import BadRecords, DataError
from jaxft.data.length import TooLong, keep_answer, longest, shorten
from jaxft.data.media_rows import media_columns, one_of_each
from jaxft.data.records import CONTEXT, Record
from jaxft.data.rendering import Renderer, Tokenised


@dataclasses.dataclass(frozen=True)
class TokenisedGroup:
    """Sequences of one record, with further columns for the loss."""

    parts: tuple[
        Tokenised, ...
    ]  # chosen and rejected; or a completion and another prompt's completion
    columns: Mapping[str, Any]  # numbers or arrays: margin, label, ref_log_probs [G]
    id: str = ""

    def with_column(self, name: str, value: Any) -> TokenisedGroup:
        """Returns the group with one more column."""
        return dataclasses.replace(self, columns={**self.columns, name: value})


def render_pairs(
    records: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    *,
    too_long: TooLong = "drop",
    bad: BadRecords | None = None,
) -> list[TokenisedGroup]:
    """Renders pairs of `normalise_pair` as groups of two, chosen first; a `margin` becomes a column.

    Args:
        renderer: must have the mask "completion" or "last_turn"; a prompt has no loss.
        max_length: maximum tokens of each sequence.
        too_long: as in `render`, except "split"; "truncate_left_prompt" cuts both prompts equally.
        bad: policy for pairs that cannot be used.

    Raises:
        DataError: if no group remains, or by the policies.
    """
    answers = lambda record: [record["chosen"], record["rejected"]]

    def columns(record):
        margin = record.get("margin")
        return {} if margin is None else {"margin": np.float32(margin)}

    return _render(records, renderer, max_length, too_long, bad, answers, columns)


def render_unpaired(
    records: Sequence[Record],
    renderer: Renderer,
    max_length: int,
    *,
    too_long: TooLong = "drop",
    bad: BadRecords | None = None,
    seed: int = 0,
    mismatched: bool = True,
) -> list[TokenisedGroup]:
    """Renders records of `normalise_unpaired` as groups of two: its completion and a mismatched one.

    The column `label` is True if the completion is desirable; a `density_ratio` becomes a column too. The
    second sequence is the record's prompt with the completion of the next record (in shuffled order) that
    has another prompt: KTO estimates its KL from these. Because it is chosen here, not in the batch, it does
    not depend on batches or hosts, and its reference log-probs are a column like the others.

    Args:
        seed: seed of the shuffled order.
        mismatched: False omits the second sequence, for losses that need only labels.

    Raises:
        DataError: as `render_pairs`, and if all prompts are the same.
    """

    def columns(record):
        ratio = record.get("density_ratio")
        own = {} if ratio is None else {"density_ratio": np.float32(ratio)}
        return {"label": np.bool_(record["label"])} | own

    if not mismatched:
        answer = lambda record: [record["completion"]]
        return _render(records, renderer, max_length, too_long, bad, answer, columns)
    order = np.random.default_rng(seed).permutation(len(records))
    other = dict(_mismatched(records, [int(i) for i in order]))
    answers = lambda record: [record["completion"], other[id(record)]]
    return _render(records, renderer, max_length, too_long, bad, answers, columns)


def group_batches(
    groups: Sequence[TokenisedGroup],
    *,
    batch_size: int,
    max_length: int,
    seed: int = 0,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    last: Literal["drop", "pad"] = "drop",
    prefetch: int = 2,
) -> DataIterator:
    """Returns an endless (or `epochs` long) iterator over batches of groups, resumable like `batches`.

    Leaves are [B, G, T], one sequence per row, padded to the smallest power of two that fits the batch's
    longest; columns are [B, ...]. Axis 0 counts groups, so microbatches and devices never split a group.

    Args:
        batch_size: groups per batch, over all hosts.
        max_length, seed, epochs, process_index, process_count, last, prefetch: see `batches`.

    Raises:
        DataError: for groups or settings that cannot give a batch.
    """
    import grain

    own = own_rows(batch_size, process_index, process_count)
    _check(groups, max_length)
    stream = read(grain.MapDataset.source(groups).seed(seed).shuffle().repeat(epochs))
    like = _media(groups)
    stack = lambda given: own(_stack(given, batch_size, max_length, like))
    whole = stream.batch(batch_size, drop_remainder=last == "drop", batch_fn=stack)
    settings = {
        "batch_size": batch_size,
        "max_length": max_length,
        "last": last,
        "seed": seed,
        "epochs": epochs,
    }
    return DataIterator(ahead(whole, prefetch), {"records": _digest(groups), **settings})


def finite_group_batches(
    groups: Sequence[TokenisedGroup],
    *,
    batch_size: int,
    max_length: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> list[Batch]:
    """Yields every group once, in order; the last batch is filled with empty groups of weight 0.

    Args:
        batch_size, process_index, process_count: see `group_batches`; a host gets its part of each batch.

    Raises:
        DataError: as `group_batches`.
    """
    own = own_rows(batch_size, process_index, process_count)
    _check(groups, max_length)
    cut = (groups[i : i + batch_size] for i in range(0, len(groups), batch_size))
    like = _media(groups)
    return [own(_stack(part, batch_size, max_length, like)) for part in cut]


def _render(records, renderer, max_length, too_long, bad, answers, columns):
    if renderer.mask not in ("completion", "last_turn"):
        raise DataError(
            f"mask {renderer.mask!r}: preference losses need a mask of the completions; use 'completion'."
        )
    if too_long == "split":
        raise DataError("too_long='split' would split a completion; use 'drop' or a truncation.")
    bad = BadRecords(loud=True) if bad is None else bad
    result, total = [], 0
    for record in records:
        total += 1
        where = str(record.get("_where", record.get("id", f"record {total - 1}")))
        try:
            parts = [_sequence(record, answer, renderer) for answer in answers(record)]
        except DataError as error:
            if error.code is None:
                raise
            bad.add(where, error.code, str(error))
            continue
        length = max(map(longest, parts))
        if length > max_length and too_long == "error":
            raise DataError(
                f"{where}: {length} tokens, more than max_length={max_length}; raise it, or choose "
                "too_long='drop' or a truncation.",
                "too_long",
            )
        if length > max_length:
            parts = _shortened(parts, max_length, too_long)
            bad.dropped["truncated" if parts else "too_long"] += 1
        if parts:
            result.append(TokenisedGroup(tuple(parts), columns(record), str(record.get("id", ""))))
    bad.finish(total, len(result))
    _check_columns(result)
    return result


def _check_columns(groups):
    """Raises DataError if only some groups have a column such as `margin`."""
    for name in sorted({name for group in groups for name in group.columns}):
        without = [group.id for group in groups if name not in group.columns]
        if without:
            raise DataError(
                f"{len(without)} of {len(groups)} records have no {name!r}, the first {without[0]!r}; give "
                f"all of them one, or leave the column out with --fields {name} ''."
            )


def _sequence(record, answer, renderer) -> Tokenised:
    kept = {name: record[name] for name in ("id", *CONTEXT) if name in record}
    parts = renderer({**kept, "prompt": record["prompt"], "completion": answer})
    if len(parts) > 1:
        raise DataError(
            "the chat template rewrites earlier turns, so a completion of several turns is not a single "
            "sequence; move all turns except its last into 'prompt'.",
            "template",
        )
    if not parts[0].loss_mask[1:].any():
        raise DataError("a completion has no token that counts.", "empty_completion")
    return parts[0]


def _shortened(parts, max_length, too_long):
    """Shortens the parts to max_length, or returns [] if one cannot be; their prompts stay equal."""
    if parts[0].media:
        return []  # A cut could part an image from some of its tokens.
    if too_long == "truncate_left_prompt" and parts[0].source is None:
        surplus = max(len(part.tokens) for part in parts) - max_length
        return [part[keep_answer(part, max_length, surplus)] for part in parts]
    cut = [shorten(part, max_length, too_long) if longest(part) > max_length else [part]
           for part in parts]  # fmt: skip
    return [pieces[0] for pieces in cut] if all(cut) else []


def _mismatched(records, order) -> Iterable[tuple[int, Any]]:
    """Yields (identity of a record, completion of the next in `order` with another prompt)."""
    for place, i in enumerate(order):
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        fits = lambda a, b: a["prompt"] != b["prompt"] and type(a["prompt"]) is type(b["prompt"])
        different = (j for j in following if fits(records[j], records[i]))
        j = next(different, None)
        if j is None:
            raise DataError(
                "all records have the same prompt, so there is no mismatched completion; KTO "
                "cannot estimate its KL from them."
            )
        yield id(records[i]), records[j]["completion"]


def _check(groups, max_length):
    if not groups:
        raise DataError("group_batches: there are no groups.")
    most = max(longest(part) for group in groups for part in group.parts)
    if most > max_length:
        raise DataError(f"group_batches: a sequence has {most} tokens, max_length is {max_length}.")
    kinds = {(len(group.parts), *sorted(group.columns)) for group in groups}
    if len(kinds) > 1:
        shown = " and ".join(map(str, sorted(kinds, key=str)[:2]))
        raise DataError(f"group_batches: groups differ in number of parts or columns: {shown}.")


def _media(groups):
    """One image or clip of each kind in the groups, whose parts have the same ones."""
    for group in groups:
        if any(part.media != group.parts[0].media for part in group.parts):
            raise DataError(
                f"group_batches: the sequences of {group.id or 'a group'} have different images or clips; "
                "those of a prompt are read, none of an answer."
            )
    return one_of_each(group.parts[0].media for group in groups)


def _stack(groups, batch_size, max_length, like) -> Batch:
    most = max((len(part.tokens) for group in groups for part in group.parts), default=1)
    width = bucket(most, max_length)
    # All parts of a group have the same source.
    sources = [group.parts[0].source for group in groups]
    shown = [group.parts[0].media for group in groups]
    groups = [*groups, *[_blank_like(groups[0])] * (batch_size - len(groups))]
    rows = [[padded_row([p] if len(p.tokens) else [], width) for p in g.parts] for g in groups]
    sequences = {
        name: np.stack([np.stack([row[name] for row in group]) for group in rows])
        for name in rows[0][0]
    }
    columns = {name: np.stack([g.columns[name] for g in groups]) for name in groups[0].columns}
    if sources[0] is not None:
        blank = [np.zeros(0, np.int32)] * (len(groups) - len(sources))
        columns |= source_columns([*sources, *blank], bucket(max(map(len, sources)), max_length))
    if like:
        columns |= media_columns([*shown, *[()] * (len(groups) - len(shown))], like)
    return sequences | columns


def _blank_like(group: TokenisedGroup) -> TokenisedGroup:
    """Returns a group with empty parts and zero columns."""
    nothing = Tokenised(np.zeros(0, np.int32), np.zeros(0, np.float32))
    zeros = {name: np.zeros_like(value) for name, value in group.columns.items()}
    return TokenisedGroup((nothing,) * len(group.parts), zeros)


def _digest(groups) -> str:
    """Digest of tokens, masks and columns, without reference log-probs, which differ by rounding."""
    digest = hashlib.sha256()
    update: Callable[[bytes], None] = digest.update
    for group in groups:
        for part in group.parts:
            update(len(part.tokens).to_bytes(8))
            update(part.tokens.tobytes())
            update(part.loss_mask.tobytes())
            update(b"" if part.source is None else part.source.tobytes())
            update("".join(one.media.digest for one in part.media).encode())
        for name in sorted(group.columns.keys() - {"ref_log_probs"}):
            update(name.encode() + np.asarray(group.columns[name]).tobytes())
    return digest.hexdigest()[:16]
