"""Noises of denoising pretraining: what they keep exactly, and their distributions by closed forms."""

import collections
import functools
import math
import pickle
import types

import numpy as np
import pytest

from jaxft import data
from jaxft.data.denoising import _poisson_spans

SENTINELS = tuple(range(999, 899, -1))
MASK = 77_777
RNG = np.random.default_rng
DENSITIES = [(0.15, 3.0), (0.5, 1.0), (0.5, 4.5), (0.9, 2.0), (0.02, 20.0)]


def expanded(source, target):
    """The text: each sentinel of the source replaced by what follows it in the target."""
    spans, text = {}, []
    for token in target:
        if token in SENTINELS:
            spans[token] = current = []
        else:
            current.append(token)
    for token in source:
        text += spans.pop(token) if token in SENTINELS else [token]
    assert not spans
    return text


@pytest.mark.parametrize("density, mean", DENSITIES)
def test_a_target_fills_the_spans_of_its_source(density, mean):
    noise = data.span_corruption(SENTINELS, density=density, mean_length=mean)
    for length in (1, 2, 3, 5, 8, 30, 97):
        for row in range(20):
            text = RNG(row).integers(0, 50, length)
            out = data.denoise(noise, 4, row, text)
            source, target = (out[name].tolist() for name in ("source", "target"))
            assert expanded(source, target) == text.tolist()
            used = [token for token in source if token in SENTINELS]
            assert tuple(used) == SENTINELS[: len(used)]
            assert [token for token in target if token in SENTINELS] == used
            sizes = data.corrupted_lengths(length, density=density, mean_length=mean)
            assert sizes == (len(source), len(target))
            if length > 1:
                # T5's formula, with at most one span for each token that stays.
                number = min(max(round(length * density), 1), length - 1)
                spans = min(max(round(number / mean), 1), length - number)
                assert (len(used), len(target)) == (spans, number + spans)
                assert source[0] == text[0] and source[-1] == used[-1]


def test_lengths_are_those_of_t5():
    """Its random_spans_helper: 568 tokens of text for 512 of source and 114 of target, ends included."""
    assert data.longest_text(512 - 1) == 568
    assert data.corrupted_lengths(568) == (511, 113)


def test_every_division_into_spans_is_equally_likely():
    draw = lambda i: data.noise_mask(RNG((0, i)), 7, density=0.45, mean_length=1.5).tobytes()
    counts = collections.Counter(map(draw, range(3000)))
    assert len(counts) == math.comb(2, 1) * math.comb(3, 1)  # 3 tokens and 4, in 2 spans each
    expected = 3000 / len(counts)
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("density, mean", [(0.3, 3.0), (0.15, 0.5), (0.9, 10.0)])
def test_infilling_masks_exactly_its_share_and_keeps_the_order(density, mean):
    noise = data.text_infilling(MASK, density=density, mean_length=mean)
    inserted = 0
    for length in (1, 2, 7, 40):
        for row in range(40):
            text = np.arange(length)
            out = data.denoise(noise, 1, row, text)
            source = out["source"]
            assert out["target"].tolist() == text.tolist()
            kept = source[source != MASK]
            assert (np.diff(kept) > 0).all()
            assert len(kept) == length - math.ceil(density * length)
            # A mask between neighbours of the text stands for no token.
            between = np.flatnonzero(source[1:-1] == MASK) + 1
            inserted += np.sum(source[between + 1] - source[between - 1] == 1)
    assert inserted > 0


def test_lengths_of_spans_are_poisson():
    total, mean, draws = 30, 3.0, 400
    rows = [_poisson_spans(RNG((2, i)), total, mean) for i in range(draws)]
    assert all(row.sum() == total and row[-1] > 0 for row in rows)
    # Wald's identity and Lorden's bound of the overshoot: total / λ <= E[count] <= (total + λ + 1) / λ.
    counts = np.array([len(row) for row in rows])
    error = 4 * counts.std() / math.sqrt(draws)
    assert total / mean - error < counts.mean() < (total + mean + 1) / mean + error
    first = np.concatenate([row[:5] for row in rows])  # far from the last, which is cut
    for k in (0, 1, 3):
        p = math.exp(-mean) * mean**k / math.factorial(k)
        assert abs(np.mean(first == k) - p) < 4 * math.sqrt(p * (1 - p) / len(first))


