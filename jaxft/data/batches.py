"""Tokenised records -> batches of static shape: shuffled, packed, mixed, with a position to save."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.render import Tokenised

Batch = dict[str, np.ndarray]  # tokens, loss_mask, segment_ids, positions: [B, T] each
PACKING_BINS = 16  # rows that are filled side by side
MIN_BUCKET = 16


class DataIterator:
    """Batches for ever, or for some epochs; `get_state` is the position after the last one taken.

    Made by `batches`. The position is JSON and goes into the checkpoint of the training state.
    """

    def __init__(self, dataset: Any, fingerprint: str):
        self._iterator = iter(dataset)
        self.fingerprint = fingerprint

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON."""
        state = self._iterator.get_state()
        return {"fingerprint": self.fingerprint, "grain": json.loads(json.dumps(state))}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            DataError: if it belongs to other records or settings.
        """
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                "resume: the data is not that of the checkpoint (records, template, max_length, "
                "batch size, seed or host count changed); start a new output directory."
            )
        self._iterator.set_state(state["grain"])


def batches(
    *sources: Sequence[Tokenised],
    batch_size: int,
    max_length: int,
    weights: Sequence[float] | None = None,
    packing: bool = True,
    seed: int = 0,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> DataIterator:
    """An endless (or `epochs` long) iterator over batches of one or several sources.

    The order is a function of the seed alone and new in each epoch. Packed rows hold several records
    with segment ids 1, 2... (0 is padding) and positions that restart; unpacked rows are padded to
    the power of two that holds the batch's longest.

    Args:
        sources: tokenised records; no record may be longer than max_length.
        batch_size: rows of this host's batch.
        max_length: T of packed rows, the longest for padded ones.
        weights: share of the records that each source gives; default: by their sizes.
        epochs: passes over the data, with one source; the last incomplete batch is left out.
        process_index, process_count: of this host; each reads its own records.
    """
    import grain

    if not sources or not all(len(source) for source in sources):
        raise DataError("batches: a source is empty.")
    if epochs is not None and len(sources) > 1:
        raise DataError("batches: epochs need a single source; with several, count steps.")
    longest = max(len(part.tokens) for source in sources for part in source)
    if longest > max_length:
        raise DataError(f"batches: a record has {longest} tokens, max_length is {max_length}.")
    if min(map(len, sources)) < process_count:
        raise DataError(f"batches: fewer records than the {process_count} hosts; each needs one.")
    features = lambda part: {"tokens": part.tokens, "loss_mask": part.loss_mask}

    def stream(number, source):
        dataset = grain.MapDataset.source(source).map(features).seed(seed + number).shuffle()
        return dataset[process_index::process_count].repeat(epochs).to_iter_dataset()

    streams = [stream(i, source) for i, source in enumerate(sources)]
    shares = [len(source) for source in sources] if weights is None else list(weights)
    dataset = streams[0] if len(streams) == 1 else grain.IterDataset.mix(streams, shares)
    dataset = (
        _packed(dataset, batch_size, max_length, seed) if packing else _padded(dataset, batch_size)
    )
    settings = [batch_size, max_length, shares, packing, seed, epochs, process_index, process_count]
    return DataIterator(dataset, _fingerprint(sources, settings))


def finite_batches(
    records: Sequence[Tokenised], *, batch_size: int, max_length: int
) -> list[Batch]:
    """Every record once, in order, packed into rows; the last batch is filled up with padding."""
    rows: list[list[Tokenised]] = [[]]
    for part in records:
        if sum(len(p.tokens) for p in rows[-1]) + len(part.tokens) > max_length:
            rows.append([])
        rows[-1].append(part)
    rows += [[]] * (-len(rows) % batch_size)
    built = [_row(row, max_length) for row in rows]
    return [
        {name: np.stack([row[name] for row in built[i : i + batch_size]]) for name in built[0]}
        for i in range(0, len(built), batch_size)
    ]


def packing_efficiency(batch: Batch) -> float:
    """Share of a batch's slots that hold real tokens."""
    return float((batch["segment_ids"] > 0).mean())


def _packed(dataset, batch_size, max_length, seed):
    from grain.experimental import FirstFitPackIterDataset

    packed = FirstFitPackIterDataset(
        dataset,
        length_struct={"tokens": max_length, "loss_mask": max_length},
        num_packing_bins=PACKING_BINS,
        seed=seed,
    )
    rename = lambda row: {
        "tokens": row["tokens"].astype(np.int32),
        "loss_mask": row["loss_mask"].astype(np.float32),
        "segment_ids": row["tokens_segment_ids"].astype(np.int32),
        "positions": row["tokens_positions"].astype(np.int32),
    }
    return packed.map(rename).batch(batch_size, drop_remainder=True)


def _padded(dataset, batch_size):
    def stack(rows):
        parts = [Tokenised(row["tokens"], row["loss_mask"]) for row in rows]
        longest = max(len(part.tokens) for part in parts)
        width = max(MIN_BUCKET, 1 << (longest - 1).bit_length())
        built = [_row([part], width) for part in parts]
        return {name: np.stack([row[name] for row in built]) for name in built[0]}

    return dataset.batch(batch_size, drop_remainder=True, batch_fn=stack)


def _row(parts: Sequence[Tokenised], width: int) -> Batch:
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
    return row


def _fingerprint(sources, settings) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source in sources:
        for part in source:
            digest.update(part.tokens.tobytes())
            digest.update(part.loss_mask.tobytes())
    return digest.hexdigest()[:16]
