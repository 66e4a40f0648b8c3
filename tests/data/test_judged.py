"""Pairs made by a judge: GREEN's counts from text, and which samples become a pair."""

import math

import pytest

from jaxft import data
from jaxft.data import GreenCounts, clean_report, green_score, judge_pairs, parse_green

TEXT = """[Explanation]:
The candidate misses an effusion: 2 mentions of (a) scale aside.

[Clinically Significant Errors]:
(a) False report of a finding in the candidate: 1. Cardiomegaly
(b) Missing a finding present in the reference: 2. Effusion; opacity
(c) Misidentification of a finding's anatomic location/position: 0.
(d) Misassessment of the severity of a finding: 0
(e) Mentioning a comparison that isn't in the reference: 0.
(f) Omitting a comparison detailing a change from a prior study: 1. Stable: 3 days

[Clinically Insignificant Errors]:
(a) False report of a finding in the candidate: 0.
(d) Misassessment of the severity of a finding: 4. Mild

[Matched Findings]:
5. No pneumothorax; lines in place; 2 clips
"""


def test_green_s_text_is_read():
    counts = parse_green(TEXT)
    assert counts == GreenCounts(5, (1, 2, 0, 0, 0, 1), (0, 0, 0, 4, 0, 0))
    assert green_score(counts) == 5 / 9  # The insignificant ones do not count.
    assert parse_green(TEXT.replace("(a)", "(1)").replace("(f)", "(6)")) == counts
    without = TEXT.split("[Clinically Insignificant")[0] + "[Matched Findings]:\n" + "5."
    assert parse_green(without) == counts._replace(insignificant=(0,) * 6)
    none = "[Clinically Significant Errors]:\nNo errors.\n[Matched Findings]:\nNo matched findings."
    assert parse_green(none) == GreenCounts(0, (0,) * 6) and green_score(parse_green(none)) == 0


@pytest.mark.parametrize(
    "old, new",
    [
        ("[Matched Findings]", "[Matches]"),
        ("[Clinically Significant Errors]", "[Errors]"),
        ("5. No pneumothorax", "five: pneumothorax"),
        ("candidate: 1. Cardio", "candidate: one. Cardio"),
        ("(d) Misassessment of the severity of a finding: 4.", "(d) Misassessment"),
    ],
)
def test_what_cannot_be_read_has_no_score(old, new):
    assert old in TEXT and parse_green(TEXT.replace(old, new)) is None


def test_green_is_a_share():
    assert green_score(GreenCounts(3, (0,) * 6)) == 1.0
    assert green_score(GreenCounts(0, (2, 0, 0, 0, 0, 0))) == 0.0
    assert green_score(GreenCounts(2, (1, 0, 1, 0, 0, 4))) == 0.25
    with pytest.raises(ValueError, match="at least 0"):
        green_score(GreenCounts(1, (-1, 0, 0, 0, 0, 0)))


def test_reports_are_cleaned():
    assert clean_report("**Heart** [XXXX] is\n  Normal [a, b].") == "heart is normal ."


def test_one_pair_a_prompt_best_against_worst():
    samples = [{"prompt": p, "responses": list("abcd"), "id": p} for p in "uvwxyz"]
    nan = math.nan
    scores = [
        [0.1, 0.9, 0.4, 0.0],
        [0.5, 0.5, 0.5, 0.5],  # nothing to choose
        [None, 0.2, nan, 0.7],  # two could not be judged
        [None, None, 0.3, None],  # one makes no pair
        [0.3, 0.3 + 1e-9, 0.3, 0.3],  # closer than the gap
        [1.0, 0.0, 0.0, 1.0],  # ties: the first of each
    ]
    judged = judge_pairs(samples, scores)
    found = [(p["prompt"], p["chosen"], p["rejected"]) for p in judged.pairs]
    assert found == [("u", "b", "d"), ("w", "d", "b"), ("z", "a", "b")]
    assert (judged.unscored, judged.undecided) == (5, 3)
    assert judged.pairs[1]["score_chosen"] == 0.7 and judged.pairs[1]["score_rejected"] == 0.2
    every = judge_pairs(samples[:1], scores[:1], choose=data.all_pairs)
    assert len(every.pairs) == 6
    assert len(judge_pairs(samples, scores, min_gap=0.6).pairs) == 2
    # What reads pairs reads these.
    assert data.normalise_pair(judged.pairs[0])["chosen"] == "b"


def test_mistakes_are_explained():
    samples = [{"prompt": "u", "responses": ["a", "b"]}]
    with pytest.raises(data.DataError, match="1 records and 2 lists"):
        judge_pairs(samples, [[1, 2], [1, 2]])
    with pytest.raises(data.DataError, match="record 0 has 2 responses and 1 scores"):
        judge_pairs(samples, [[1]])
    with pytest.raises(data.DataError, match="infinite score"):
        judge_pairs(samples, [[1, math.inf]])
