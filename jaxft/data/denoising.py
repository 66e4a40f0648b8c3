"""Denoising pretraining: a corrupted source, and the target from which it came.

A noise is a function (rng, tokens) -> {"source", "target"} of one row: `span_corruption` (T5) and
`text_infilling` (BART), both for encoder-decoders. `denoise(noise, seed, row, tokens)` applies it with draws
that depend only on the seed and the number of the row, so that neither resuming nor the number of worker
processes changes them. `mask_tokens` (BERT) is for encoders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

Columns = dict[str, np.ndarray]
Noise = Callable[[np.random.Generator, np.ndarray], Columns]


def denoise(noise: Noise, seed: int, row: int, tokens: Sequence[int]) -> Columns:
    """noise(rng, tokens) with a generator of (seed, row): {"source", "target"}, int32 ids each.

    Args:
        noise: `span_corruption(...)`, `text_infilling(...)`, or a function of your own.
        row: number of the row in the order of the run, from 0. If it continues to count when the data are
            read again, each epoch has its own noise.
        tokens: ids of one text, without begin and end tokens.

    Raises:
        ValueError: for no tokens, or a negative seed or row.
    """
    if not len(tokens):
        raise ValueError(f"denoise: row {row} has no tokens; leave out empty texts.")
    if seed < 0 or row < 0:
        raise ValueError(f"denoise: seed and row must be at least 0, got {seed} and {row}.")
    return noise(np.random.default_rng((seed, row)), np.asarray(tokens, np.int32))


def span_corruption(
    sentinels: Sequence[int], *, density: float = 0.15, mean_length: float = 3.0
) -> Noise:
    """Returns the noise of T5: each span of `noise_mask` is one sentinel in the source.

    "a b c d e" with spans "b c" and "e": source "a S0 d S1", target "S0 b c S1 e". Raffel et al., 2019,
    arxiv.org/abs/1910.10683, section 3.1.4, as in their code: no last sentinel, and the caller appends the
    end token to both. A text of one token stays, and its target is empty.

    Args:
        sentinels: ids in the order of use, such as `sentinel_ids(tokenizer)`.
        density: share of tokens in spans, in (0, 1).
        mean_length: mean tokens of a span, at least 1.

    Raises:
        ValueError: for settings out of range; in the noise, for a row with more spans than sentinels, or
            that has a sentinel itself.
    """
    _check(density, mean_length)
    sentinels = np.asarray(sentinels, np.int32)
    return functools.partial(_corrupted, sentinels, density, mean_length)


def _corrupted(sentinels, density, mean_length, rng, tokens):
    mask = noise_mask(rng, len(tokens), density=density, mean_length=mean_length)
    begins = mask & ~np.insert(mask[:-1], 0, False)
    count = int(begins.sum())
    if count > len(sentinels):
        raise ValueError(
            f"span_corruption: {len(tokens)} tokens have {count} spans, but there are {len(sentinels)} "
            "sentinels; shorten rows, lower the density or lengthen spans."
        )
    if np.isin(tokens, sentinels).any():
        raise ValueError(
            "span_corruption: the text has sentinels itself, so that the target would be ambiguous; "
            "remove them."
        )
    marked = tokens.copy()
    marked[begins] = sentinels[:count]
    places = (np.cumsum(mask) - 1)[begins]  # of the spans among the tokens of noise
    return {
        "source": marked[~mask | begins],
        "target": np.insert(tokens[mask], places, sentinels[:count]),
    }


def sentinel_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids of a T5 tokenizer's `<extra_id_0>`, `<extra_id_1>`, ..., which descend.

    Raises:
        ValueError: if the tokenizer has none.
    """
    vocabulary, found = tokenizer.get_vocab(), []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    if not found:
        raise ValueError(
            "span corruption: the tokenizer has no <extra_id_0>, which T5's have; pass the ids of unused "
            "tokens as sentinels."
        )
    return tuple(found)


def noise_mask(
    rng: np.random.Generator, length: int, *, density: float = 0.15, mean_length: float = 3.0
) -> np.ndarray:
    """[length] bool: True in spans of noise, all divisions of tokens into spans equally likely.

    `random_spans_noise_mask` of T5's code: round(length · density) tokens, but 1 to length - 1, in
    round(tokens / mean_length) spans, at least 1; spans of text and of noise alternate, text is the first and
    noise the last. A text of one token has no noise. Departure: there are at most as many spans of noise as
    tokens of text, since T5's code merges spans if there are more.
    """
    _check(density, mean_length)
    if length < 2:
        return np.zeros(length, bool)
    noise, spans = _counts(length, density, mean_length)
    sizes = np.stack([_division(rng, length - noise, spans), _division(rng, noise, spans)], axis=1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, sizes.reshape(-1))


def corrupted_lengths(
    length: int, *, density: float = 0.15, mean_length: float = 3.0
) -> tuple[int, int]:
    """(tokens of the source, tokens of the target) of a text of `length`, without end tokens."""
    if length < 2:
        return length, 0
    noise, spans = _counts(length, density, mean_length)
    return length - noise + spans, noise + spans


