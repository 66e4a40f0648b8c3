import math
import random

import numpy as np
import pytest

from jaxft.data.selection import best_passages, bm25_scores


def test_bm25_is_the_formula_word_by_word():
    rng = random.Random(0)
    for _ in range(20):
        texts = [" ".join(rng.choices("abcdef", k=rng.randint(1, 8))) for _ in range(5)]
        query, k1, b = rng.choices("abcdz", k=4), rng.random() * 2, rng.random()
        words = [text.split() for text in texts]
        mean = sum(map(len, words)) / 5
        expected = []
        for text in words:
            score = 0.0
            for w in query:
                n = sum(w in other for other in words)
                tf = text.count(w)
                part = tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(text) / mean)) if tf else 0
                score += math.log(1 + (5 - n + 0.5) / (n + 0.5)) * part
            expected.append(score)
        np.testing.assert_allclose(bm25_scores(" ".join(query), texts, k1=k1, b=b), expected)


def test_best_passages():
    texts = ["the cat", "the dog barks", "a bird"]
    assert best_passages("Which dog?", texts, 2) == ["the dog barks", "the cat"]
    assert best_passages("dog", [], 2) == [] and bm25_scores("dog", ["", "cat"]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="k1 must be at least 0"):
        bm25_scores("a", texts, b=1.5)
