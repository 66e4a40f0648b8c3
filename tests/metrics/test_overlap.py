"""Metrics of summaries against worked numbers, slow loops and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.metrics import (
    bert_score,
    copied,
    meteor,
    novel_ngrams,
    overlap,
    paired_bootstrap,
    rouge,
    wilson_interval,
)

MAT = "the cat sat on the mat"


def test_rouge_of_the_cat_on_the_mat():
    found = rouge(["the cat on the mat", MAT, "", "cats sitting"], [MAT, MAT, MAT, "the cat sits"])
    np.testing.assert_allclose(found["rouge1"][0], (1, 5 / 6, 10 / 11), rtol=1e-6)
    np.testing.assert_allclose(found["rouge2"][0], (0.75, 0.6, 2 / 3), rtol=1e-6)
    np.testing.assert_allclose(found["rougeL"][0], (1, 5 / 6, 10 / 11), rtol=1e-6)
    for kind in found.values():
        np.testing.assert_array_equal(kind[1:3], [(1, 1, 1), (0, 0, 0)])
    np.testing.assert_allclose(found["rouge1"][3], (1, 2 / 3, 0.8))  # by stems
    assert rouge([], [])["rougeL"].shape == (0, 3)
    with pytest.raises(ValueError, match="1 candidates and 2 references"):
        rouge([MAT], [MAT, MAT])


def test_meteor_by_hand():
    # All five words match in two chunks: P = 1, R = 5/6, F = P R / (0.9 P + 0.1 R), less 0.5 (2/5)^3.
    f = (5 / 6) / (0.9 + 0.1 * 5 / 6)
    expected = [f * (1 - 0.5 * (2 / 5) ** 3), 1 - 0.5 * (1 / 6) ** 3, 0.0]
    # "cats" matches by its stem: P = 1/2, R = 1, one chunk of one word.
    expected.append(0.5 / (0.9 * 0.5 + 0.1) * 0.5)
    candidates = ["the cat on the mat", MAT, "dogs bark", "cats bark"]
    references = [MAT.split()] * 3 + [["cat"]]
    np.testing.assert_allclose(meteor([c.split() for c in candidates], references), expected)


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="needs none_such: pip install"):
        overlap._module("none_such.part")


def test_bert_score_is_the_slow_loop():
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = jax.random.normal(keys[0], (2, 4, 3)), jax.random.normal(keys[1], (2, 5, 3))
    wx = jnp.array([[1.0, 2.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    wy = jnp.array([[1.0, 1.0, 3.0, 0.0, 0.0], [0.2, 1.0, 1.0, 1.0, 0.5]])
    found = jax.jit(bert_score)(x, y, wx, wy)
    cosine = lambda a, b: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for b in range(2):
        tokens = lambda v, w, b=b: [
            (np.asarray(v[b, i]), float(w[b, i])) for i in range(len(w[b])) if w[b, i]
        ]
        mine, theirs = tokens(x, wx), tokens(y, wy)
        mean = lambda xs, ys: (
            sum(w * max(cosine(v, u) for u, _ in ys) for v, w in xs) / sum(w for _, w in xs)
        )
        p, r = mean(mine, theirs), mean(theirs, mine)
        np.testing.assert_allclose([a[b] for a in found], [p, r, 2 * p * r / (p + r)], rtol=1e-5)


def test_bert_score_of_the_same_tokens_is_1_in_any_order_and_of_nothing_0():
    x = jax.random.normal(jax.random.key(1), (1, 6, 4))
    ones, none = jnp.ones((1, 6)), jnp.zeros((1, 6))
    for other in (x, x[:, ::-1]):  # ROUGE-2 of reversed words is 0
        np.testing.assert_allclose(jnp.stack(bert_score(x, other, ones, ones)), 1.0, rtol=1e-6)
    for weights in ((none, ones), (ones, none), (none, none)):
        np.testing.assert_array_equal(jnp.stack(bert_score(x, x, *weights)), 0.0)
    words = MAT.split()
    assert rouge([" ".join(words[::-1])], [MAT])["rouge2"][0, 2] == 0


def test_what_is_novel_and_what_is_copied():
    source = "a b c d e a b x".split()
    assert novel_ngrams("a b c".split(), source, 2) == 0
    assert novel_ngrams("a c d z".split(), source, 2) == 2 / 3
    assert np.isnan(novel_ngrams(["a"], source, 2))
    # Fragments "a b x" (the longer of two beginnings), "c", then z is new: 4 of 5 words, 9 + 1.
    assert copied("a b x c z".split(), source) == (0.8, 2.0)
    assert copied(source, source) == (1, 8)
    assert copied(["z"], source) == (0, 0) and np.isnan(copied([], source)).all()


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.normal(size=400)
    gap, low, high = paired_bootstrap(base + rng.normal(0.3, 1, 400), base, samples=4000)
    half = 1.96 / 20  # of the mean of 400 normals
    np.testing.assert_allclose([gap - low, high - gap], half, rtol=0.12)
    assert paired_bootstrap(base + 1, base) == (pytest.approx(1),) * 3
    assert paired_bootstrap(base, base * 2, seed=1) == paired_bootstrap(base, base * 2, seed=1)
    # Right or wrong: near Wilson's interval for many trials.
    wins = np.arange(1000) < 300
    np.testing.assert_allclose(
        paired_bootstrap(wins, np.zeros(1000), samples=4000)[1:],
        wilson_interval(300, 1000),
        atol=5e-3,
    )
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\) scores"):
        paired_bootstrap([1, 2], [1, 2, 3])