def test_sentences_change_places_and_stay_whole():
    dot, what = 1, 2
    text = np.array([10, 11, dot, 20, dot, what, 30, 31])
    sentences = [(10, 11, dot), (20, dot, what), (30, 31)]
    seen = collections.Counter()
    for i in range(600):
        seen[tuple(data.permute_sentences(RNG((3, i)), text, (dot, what)).tolist())] += 1
    orders = [(a, b, c) for a in sentences for b in sentences for c in sentences]
    wanted = {sum(order, ()) for order in orders if len(set(order)) == 3}
    assert set(seen) == wanted and max(seen.values()) < 150 and min(seen.values()) > 60
    noise = data.text_infilling(MASK, density=0.01, ends=(dot, what))
    out = data.denoise(noise, 0, 0, text)
    assert out["target"].tolist() == text.tolist() and len(out["source"]) >= len(text)
    heads = {tuple(data.denoise(noise, 0, i, text)["source"][:2]) for i in range(30)}
    assert {(20, dot), (30, 31)} < heads


def test_masked_tokens_are_berts():
    special, rows = (101, 102), 400
    kinds, chosen = collections.Counter(), 0
    for row in range(rows):
        tokens = np.array([101, *range(1000, 1040), 102])
        out = data.mask_tokens(RNG((5, row)), tokens, MASK, 5000, special=special)
        assert (out["targets"] == tokens).all()
        where = np.flatnonzero(out["loss_mask"])
        assert len(where) == 6 and 0 not in where and 41 not in where  # 15 % of 40
        assert (out["tokens"] == tokens)[out["loss_mask"] == 0].all()
        changed = out["tokens"][where]
        kinds["mask"] += np.sum(changed == MASK)
        kinds["same"] += np.sum(changed == tokens[where])
        kinds["random"] += np.sum((changed != MASK) & (changed != tokens[where]))
        chosen += len(where)
    for kind, share in (("mask", 0.8), ("same", 0.1), ("random", 0.1)):
        assert abs(kinds[kind] / chosen - share) < 4 * math.sqrt(share * (1 - share) / chosen)
    assert data.mask_tokens(RNG(0), [101, 102], MASK, 50, special=special)["loss_mask"].sum() == 0


@pytest.mark.parametrize("make", [
    functools.partial(data.span_corruption, SENTINELS), functools.partial(data.text_infilling, MASK),
])  # fmt: skip
def test_draws_depend_on_the_seed_and_the_row_alone(make):
    text = np.arange(40)
    run = lambda noise, seed, row: data.denoise(noise, seed, row, text)["source"].tolist()
    first = [run(make(), 7, row) for row in range(6)]
    again = pickle.loads(pickle.dumps(make()))  # as another process gets it
    assert [run(again, 7, row) for row in reversed(range(6))] == first[::-1]
    assert len({*map(tuple, first)}) > 3 and [run(make(), 8, row) for row in range(6)] != first


def test_sentinels_of_a_tokenizer():
    of = lambda vocabulary: types.SimpleNamespace(get_vocab=lambda: vocabulary)
    found = data.sentinel_ids(of({"a": 0, "<extra_id_1>": 8, "<extra_id_0>": 9, "<extra_id_3>": 1}))
    assert found == (9, 8)
    with pytest.raises(ValueError, match="no <extra_id_0>"):
        data.sentinel_ids(of({"a": 0}))


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda: data.span_corruption(SENTINELS, density=1.0), "density must lie in .0, 1., got 1"),
        (lambda: data.span_corruption(SENTINELS, mean_length=0.5), "at least 1, got 0.5"),
        (lambda: data.text_infilling(MASK, density=0.0), "density must lie in .0, 1., got 0"),
        (lambda: data.text_infilling(MASK, mean_length=0.0), "must be positive, got 0"),
        (lambda: data.mask_tokens(RNG(0), [1], 2, 3, density=2.0), "density must lie in"),
        (lambda: data.denoise(data.text_infilling(MASK), 0, 5, []), "row 5 has no tokens"),
        (lambda: data.denoise(data.text_infilling(MASK), -1, 0, [1]), "at least 0, got -1 and 0"),
        (lambda: data.denoise(data.span_corruption((9,)), 0, 0, range(10, 90)),
         "80 tokens have 4 spans, but there are 1 sentinels"),
        (lambda: data.denoise(data.span_corruption((9,)), 0, 0, [1, 9]), "has sentinels itself"),
    ],
)  # fmt: skip
def test_wrong_noises_are_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()
