"""Several hosts, kinds of packing, ends of epochs and positions."""

import json

import numpy as np
import pytest

from jaxft.data import DataError, Tokenised, batches, token_weights


def records(lengths):
    """Record i holds the token i + 1 alone, so that a batch says which records it has."""
    make = lambda i, n: Tokenised(np.full(n, i + 1, np.int32), np.ones(n, np.float32), str(i))
    return [make(i, n) for i, n in enumerate(lengths)]


def seen(given):
    """The tokens of each segment, over all batches."""
    segments = []
    for batch in given:
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
            segments += [tokens[ids == s].tolist() for s in range(1, ids.max(initial=0) + 1)]
    return segments


@pytest.mark.parametrize("packing", [True, "best_fit", "concat_split", False])
@pytest.mark.parametrize("last", ["drop", "pad"])
def test_eleven_records_over_two_hosts_end_together(packing, last):
    """One host runs out first; the other must not wait for it for ever (maxtext #914)."""
    given = records([3, 5, 2, 7, 1, 4, 6, 2, 3, 8, 5])
    settings = dict(batch_size=2, max_length=8, packing=packing, epochs=1, last=last)
    hosts = [
        list(batches(given, **settings, process_index=i, process_count=2, prefetch=0))
        for i in range(2)
    ]
    assert len(hosts[0]) == len(hosts[1]) > 0
    shapes = {x.shape for host in hosts for batch in host for x in batch.values()}
    assert shapes == {(2, 8)}
    ids = [{s[0] for s in seen(host)} for host in hosts]
    assert not ids[0] & ids[1]
    if last == "pad":
        assert ids[0] | ids[1] == set(range(1, 12))
        total = sum(len(s) for host in hosts for s in seen(host))
        assert total == sum(len(part.tokens) for part in given)


@pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
def test_packed_records_are_whole_and_positions_restart(packing):
    given = records([3, 5, 2, 7, 1, 4, 6, 2, 3, 8, 5])
    settings = dict(batch_size=2, max_length=8, packing=packing, epochs=1, last="pad")
    got = list(batches(given, **settings))
    assert sorted(seen(got)) == sorted(part.tokens.tolist() for part in given)
    for batch in got:
        for ids, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
            for s in range(1, ids.max(initial=0) + 1):
                assert positions[ids == s].tolist() == list(range((ids == s).sum()))
        assert not batch["loss_mask"][batch["segment_ids"] == 0].any()


def test_concat_split_leaves_no_padding_inside():
    given = records([3, 5, 2, 7, 1, 4, 6, 2, 3, 8, 5])
    settings = dict(batch_size=1, max_length=8, packing="concat_split", epochs=1, last="pad")
    got = list(batches(given, **settings))
    assert all((batch["segment_ids"] > 0).all() for batch in got[:-1])


def test_max_segments_bounds_the_records_of_a_row():
    given = records([1] * 20)
    got = batches(given, batch_size=2, max_length=8, epochs=1, max_segments=3, last="pad")
    assert max(batch["segment_ids"].max() for batch in got) == 3


def test_prefetching_changes_neither_order_nor_position():
    given = records([3, 5, 2, 7, 1, 4, 6])
    make = lambda prefetch: batches(given, batch_size=1, max_length=8, prefetch=prefetch)
    plain, ahead = make(0), make(4)
    for _ in range(9):
        np.testing.assert_array_equal(next(plain)["tokens"], next(ahead)["tokens"])
    state = json.loads(json.dumps(ahead.get_state()))
    expected = [next(plain)["tokens"] for _ in range(5)]
    resumed = make(2)
    resumed.set_state(state)
    for tokens in expected:
        np.testing.assert_array_equal(next(resumed)["tokens"], tokens)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_finished_host_resumes_with_the_same_number_of_batches(taken):
    given = records([8] * 11)
    settings = dict(batch_size=2, max_length=8, epochs=1, last="pad", process_count=2)
    make = lambda: batches(given, process_index=1, **settings)
    whole, first = list(make()), make()
    for _ in range(taken):
        next(first)
    rest = make()
    rest.set_state(json.loads(json.dumps(first.get_state())))
    rest = list(rest)
    assert len(rest) == len(whole) - taken
    for a, b in zip(rest, whole[taken:], strict=True):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])


def test_a_refused_position_says_what_changed():
    state = batches(records([3, 4]), batch_size=1, max_length=8).get_state()
    with pytest.raises(DataError, match="batch_size: 1 then, 2 now; seed: 0 then, 3 now"):
        batches(records([3, 4]), batch_size=2, max_length=8, seed=3).set_state(state)
    with pytest.raises(DataError, match="records, template or tokenizer changed"):
        batches(records([3, 5]), batch_size=1, max_length=8).set_state(state)


def test_weights_give_exact_shares():
    """700, 200 and 100 of 1000 (Grain mixes by interleaving, not by chance)."""
    token = lambda value: [Tokenised(np.full(2, value, np.int32), np.ones(2, np.float32))] * 5
    got = batches(
        *[token(v) for v in (1, 2, 3)],
        batch_size=10,
        max_length=16,
        weights=[0.7, 0.2, 0.1],
        packing=False,
    )
    first = np.concatenate([next(got)["tokens"][:, 0] for _ in range(100)])
    assert np.bincount(first)[1:].tolist() == [700, 200, 100]


def test_weights_by_tokens_give_exact_shares_of_the_tokens():
    """Records of 2 tokens on one side, of 6 and 10 on the other: 12 to 1 of them for 3 to 1."""
    part = lambda value, n: Tokenised(np.full(n, value, np.int32), np.ones(n, np.float32))
    sources = [part(1, 2)] * 5, [part(2, 6), part(2, 10)]
    weights = token_weights(sources, [0.75, 0.25])
    got = batches(*sources, batch_size=1, max_length=16, weights=weights, packing=False)
    tokens = np.concatenate([next(got)["tokens"].ravel() for _ in range(13 * 10)])
    assert np.bincount(tokens)[1:].tolist() == [240, 80]
    for shares in ([1.0], [1.0, 0.0]):
        with pytest.raises(DataError, match="expected a positive number for each of 2 sources"):
            token_weights(sources, shares)
    with pytest.raises(DataError, match="a source is empty"):
        token_weights([sources[0], []], [1.0, 1.0])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(packing="tight"), "packing='tight'; expected a bool, first_fit"),
        (dict(weights=[1.0, 2.0]), "expected a positive number for each of 1 sources"),
        (dict(batch_size=0), "batch_size must be positive, got 0"),
        (dict(process_index=2, process_count=2), "process_index=2 of process_count=2"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(DataError, match=message):
        batches(records([3, 4]), **{"batch_size": 1, "max_length": 8} | settings)
