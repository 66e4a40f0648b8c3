"""Claims, their truth by a reference or by confidence, and the preference pairs that follow."""

import json
import math
import random

import numpy as np
import pytest
import scipy.stats

from jaxft.data import DataError
from jaxft.rewards import (
    Claim,
    ConfidenceScorer,
    LMClaimExtractor,
    LMVerifier,
    PatternClaimExtractor,
    ReferenceScorer,
    ResponseScore,
    answer_confidence,
    equivalence_classes,
    equivalent_answers,
    factual_pairs,
    normalise_answer,
    resumable,
    score_responses,
)

EXTRACT = PatternClaimExtractor(
    r"(?P<attribute>[a-z]) (?P<value>\d)", question="{subject} {attribute} ?", answer="{value}"
)


def sample(subject, *responses):
    return {"subject": subject, "prompt": subject, "responses": list(responses)}


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Paris.", "paris"),
        (" <A New-York> ", "newyork"),
        ("an apple, the pear and", "apple pear"),
        ("Yes, he did", "yes"),
        ("no idea", "no"),
        ("northern", "northern"),
        ("'St. John's'", "st johns"),
        ("one\ntwo!", "one two"),
        ("?!", ""),
    ],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    "first, second, same",
    [
        ("basketball players", "basketball player", True),
        ("new york", "york", True),
        ("a,b", "b", False),
        ("a, b", "b", True),
        ("red blue", "blue red red", True),
        ("red blue", "red", False),
        ("", "paris", False),  # every text ends with the empty one
        ("", "", True),
    ],
)
def test_equivalent_answers(first, second, same):
    assert equivalent_answers(first, second) is equivalent_answers(second, first) is same


def test_classes_and_metrics_of_a_worked_example():
    answers = ["Paris", "paris.", "the Paris", "Rome"]
    assert equivalence_classes(answers) == {"paris": 0.75, "rome": 0.25}
    found = answer_confidence(answers, "Paris")
    np.testing.assert_allclose(found, (0.75, 0.625, -0.562335, 0.75), atol=1e-6)
    assert answer_confidence(["x"] * 20, "x") == (1, 1, 0, 1)
    assert answer_confidence([]) is None and answer_confidence(["x"]).samp_conf is None
    assert equivalence_classes(["x y", "c", "y x"], [1, 2, 3]) == {"x y": 4 / 6, "c": 2 / 6}
    with pytest.raises(ValueError, match="3 answers and 2 weights"):
        equivalence_classes(["a", "b", "c"], [1, 2])


def test_metrics_are_those_of_counts():
    rng = random.Random(0)
    for _ in range(50):
        answers = rng.choices("klmnop", weights=[8, 4, 2, 1, 1, 1], k=rng.randint(1, 20))
        shares = np.unique(answers, return_counts=True)[1] / len(answers)
        found = answer_confidence(answers, answers[0])
        expected = (shares.max(), (shares**2).sum(), -scipy.stats.entropy(shares))
        np.testing.assert_allclose(found[:3], expected, atol=1e-12)
        assert found.samp_conf == answers.count(answers[0]) / len(answers)


def test_a_pattern_s_claims():
    ((first, second), (), (third,)) = EXTRACT(["x", "x", "y"], ["a 1 b 2 a 1", "", "b 2"])
    assert first == Claim("x", "x a 1", "x a ?", "1") and second.text == "x b 2"
    assert third == Claim("y", "y b 2", "y b ?", "2")
    with pytest.raises(ValueError, match=r"text has \['attribute', 'value'\]"):
        PatternClaimExtractor(r"(\w) (\d)")


