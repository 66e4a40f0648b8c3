"""LexRank against worked numbers, the package `lexrank` and its own rules."""

import math

import numpy as np
import pytest

from jaxft.data.selection import (
    Idf,
    idf_modified_cosine,
    inverse_document_frequencies,
    lexrank_scores,
    select_sentences,
    sentence_words,
    split_sentences,
    within_budget,
)

CHAIN = np.array([[1, 0.5, 0], [0.5, 1, 0.25], [0, 0.25, 1]])
FLAT = Idf({}, 1.0)  # each word has idf 1
count = lambda sentence: len(sentence.split())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (0.3258099, 0.3754647, 0.2987254)),
        ({"threshold": 0.1}, (0.2919708, 0.4160584, 0.2919708)),
        ({"damping": 0.0}, (1.5 / 4.5, 1.75 / 4.5, 1.25 / 4.5)),  # sums of rows / total
        ({"damping": 1.0}, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_scores_of_a_chain_of_three(options, expected):
    scores = lexrank_scores(CHAIN, **options, tolerance=1e-12)
    np.testing.assert_allclose(scores, expected, atol=1e-7)
    # The stationary distribution by a linear solve, which an iteration cannot stop short of.
    d = options.get("damping", 0.15)
    weights = CHAIN if "threshold" not in options else (CHAIN > 0.1) * 1.0
    step = (1 - d) * (weights / weights.sum(axis=1, keepdims=True)).T + d / 3
    np.testing.assert_allclose(step @ scores, scores, atol=1e-9)


def test_damping_0_needs_a_connected_graph():
    with pytest.raises(ValueError, match="not connected"):
        lexrank_scores(np.eye(3), damping=0.0)
    with pytest.raises(ValueError, match="not connected"):
        lexrank_scores(CHAIN, threshold=0.3, damping=0.0)
    np.testing.assert_allclose(lexrank_scores(np.eye(3)), [1 / 3] * 3)


def test_similarity_is_the_formula():
    idf = inverse_document_frequencies(["a b c", "b c d", "c c"])
    assert idf.weights == {w: math.log(3 / n) for w, n in zip("abcd", (1, 2, 3, 1), strict=True)}
    found = idf_modified_cosine(["a a b", "B x", "c", "a"], idf)
    a, b, x = math.log(3), math.log(1.5), math.log(3)  # x is in no text
    first = b * b / (math.hypot(2 * a, b) * math.hypot(b, x))
    np.testing.assert_allclose(found[0], [1, first, 0, 2 * a / math.hypot(2 * a, b)])
    np.testing.assert_allclose(found[2], [0, 0, 1, 0])  # c is in all texts: idf 0
    np.testing.assert_allclose(found, found.T)


@pytest.mark.parametrize(
    "threshold, expected",
    [
        (None, (0.2219697, 0.2184878, 0.1554652, 0.2266530, 0.1774244)),
        (0.03, (0.2352941, 0.1764706, 0.1176471, 0.2941176, 0.1764706)),
    ],
)
def test_scores_are_those_of_the_package_lexrank(threshold, expected):
    # lexrank 0.1.0: `rank_sentences` divided by 5, with `sentence_words` as its tokens and these texts.
    texts = (
        "A pump lifts water. The water is cold.",
        "The oil is hot. A pump may lift oil.",
        "Birds sang at night.",
        "The night was cold and the pump was loud.",
    )
    sentences = (
        "The pump lifts cold water.",
        "A pump lifts the oil.",
        "Birds sang at night.",
        "The oil is a pump at night.",
        "Cold water is loud, loud water is cold.",
    )
    found = idf_modified_cosine(sentences, inverse_document_frequencies(texts))
    np.testing.assert_allclose(found[0], (1, 0.464927, 0, 0.033461, 0.517240), atol=1e-6)
    scores = lexrank_scores(found, threshold, 0.0, tolerance=1e-12)
    np.testing.assert_allclose(scores, expected, atol=1e-7)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four.", ["One.", "Two!", "Three?", "Four."]),
        ("FIG. 1 shows a pump. See FIGS. 2 and 3.", ["FIG. 1 shows a pump.", "See FIGS. 2 and 3."]),
        ("Fluids, e.g. Freon, boil. Oil does not.", ["Fluids, e.g. Freon, boil.", "Oil does not."]),
        ("1. A device of steel. 2. The device of claim 1.",
         ["1. A device of steel.", "2. The device of claim 1."]),
        ("See U.S. Pat. No. 5,123,456. It leaks.", ["See U.S. Pat. No. 5,123,456.", "It leaks."]),
        ("Sold in the U.S. The rest is not.", ["Sold in the U.S.", "The rest is not."]),
        ("Smith et al. Nature. J. Smith left.", ["Smith et al. Nature.", "J. Smith left."]),
        ("A gap of 0.5 mm. (The other is 3.) So.", ["A gap of 0.5 mm.", "(The other is 3.)", "So."]),
        ("Is it? No. The pump runs.", ["Is it?", "No.", "The pump runs."]),
        ("TITLE\n\nThe pump\nruns", ["TITLE", "The pump runs"]),
        ('He said "stop." Then it stopped.', ['He said "stop."', "Then it stopped."]),
        (" \n ", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert split_sentences(text) == expected
    assert " ".join(expected).split() == text.split()


def test_words_are_lower_case_with_their_hyphens():
    assert sentence_words("The X-ray's Tube, 3 mm; süß.") == [
        "the",
        "x-ray's",
        "tube",
        "3",
        "mm",
        "süß",
    ]


def test_sentences_fill_a_budget_in_document_order():
    lengths = [4, 3, 5, 2]
    assert within_budget(np.array([0.1, 0.4, 0.2, 0.3]), lengths, 9) == [0, 1, 3]  # 2 does not fit
    assert within_budget(np.zeros(4), lengths, 9) == [0, 1, 3]  # the beginning, then what fits
    same = np.eye(4)
    same[1, 3] = same[3, 1] = 0.95
    assert within_budget(np.array([0.1, 0.4, 0.2, 0.3]), lengths, 9, same) == [1, 2]
    assert within_budget(np.zeros(4), lengths, 1) == []


def test_central_sentences_are_selected():
    text = "The rain fell. The pump lifts water. A pump lifts the oil. The birds sang. The oil is in it."
    assert select_sentences(text, FLAT, 9, count) == split_sentences(text)[1:3]
    assert select_sentences(text, FLAT, 99, count) == split_sentences(text)
    assert select_sentences("One sentence only", FLAT, 3, count) == ["One sentence only"]
    with pytest.warns(UserWarning, match="cut to 2"):
        assert select_sentences("One sentence only", FLAT, 2, count) == ["One sentence"]
    for bad in (("", 5), ("A text.", 0)):
        with pytest.raises(ValueError, match="expected at least one of each"):
            select_sentences(bad[0], FLAT, bad[1], count)


@pytest.mark.parametrize(
    "matrix, options, message",
    [
        (np.ones((2, 3)), {}, r"\(2, 3\); expected \[n, n\]"),
        (np.ones((0, 0)), {}, "n >= 1"),
        (np.eye(2), {"damping": 1.5}, "damping must lie in 0..1, got 1.5"),
        (np.eye(2), {"threshold": 2.0}, "one above the threshold in each row"),
        (np.array([[1, -0.1], [-0.1, 1]]), {}, "entries of at least 0"),
    ],
)
def test_bad_matrices_are_refused(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        lexrank_scores(matrix, **options)
