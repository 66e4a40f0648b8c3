"""Controlled preference pairs: the fraction with a gap is exact, and both sides are alike in rank."""

import collections

import pytest

from jaxft.data import DataError, controlled_preference

STANCES = ("support", "neutral", "oppose")


def records(number, responses=3):
    own = lambda i: {s: [f"{s} {i} {k}" for k in range(responses)] for s in STANCES}
    return [{"prompt": f"q{i}", "topic": i % 3, "responses": own(i)} for i in range(number)]


@pytest.mark.parametrize("rho, gaps", [(0.0, 0), (0.25, 10), (0.5, 20), (0.51, 20), (1.0, 40)])
def test_a_fraction_of_pairs_has_the_gap(rho, gaps):
    given = records(40)
    pairs = controlled_preference(given, chosen="oppose", rejected="support", rho=rho)
    across = [pair for pair in pairs if pair["stance_chosen"] != pair["stance_rejected"]]
    assert len(pairs) == 40 and len(across) == gaps
    for record, pair in zip(given, pairs, strict=True):
        assert (pair["prompt"], pair["topic"]) == (record["prompt"], record["topic"])
        assert "responses" not in pair
        better, worse = (pair[side].split() for side in ("chosen", "rejected"))
        assert (better[0], worse[0]) == (pair["stance_chosen"], pair["stance_rejected"])
        assert better[1] == worse[1] == pair["prompt"][1:]
        if pair in across:
            assert (better[0], worse[0]) == ("oppose", "support") and better[2] == worse[2]
        else:  # the earlier one of one stance is chosen
            assert int(better[2]) < int(worse[2])


def test_pairs_depend_on_the_seed_alone_and_use_all_stances():
    make = lambda seed: controlled_preference(
        records(300), chosen="support", rejected="oppose", rho=0.0, seed=seed
    )
    assert make(1) == make(1) != make(2)
    counts = collections.Counter(pair["stance_chosen"] for pair in make(0))
    assert set(counts) == set(STANCES) and min(counts.values()) > 70
    places = collections.Counter((pair["chosen"][-1], pair["rejected"][-1]) for pair in make(0))
    assert set(places) == {("0", "1"), ("0", "2"), ("1", "2")}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rho=1.5), "rho must lie in"),
        (dict(rejected="support"), "stances must differ"),
        (dict(rejected="against"), "record 0 needs different responses of 'support' and 'against'"),
        (dict(rho=0.0), "record 0 needs different responses of one stance, two of it"),
    ],
)
def test_what_cannot_be_paired_is_refused(change, message):
    given = dict(chosen="support", rejected="oppose", rho=1.0) | change
    with pytest.raises(DataError, match=message):
        controlled_preference(records(4, responses=1), **given)