def test_a_language_model_s_claims_and_verdicts():
    facts = {"She was born in Ulm.": "- A was born in Ulm.\n1. A was born.\nDone", "Hm!": "None."}
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        tail = [prompt.strip().rsplit("\n", 1)[1] for prompt in prompts]
        questions = {"Fact: A was born in Ulm.": "Question: Where was A born?\nAnswer: Ulm"}
        return [facts.get(t.removeprefix("Sentence: "), questions.get(t, "?")) for t in tail]

    extract = LMClaimExtractor(generate)
    both = ["She was born in Ulm. Hm!", "She was born in Ulm."]
    (first, second) = extract(["A", "A"], both)
    assert first == second
    assert first[0] == Claim("A", "A was born in Ulm.", "Where was A born?", "Ulm")
    assert first[1] == Claim("A", "A was born.") and len(first) == 2
    assert len(asked) == len(set(asked)) == 4
    verify = LMVerifier(
        lambda prompts: ["True." if "Reference: Ulm" in p else "**no**, it" for p in prompts]
    )
    assert verify(first, [["Ulm"], ["Rome"]]) == [True, False]
    assert LMVerifier(lambda prompts: ["perhaps"])(first[:1], [[]]) == [None]
    with pytest.raises(ValueError, match="generate: 0 texts for 1"):
        LMVerifier(lambda prompts: [])(first[:1], [[]])


def test_a_perfect_reference_gives_exact_precision():
    rng = random.Random(0)
    known = {f"s{i}": {f"s{i} {a} {rng.randrange(3)}" for a in "abcd"} for i in range(5)}
    samples, exact = [], []
    for subject, facts in known.items():
        texts = [[f"{a} {rng.randrange(3)}" for a in rng.sample("abcd", 3)] for _ in range(4)]
        samples.append(sample(subject, *map(" ".join, texts)))
        right = [[f"{subject} {claim}" in facts for claim in text] for text in texts]
        exact.append([sum(row) / len(row) for row in right])
    scores = score_responses(samples, EXTRACT, ReferenceScorer(known))
    assert [[one.value for one in row] for row in scores] == exact
    pairs = factual_pairs(samples, scores).pairs
    count = sum(x > y for row in exact for x in row for y in row)
    assert len(pairs) == count > 5
    assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)


def test_a_reference_needs_passages_and_may_be_undecided():
    claims = [Claim(s, f"{s} a 1") for s in "zyx"]
    with pytest.raises(ValueError, match=r"no passages of 2 subjects \(y, z\)"):
        ReferenceScorer({"x": ["x a 1"], "y": []})(claims)
    seen = []

    def verify(claims, passages):
        seen.extend(passages)
        return [True, None, False]

    corpus = {s: ["other words", f"{s} a 2", f"{s} a 1"] for s in "xyz"}
    assert ReferenceScorer(corpus, verify, top=2)(claims) == [1.0, None, 0.0]
    assert seen == [[f"{s} a 1", f"{s} a 2"] for s in "zyx"]


def test_confidence_of_claims_and_dropped_ones():
    asked = []

    def answers(questions, count):
        asked.append((questions, count))
        table = {"x a ?": ["1", "1", "1", "2"], "x b ?": []}
        return [table[question] for question in questions]

    scorer = ConfidenceScorer(answers, 4)
    samples = [sample("x", "a 1 b 1", "a 2 a 1", "b 3", "", "a 2 a 1")]
    ((first, second, third, fourth, again),) = score_responses(samples, EXTRACT, scorer)
    assert asked == [(["x a ?", "x b ?"], 4)]
    assert first.value == 0.75 and first.scores == (0.75, None)
    assert first.dropped == (Claim("x", "x b 1", "x b ?", "1"),)
    assert second == again and second.scores == (0.75, 0.75)
    assert third.value is None and third.dropped == third.claims
    assert fourth == ResponseScore(None, (), (), ())
    values = lambda metric: ConfidenceScorer(answers, 4, metric)(second.claims)
    assert values("samp_conf") == [0.25, 0.75] and values("exp_conf") == [0.625] * 2
    assert values("neg_ent")[0] == pytest.approx(-0.562335, abs=1e-6)
    assert ConfidenceScorer(answers)([Claim("x", "no question")]) == [None]
    for bad in (dict(metric="least"), dict(num_samples=0)):
        with pytest.raises(ValueError, match="metric must be one of max_conf"):
            ConfidenceScorer(answers, **bad)


def scored(*values):
    return [ResponseScore(value, (), (), ()) for value in values]


@pytest.mark.parametrize("min_gap, count", [(0.0, 5), (0.35, 3), (0.1, 5)])
def test_numbers_of_pairs(min_gap, count):
    found = factual_pairs(
        [sample("x", *"abcd")], [scored(0.2, 0.5, 0.5, 0.9)], min_gap=min_gap
    ).pairs
    assert len(found) == count
    if count == 3:
        assert {(p["chosen"], p["rejected"]) for p in found} == {("d", x) for x in "abc"}


