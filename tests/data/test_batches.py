import itertools
import json

import numpy as np
import pytest

from jaxft.data import (
    DataError,
    Tokenised,
    batches,
    finite_batches,
    packing_efficiency,
    token_weights,
)


def make(lengths, start=0):
    """Records whose tokens all equal their number + 1, so that each can be found again."""
    full = lambda n, value: np.full(n, value, np.int32)
    return [
        Tokenised(full(n, start + i + 1), np.ones(n, np.float32)) for i, n in enumerate(lengths)
    ]


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def found(rows):
    return sorted(set(np.concatenate([b["tokens"].ravel() for b in rows])) - {0})


def same(a, b):
    return all((a[k] == b[k]).all() for k in a) and a.keys() == b.keys()


def test_three_records_pack_as_worked_out_by_hand():
    (batch,) = finite_batches(make([3, 5, 2]), batch_size=2, max_length=8)
    assert batch["tokens"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 2], [3, 3, 0, 0, 0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert packing_efficiency(batch) == 10 / 16


@pytest.mark.parametrize("packing", [True, False])
def test_each_record_is_whole_and_seen_once_an_epoch(packing):
    lengths = np.random.default_rng(0).integers(2, 17, 60)
    records = make(lengths)
    rows = list(batches(records, batch_size=1, max_length=16, packing=packing, epochs=1))
    assert found(rows) == list(range(1, 61))
    for batch in rows:
        assert batch["tokens"].shape == batch["loss_mask"].shape == (1, 16)
        for segment in range(1, batch["segment_ids"].max() + 1):
            inside = batch["segment_ids"][0] == segment
            (number,) = set(batch["tokens"][0][inside])
            assert inside.sum() == lengths[number - 1]
            assert batch["positions"][0][inside].tolist() == list(range(inside.sum()))
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


def test_padded_rows_have_few_widths():
    lengths = np.random.default_rng(0).integers(2, 60, 64)
    rows = list(batches(make(lengths), batch_size=4, max_length=64, packing=False, epochs=1))
    assert {b["tokens"].shape[1] for b in rows} <= {16, 32, 64}


def test_the_order_follows_the_seed_and_changes_each_epoch():
    records = make([4] * 40)
    run = lambda seed: take(batches(records, batch_size=4, max_length=8, seed=seed), 10)
    first, again, other = run(0), run(0), run(1)
    assert all(map(same, first, again))
    assert not all(map(same, first, other))
    assert not all(map(same, first[:5], first[5:]))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("before", [0, 3, 17])
def test_a_saved_position_goes_on_exactly(packing, before):
    records = make(np.random.default_rng(1).integers(2, 17, 50))
    fresh = lambda: batches(records, batch_size=2, max_length=16, packing=packing)
    straight = take(fresh(), before + 9)
    first = fresh()
    take(first, before)
    position = json.loads(json.dumps(first.get_state()))
    resumed = fresh()
    resumed.set_state(position)
    assert all(map(same, take(resumed, 9), straight[before:]))


def test_a_position_of_other_data_is_refused():
    position = batches(make([4] * 9), batch_size=2, max_length=8).get_state()
    for records, options in [(make([4] * 8), {}), (make([4] * 9), {"seed": 1})]:
        other = batches(records, batch_size=2, max_length=8, **options)
        with pytest.raises(DataError, match="the data is not that of the checkpoint"):
            other.set_state(position)


@pytest.mark.parametrize("weights", [[np.nan, 1], [np.inf, 1], [0, 1], [1]])
def test_shares_of_sources_are_positive_numbers(weights):
    sources = [make([8] * 3, start) for start in (0, 100)]
    for share in (lambda: batches(*sources, weights=weights, batch_size=1, max_length=8),
                  lambda: token_weights(sources, weights)):  # fmt: skip
        with pytest.raises(DataError, match="expected a positive number for each of 2"):
            share()


def test_sources_are_mixed_by_weight():
    sources = [make([8] * 30, start) for start in (0, 100, 200)]
    iterator = batches(*sources, weights=[0.7, 0.2, 0.1], batch_size=10, max_length=8)
    numbers = np.concatenate([b["tokens"][:, 0] for b in take(iterator, 100)])
    counts = np.bincount(numbers // 100, minlength=3)
    # Bins of the packer hold back a few rows.
    assert np.abs(counts - [700, 200, 100]).max() <= 16


def test_mistakes_are_explained():
    with pytest.raises(DataError, match="has 9 tokens, max_length is 8"):
        batches(make([9]), batch_size=1, max_length=8)
    with pytest.raises(DataError, match="a source is empty"):
        batches([], batch_size=1, max_length=8)
    with pytest.raises(DataError, match="epochs need a single source"):
        batches(make([3]), make([3]), batch_size=1, max_length=8, epochs=1)
    with pytest.raises(DataError, match="multiple of the 4 hosts, got 6"):
        batches(make([3] * 3), batch_size=6, max_length=8, process_count=4)
