"""Batches of static shape from tokenised records: shuffled, packed, mixed, with a resumable position."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.length import longest
from jaxft.data.media_rows import ShownNumbers, media_columns, one_of_each
from jaxft.data.rendering import Tokenised

Batch = dict[str, np.ndarray]  # tokens, loss_mask, segment_ids, positions: [B, T] each
Packing = Literal["first_fit", "best_fit", "concat_split"]
PACKING_BINS = 16  # rows that are filled concurrently
MIN_BUCKET = 16


class DataIterator:
    """Endless batches, or batches of some epochs; `get_state` is the position after the last one taken.

    Made by `batches`. The position is JSON, is the same on every host and for any number of hosts, and is
    saved in checkpoints. It excludes batches that were prefetched but not taken, so none is lost.
    """

    def __init__(self, dataset: Any, fingerprint: dict[str, Any]):
        self._iterator = iter(dataset)
        self.fingerprint = fingerprint

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON."""
        state = json.loads(json.dumps(self._iterator.get_state()))
        return {"fingerprint": self.fingerprint, "grain": state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position.

        Raises:
            DataError: if it belongs to other records or settings; the message lists the differences.
        """
        saved = state["fingerprint"]
        # Convert by JSON, like the saved position: tuples become lists.
        here = json.loads(json.dumps(self.fingerprint))
        if saved != here:
            raise DataError(
                f"resume: the data is not that of the checkpoint ({_differences(saved, here)}); "
                "restore these settings, or start a new output directory."
            )
        self._iterator.set_state(state["grain"])


def batches(
    *sources: Sequence[Tokenised],
    batch_size: int,
    max_length: int,
    weights: Sequence[float] | None = None,
    packing: bool | Packing = True,
    seed: int = 0,
    epochs: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    last: Literal["drop", "pad"] = "drop",
    max_segments: int | None = None,
    prefetch: int = 2,
) -> DataIterator:
    """Returns an endless (or `epochs` long) iterator over batches of one or several sources.

    The order depends only on the seed and differs in each epoch. Packed rows hold several records
    with segment ids 1, 2... (0 is padding) and positions that restart. Unpacked rows are padded to the
    smallest power of two that fits the batch's longest or, on several hosts, whose shapes must agree,
    to max_length.

    Args:
        sources: tokenised records; no record may be longer than max_length.
        batch_size: rows of a batch, over all hosts.
        max_length: T of packed rows, the maximum T of padded rows.
        weights: fraction of the records from each source; default: in proportion to their sizes. See
            `token_weights` for fractions of the tokens.
        packing: True or "first_fit": whole records, each in the first row with room for it;
            "best_fit": in the fullest such row; "concat_split": consecutive, split at the end of the
            row (no padding; the second piece lacks its beginning); False: one record per row.
        epochs: passes over the data; needs a single source. None: endless.
        process_index, process_count: those of this host, which gets its part of the rows. Default: JAX's.
        last: handling of an incomplete last batch of `epochs`: it is dropped, or filled with rows of
            padding, so that every record counts.
        max_segments: maximum records in a packed row.
        prefetch: batches that a thread prepares ahead; 0: none.

    Raises:
        DataError: for sources or settings that cannot give a batch.
    """
    import grain

    own = own_rows(batch_size, process_index, process_count)
    _check(sources, max_length, weights, epochs)
    packing = {True: "first_fit", False: None}.get(packing, packing)
    shares = [len(source) for source in sources] if weights is None else list(weights)
    shown = ShownNumbers(sources)
    streams = [_stream(source, seed + i, epochs, shown) for i, source in enumerate(sources)]
    mixed = streams[0] if len(streams) == 1 else grain.IterDataset.mix(streams, shares)
    if packing is None:
        whole = _padded(mixed, batch_size, max_length, last)
    else:
        read = sources[0][0].source is not None
        names = ("source",) * read + ("media",) * bool(shown)
        whole = _packed(mixed, batch_size, max_length, seed, packing, max_segments, last, names)
    settings = {
        "batch_size": batch_size,
        "max_length": max_length,
        "weights": [float(share) for share in shares],
        "packing": packing,
        "max_segments": max_segments,
        "last": last,
        "seed": seed,
        "epochs": epochs,
    }
    fingerprint = {"records": _digest(sources), **settings}
    whole = whole.map(own)
    return DataIterator(ahead(whole.map(shown.columns) if shown else whole, prefetch), fingerprint)


def own_rows(
    batch_size: int, process_index: int | None = None, process_count: int | None = None
) -> Callable[[Batch], Batch]:
    """Returns a function that selects this host's rows of a batch of `batch_size`; see `batches`.

    Raises:
        DataError: if the rows cannot be divided among the hosts.
    """
    import jax

    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise DataError(f"batches: process_index={index} of process_count={count}.")
    if batch_size < 1:
        raise DataError(f"batches: batch_size must be positive, got {batch_size}.")
    if batch_size % count:
        raise DataError(
            f"batches: batch_size must be a multiple of the {count} hosts, got {batch_size}."
        )
    rows = slice(batch_size // count * index, batch_size // count * (index + 1))
    return lambda batch: {name: leaf[rows] for name, leaf in batch.items()}


def ahead(dataset: Any, prefetch: int) -> Any:
    """Prefetches `prefetch` elements of the dataset in a thread; 0: none."""
    import grain

    if not prefetch:
        return dataset
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)


def read(dataset: Any) -> Any:
    """The elements of a `grain.MapDataset` in order, without Grain's 16 threads that read 500 ahead.

    Records are in memory: threads would cost more than reading does, most of it at the start.
    """
    import grain

    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))


def _check(sources, max_length, weights, epochs):
    if not sources or not all(len(source) for source in sources):
        raise DataError("batches: a source is empty.")
    if epochs is not None and len(sources) > 1:
        raise DataError("batches: epochs need a single source; with several, count steps.")
    if weights is not None and not _are_shares(weights, sources):
        raise DataError(
            f"batches: weights={list(weights)}; expected a positive number for each of "
            f"{len(sources)} sources."
        )
    most = max(longest(part) for source in sources for part in source)
    if most > max_length:
        raise DataError(f"batches: a record has {most} tokens, max_length is {max_length}.")
    if len({part.source is None for source in sources for part in source}) > 1:
        raise DataError("batches: some records have a source and some have none; render all alike.")


def _are_shares(weights, sources):
    return len(weights) == len(sources) and all(0 < weight < np.inf for weight in weights)


def _stream(source, seed, epochs, shown):
    import grain

    def features(part):
        own = {"tokens": part.tokens, "loss_mask": part.loss_mask}
        own |= {"media": shown.numbers(part)} if shown else {}
        return own if part.source is None else own | {"source": part.source}

    shuffled = grain.MapDataset.source(source).map(features).seed(seed).shuffle()
    return read(shuffled.repeat(epochs))


def token_weights(sources: Sequence[Sequence[Tokenised]], shares: Sequence[float]) -> list[float]:
    """Returns the `weights` of `batches` for which the sources give these fractions of the tokens.

    The weight is the fraction divided by the mean length, so a source of long records gives fewer
    records. This is exact over whole passes, in which each record of a source occurs equally often.

    Raises:
        DataError: if `shares` is not one positive number per source, or a source is empty.
    """
    if not sources or not _are_shares(shares, sources):
        raise DataError(
            f"token_weights: shares={list(shares)}; expected a positive number for each of "
            f"{len(sources)} sources."
        )
    if not all(len(source) for source in sources):
        raise DataError("token_weights: a source is empty.")
    tokens = [sum(len(part.tokens) for part in source) for source in sources]
    return [
        share * len(source) / total
        for share, source, total in zip(shares, sources, tokens, strict=True)
    ]


def temperature_weights(sizes: Sequence[int], temperature: float) -> list[float]:
    """Returns the `weights` of `batches` in proportion to n^(1/T), for n records in a source; sum 1.

    Arivazhagan et al., 2019, arxiv.org/abs/1907.05019, section 4.1. T = 1 leaves the sources as large as they
    are; T = infinity gives each the same weight, which oversamples the smaller of two sources by the ratio
    of their sizes.

    Raises:
        DataError: for a temperature below 1, or a size below 1.
    """
    if not temperature >= 1 or not sizes or min(sizes) < 1:
        raise DataError(
            f"temperature_weights: expected a temperature of at least 1 and sizes of at least 1, got "
            f"{temperature} and {list(sizes)}."
        )
    # Relative to the largest, so that no power overflows.
    powers = [(size / max(sizes)) ** (1 / temperature) for size in sizes]
    return [power / sum(powers) for power in powers]


def finite_batches(
    records: Sequence[Tokenised],
    *,
    batch_size: int,
    max_length: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> list[Batch]:
    """Yields every record once, in order, packed into rows; the last batch is filled with padding.

    Args:
        batch_size, process_index, process_count: see `batches`; a host gets its rows of each batch.

    Raises:
        DataError: if batch_size is below 1 or not a multiple of the hosts.
    """
    own = own_rows(batch_size, process_index, process_count)
    rows: list[list[Tokenised]] = [[]]
    reads = any(part.source is not None for part in records)
    of_source = lambda part: len(part.source) if reads else 0
    for part in records:
        row = [*rows[-1], part]
        if max(sum(len(p.tokens) for p in row), sum(map(of_source, row))) > max_length:
            rows.append([])
        rows[-1].append(part)
    rows += [[]] * (-len(rows) % batch_size)
    built = [padded_row(row, max_length, max_length if reads else None) for row in rows]
    like = one_of_each(part.media for part in records)

    def batch(i):
        cut = slice(i, i + batch_size)
        made = {name: np.stack([row[name] for row in built[cut]]) for name in built[0]}
        shown = [[one for part in row for one in part.media] for row in rows[cut]]
        return own(made | media_columns(shown, like) if like else made)

    return [batch(i) for i in range(0, len(built), batch_size)]


def packing_efficiency(batch: Batch) -> float:
    """Fraction of a batch's slots that hold real tokens."""
    return float((batch["segment_ids"] > 0).mean())


def _packed(dataset, batch_size, max_length, seed, packing, max_segments, last, beside):
    from grain import experimental

    lengths = dict.fromkeys(("tokens", "loss_mask", *beside), max_length)
    if packing == "concat_split" and beside:
        raise DataError(
            "batches: packing='concat_split' would cut answers from their sources, images or clips; use "
            "first_fit or best_fit."
        )
    if packing == "concat_split":
        packed = experimental.ConcatThenSplitIterDataset(dataset, length_struct=lengths)
    elif packing in ("first_fit", "best_fit"):
        fit = {
            "first_fit": experimental.FirstFitPackIterDataset,
            "best_fit": experimental.BestFitPackIterDataset,
        }[packing]
        packed = fit(
            dataset,
            length_struct=lengths,
            num_packing_bins=PACKING_BINS,
            seed=seed,
            max_sequences_per_bin=max_segments,
        )
    else:
        raise DataError(
            f"batches: packing={packing!r}; expected a bool, {', '.join(get_args(Packing))}."
        )

    def rename(row):
        own = {
            "tokens": row["tokens"].astype(np.int32),
            "loss_mask": row["loss_mask"].astype(np.float32),
            "segment_ids": row["tokens_segment_ids"].astype(np.int32),
            "positions": row["tokens_positions"].astype(np.int32),
        }
        own |= {"media": row["media"].astype(np.int32)} if "media" in beside else {}
        if "source" not in beside:
            return own
        read = {"source": row["source"], "source_mask": row["source_segment_ids"]}
        return own | {name: column.astype(np.int32) for name, column in read.items()}

    return _batched(packed.map(rename), batch_size, lambda rows: rows, last)


def _padded(dataset, batch_size, max_length, last):
    wide = lambda rows, name: bucket(max(len(row[name]) for row in rows), max_length)

    def pad(rows):
        width, sources = wide(rows, "tokens"), None
        if "source" in rows[0]:
            sources = wide(rows, "source")
        part = lambda row: Tokenised(row["tokens"], row["loss_mask"], source=row.get("source"))
        media = lambda row: {
            "media": np.resize(np.append(row["media"], np.zeros(width, np.int32)), width)
        }
        beside = lambda row: media(row) if "media" in row else {}
        return [padded_row([part(row)], width, sources) | beside(row) for row in rows]

    return _batched(dataset, batch_size, pad, last)


def _batched(dataset, batch_size, as_rows, last):
    def stack(given):
        rows = as_rows(given)
        empty = {name: np.zeros_like(column) for name, column in rows[0].items()}
        rows = [*rows, *[empty] * (batch_size - len(rows))]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    return dataset.batch(batch_size, drop_remainder=last == "drop", batch_fn=stack)


def bucket(count: int, max_length: int) -> int:
    """The width of rows for `count` tokens: a power of two from MIN_BUCKET on, at most `max_length`."""
    return min(max_length, max(MIN_BUCKET, 1 << (max(count, 1) - 1).bit_length()))


def padded_row(parts: Sequence[Tokenised], width: int, sources: int | None = None) -> Batch:
    """Builds one row [T] of each leaf: the parts as segments 1, 2..., then padding.

    `sources` is the width of the columns `source` and `source_mask` of an encoder-decoder; None: none.
    """
    row = {
        "tokens": np.zeros(width, np.int32),
        "loss_mask": np.zeros(width, np.float32),
        "segment_ids": np.zeros(width, np.int32),
        "positions": np.zeros(width, np.int32),
    }
    start = 0
    for number, part in enumerate(parts, 1):
        cut = slice(start, start + len(part.tokens))
        row["tokens"][cut] = part.tokens
        row["loss_mask"][cut] = part.loss_mask
        row["segment_ids"][cut] = number
        row["positions"][cut] = np.arange(len(part.tokens))
        start = cut.stop
    return row if sources is None else row | _source_row(parts, sources)


def _source_row(parts, width):
    row = {name: np.zeros(width, np.int32) for name in ("source", "source_mask")}
    start = 0
    for number, part in enumerate(parts, 1):
        cut = slice(start, start + len(part.source))
        row["source"][cut], row["source_mask"][cut] = part.source, number
        start = cut.stop
    return row


def source_columns(sources: Sequence[np.ndarray], width: int) -> Batch:
    """The columns `source` and `source_mask` [B, width] of sources [S], each in its own row."""
    part = lambda source: Tokenised(source[:0], source[:0], source=source)
    rows = [_source_row([part(source)], width) for source in sources]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _digest(sources) -> str:
    """Digest of all tokens and masks, which depend on records, template and tokenizer."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(len(source).to_bytes(8))
        for part in source:
            digest.update(len(part.tokens).to_bytes(8))
            digest.update(part.tokens.tobytes())
            digest.update(part.loss_mask.tobytes())
            digest.update("".join(one.media.digest for one in part.media).encode())
            if part.source is not None:
                digest.update(len(part.source).to_bytes(8))
                digest.update(part.source.tobytes())
    return digest.hexdigest()[:16]


def _differences(saved, here) -> str:
    if not isinstance(saved, dict):
        return "made by another version"
    names = [name for name in here if saved.get(name) != here[name]]
    show = lambda name: f"{name}: {saved.get(name)} then, {here[name]} now"
    return "; ".join(
        "records, template or tokenizer changed" if name == "records" else show(name)
        for name in names
    )