def test_responses_without_a_score_are_in_no_pair():
    judged = factual_pairs([sample("x", *"abc")], [scored(0.2, None, 0.5)])
    assert [(p["chosen"], p["rejected"]) for p in judged.pairs] == [("c", "a")]
    assert judged.unscored == 1 and judged.pairs[0]["subject"] == "x"


def test_a_certain_model_gives_no_pairs():
    certain = ConfidenceScorer(lambda questions, count: [["1"] * count] * len(questions))
    samples = [sample("x", "a 1", "a 2 b 1"), sample("y", "a 1", "b 2")]
    scores = score_responses(samples, EXTRACT, certain)
    assert {one.value for row in scores for one in row} == {1.0}
    with pytest.raises(DataError, match="no preference pairs: every prompt's scores tie"):
        factual_pairs(samples, scores)


def test_the_order_of_claims_makes_no_pair():
    values = {f"x {a} 1": v for a, v in zip("abc", (0.1, 0.2, 0.3), strict=True)}
    assert sum([0.1, 0.2, 0.3]) != sum([0.3, 0.2, 0.1])
    ((first, second),) = score_responses(
        [sample("x", "a 1 b 1 c 1", "c 1 b 1 a 1")],
        EXTRACT,
        lambda claims: [values[claim.text] for claim in claims],
    )
    assert first.value == second.value


def test_held_out_subjects_are_refused_and_nan_is_no_verdict():
    refuse = lambda *_: pytest.fail("work before the check")
    with pytest.raises(DataError, match=r"1 subjects are held out for the test \(y\)"):
        score_responses([sample("x", "a 1"), sample("y", "a 1")], refuse, refuse, held_out={"y"})
    ((one,),) = score_responses([sample("x", "a 1")], EXTRACT, lambda claims: [math.nan])
    assert one.value is None and one.scores == (None,)
    assert score_responses([sample("x")], EXTRACT, refuse) == [[]]


def test_a_crashed_scoring_run_continues_to_the_same_pairs(tmp_path):
    calls = []

    def answers(questions, count, fails=False):
        if fails and len(calls) >= 2:
            raise KeyboardInterrupt
        calls.append(list(questions))
        draw = lambda question: random.Random(question).choices("12", k=count)
        return [draw(question) for question in questions]

    def run(fn, name):
        scorer = ConfidenceScorer(resumable(fn, tmp_path / name, settings=["m"], batch_size=3), 5)
        return factual_pairs(samples, score_responses(samples, EXTRACT, scorer))

    texts = ["a 1 b 1", "b 2 c 1", "c 3", "d 1 a 1"]
    samples = [sample(f"s{i}", *texts) for i in range(3)]
    whole = run(answers, "whole")
    assert sum(map(len, calls)) == 12
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(lambda *args: answers(*args, fails=True), "part")
    with (tmp_path / "part").open("a") as file:
        file.write('["incomplete')
    assert run(answers, "part") == whole
    flat = [question for call in calls for question in call]
    assert len(flat) == len(set(flat)) == 12
    assert run(lambda *_: pytest.fail("all are kept"), "part") == whole


def test_kept_results_belong_to_their_settings(tmp_path):
    path = tmp_path / "kept"
    upper = lambda texts, *args: [text.upper() + "".join(args) for text in texts]
    assert resumable(upper, path)(["a", "b", "a"]) == ["A", "B", "A"]
    assert resumable(upper, path)(["a"], "!") == ["A!"]
    assert resumable(lambda texts: ["other"], path)(["a"]) == ["A"]
    assert resumable(lambda texts: ["other"], path, settings=1)(["a"]) == ["other"]
    assert len(list(map(json.loads, path.read_text().splitlines()))) == 4
    with pytest.raises(ValueError, match="0 results for 1 texts"):
        resumable(lambda texts: [], path)(["new"])
    path.write_text("not a file of results\n")
    with pytest.raises(ValueError, match="is not a file of kept results"):
        resumable(upper, path)