def longest_text(source: int, *, density: float = 0.15, mean_length: float = 3.0) -> int:
    """The most tokens of a text whose source has at most `source` tokens, without the end token.

    T5's `random_spans_helper`: sources of 512 tokens with their end token come from texts of 568, and have
    targets of 114 with theirs.
    """
    _check(density, mean_length)
    length = source
    while corrupted_lengths(length + 1, density=density, mean_length=mean_length)[0] <= source:
        length += 1
    return length


def text_infilling(
    mask: int,
    *,
    density: float = 0.3,
    mean_length: float = 3.0,
    ends: Collection[int] = (),
) -> Noise:
    """Returns the noise of BART: each span, of Poisson length, is one mask token in the source.

    The target is the text. Lewis et al., 2019, arxiv.org/abs/1910.13461, sections 2.2 and 5.1. Lengths are
    drawn until they cover ceil(density · length) tokens; the last is cut to that, and a span of length 0 is
    an inserted mask token. All orders of spans and other tokens are equally likely. Departure from fairseq's
    code, where spans that overlap become one: here none overlap, and the number of masked tokens is exact.

    Args:
        mask: id of the mask token.
        density: share of tokens in spans, in (0, 1).
        mean_length: λ of the Poisson distribution, positive.
        ends: ids of tokens that end a sentence; sentences are shuffled first. (): they are not.

    Raises:
        ValueError: for settings out of range.
    """
    if not 0 < density < 1:
        raise ValueError(f"text_infilling: density must lie in (0, 1), got {density}.")
    if not 0 < mean_length < math.inf:
        raise ValueError(f"text_infilling: mean_length must be positive, got {mean_length}.")
    return functools.partial(_infilled, mask, density, mean_length, tuple(ends))


def _infilled(mask, density, mean_length, ends, rng, tokens):
    text = permute_sentences(rng, tokens, ends) if ends else tokens
    lengths = rng.permutation(_poisson_spans(rng, math.ceil(density * len(text)), mean_length))
    kept = len(text) - int(lengths.sum())
    spans = rng.permutation(np.arange(kept + len(lengths)) < len(lengths))
    # How many tokens of the text each token of the source stands for.
    sizes = np.ones(len(spans), np.int64)
    sizes[spans] = lengths
    places = np.minimum(np.cumsum(sizes) - sizes, len(text) - 1)
    return {"source": np.where(spans, mask, text[places]).astype(np.int32), "target": tokens}


def _poisson_spans(rng, total, mean_length):
    """Lengths, of which the sum is `total`: Poisson draws, the last cut."""
    found = np.zeros(0, np.int64)
    while found.sum() < total:
        found = np.concatenate([found, rng.poisson(mean_length, total)])
    sums = np.cumsum(found)
    count = int(np.argmax(sums >= total)) + 1
    found = found[:count]
    found[-1] -= sums[count - 1] - total
    return found


def permute_sentences(
    rng: np.random.Generator, tokens: np.ndarray, ends: Collection[int]
) -> np.ndarray:
    """The tokens with their sentences in a random order; the rest after the last end is a sentence.

    Lewis et al., 2019, arxiv.org/abs/1910.13461, section 2.2. Several ends in a row, such as "?!", end one
    sentence.
    """
    final = np.isin(tokens, list(ends))
    last = final & ~np.append(final[1:], False)
    sentences = np.split(tokens, np.flatnonzero(last) + 1)
    sentences = [part for part in sentences if len(part)]
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def mask_tokens(
    rng: np.random.Generator,
    tokens: Sequence[int],
    mask: int,
    vocab_size: int,
    *,
    density: float = 0.15,
    special: Collection[int] = (),
) -> Columns:
    """The noise of BERT: {"tokens", "targets", "loss_mask"} [T] for a model that predicts tokens in place.

    round(density · length) tokens, at least 1, are chosen; of these each becomes the mask token with
    probability 0.8, a random token with 0.1, and stays with 0.1. `targets` are the tokens themselves, and
    `loss_mask` is 1 where one was chosen. Devlin et al., 2018, arxiv.org/abs/1810.04805, section 3.1.

    Args:
        special: ids that are never chosen, and do not count: begin, end, padding.
    """
    if not 0 < density < 1:
        raise ValueError(f"mask_tokens: density must lie in (0, 1), got {density}.")
    tokens = np.asarray(tokens, np.int32)
    words = np.flatnonzero(~np.isin(tokens, list(special)))
    count = min(max(round(density * len(words)), 1), len(words))
    chosen = rng.choice(words, count, replace=False)
    kind, random = rng.random(count), rng.integers(0, vocab_size, count)
    changed, loss_mask = tokens.copy(), np.zeros(len(tokens), np.float32)
    changed[chosen] = np.where(kind < 0.8, mask, np.where(kind < 0.9, random, tokens[chosen]))
    loss_mask[chosen] = 1.0
    return {"tokens": changed, "targets": tokens, "loss_mask": loss_mask}


def _counts(length, density, mean_length):
    """(tokens, spans) of noise in a text."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean_length), 1)
    return noise, min(spans, length - noise)


def _division(rng, items, parts):
    """[parts] positive integers whose sum is `items`; all are equally likely."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def _check(density, mean_length):
    if not 0 < density < 1:
        raise ValueError(f"span corruption: density must lie in (0, 1), got {density}.")
    if not 1 <= mean_length < math.inf:
        raise ValueError(f"span corruption: mean_length must be at least 1, got {mean_length}.")
