"""Several hosts, kinds of packing, ends of epochs and positions."""

import json

import numpy as np
import pytest

from jaxft.data import DataError, Tokenised, batches, finite_batches, token_weights


def records(lengths):
    """Record i holds only the token i + 1, so that a batch says which records it has."""
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
def test_the_parts_of_several_hosts_are_the_batches_of_one(packing, last):
    """So none runs out before the others (maxtext #914), and any number of hosts trains alike."""
    given = records([3, 5, 2, 7, 1, 4, 6, 2, 3, 8, 5])
    settings = dict(batch_size=4, max_length=8, packing=packing, epochs=1, last=last, prefetch=0)
    alone = list(batches(given, **settings))
    assert alone and {x.shape for batch in alone for x in batch.values()} == {(4, 8)}
    for count in (2, 4):
        hosts = [
            list(batches(given, **settings, process_index=i, process_count=count))
            for i in range(count)
        ]
        assert [len(host) for host in hosts] == [len(alone)] * count
        for whole, *parts in zip(alone, *hosts, strict=True):
            for name, leaf in whole.items():
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), leaf)
    if last == "pad":
        assert sum(map(len, seen(alone))) == sum(len(part.tokens) for part in given)


@pytest.mark.parametrize("packing", [True, "concat_split", False])
def test_a_position_goes_on_with_another_number_of_hosts(packing):
    given = records([3, 5, 2, 7, 1, 4, 6, 2, 3, 8, 5])
    settings = dict(batch_size=4, max_length=8, packing=packing)
    before, alone = (batches(given, **settings, process_count=n, process_index=0) for n in (2, 1))
    for _ in range(5):
        next(before), next(alone)
    position = json.loads(json.dumps(before.get_state()))
    after = [batches(given, **settings, process_count=4, process_index=i) for i in range(4)]
    for host in after:
        host.set_state(position)
    for _ in range(3):
        tokens = np.concatenate([next(host)["tokens"] for host in after])
        np.testing.assert_array_equal(tokens, next(alone)["tokens"])


def test_held_out_batches_are_shared_among_hosts():
    given = records([3, 5, 2, 7, 1, 4, 6])
    settings = dict(batch_size=2, max_length=8)
    alone = finite_batches(given, **settings)
    hosts = [finite_batches(given, **settings, process_count=2, process_index=i) for i in (0, 1)]
    for whole, *parts in zip(alone, *hosts, strict=True):
        np.testing.assert_array_equal(np.concatenate([p["tokens"] for p in parts]), whole["tokens"])


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


def test_a_refused_position_says_what_changed():
    state = batches(records([3, 4]), batch_size=1, max_length=8).get_state()
    with pytest.raises(DataError, match="batch_size: 1 then, 2 now; seed: 0 then, 3 now"):
        batches(records([3, 4]), batch_size=2, max_length=8, seed=3).set_state(state)
    with pytest.raises(DataError, match="records, template or tokenizer changed"):
        batches(records([3, 5]), batch_size=1, max_length=8).set_state(state)


def test_weights_give_exact_shares():
    """70, 20 and 10 of 100 (Grain mixes by interleaving, not by chance)."""
    token = lambda value: [Tokenised(np.full(2, value, np.int32), np.ones(2, np.float32))] * 5
    got = batches(
        *[token(v) for v in (1, 2, 3)],
        batch_size=10,
        max_length=16,
        weights=[0.7, 0.2, 0.1],
        packing=False,
    )
    first = np.concatenate([next(got)["tokens"][:, 0] for _ in range(10)])
    assert np.bincount(first)[1:].tolist() == [70, 20, 10]


def test_weights_by_tokens_give_exact_shares_of_the_tokens():
    """Records of 2 tokens on one side, of 6 and 10 on the other: 12 to 1 of them for 3 to 1."""
    part = lambda value, n: Tokenised(np.full(n, value, np.int32), np.ones(n, np.float32))
    sources = [part(1, 2)] * 5, [part(2, 6), part(2, 10)]
    weights = token_weights(sources, [0.75, 0.25])
    got = batches(*sources, batch_size=1, max_length=16, weights=weights, packing=False)
    tokens = np.concatenate([next(got)["tokens"].ravel() for _ in range(13 * 4)])
    assert np.bincount(tokens)[1:].tolist() == [96, 32]
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
