"""A translation task of corpus_mining: a model with data of two domains, one of them mined.

`toy` makes the toy language pair with a small model; `full.py` reads a model and text files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.worlds import arithmetic
from experiments.worlds import parallel_texts as texts
from jaxft import data
from jaxft.generation import Beams, SamplingConfig, beam_search

DOMAINS = {"out": (1, 0), "in": (0, 1), "both": (1, 1)}
LONGEST = 32  # tokens of a sentence of the toy languages; longer mined ones are left out
END, TRANSLATE = 1, 2  # after 0, the padding


class Task(NamedTuple):
    """A model and what stages need."""

    forward: Callable[..., Any]
    start: Any  # params before the first stage
    batches: Callable[[str, int], Iterator[dict]]  # (domain, seed) -> endless batches
    # (params, source sentences, beams) -> translations
    translate: Callable[[Any, Sequence[str], int], list[str]]
    dev: list[tuple[str, str]]  # in-domain pairs that select checkpoints
    test: list[tuple[str, str]]
    mined: dict[str, float]  # statistics of the mining
    tokenize: str = "none"  # sacrebleu's tokenizer of the target language
    fit: dict[str, Any] = {}


def toy(config: Any, seed: int) -> Task:
    """Returns the toy language pair: `pairs` out-of-domain pairs, `mined` in-domain ones with noise."""
    language, rng = texts.Language(), np.random.default_rng(seed)
    join = lambda sentence: [" ".join(sum((c[i] for c in sentence), [])) for i in (0, 1)]
    drawn = lambda count, domain: [
        tuple(join(language.sentence(rng, domain))) for _ in range(count)
    ]
    outside = drawn(config.pairs, 0)
    inside, mined = texts.mined_pairs(language, rng, config.mined, config.error, LONGEST - 1)
    known = set(inside)
    clean = [pair for pair in drawn(config.dev + config.held_out + 50, 1) if pair not in known]
    words = [word for side in language.vocabulary() for word in side]
    ids = {word: i for i, word in enumerate(["", "END", "TRANSLATE", *words])}
    model, start = arithmetic.small_model(
        jax.random.key(seed), config.width, 2 * LONGEST + 2, len(ids), config.layers
    )
    encode = lambda text: [ids[word] for word in text.split()]
    parts = [[tokenised(encode(a), encode(b)) for a, b in pairs] for pairs in (outside, inside)]

    def batches(domain, seed):
        return mixed(parts, domain, config.batch_size, config.max_length, seed)

    names = list(ids)
    rules = SamplingConfig(LONGEST, temperature=0.0, stop_ids=(END,))

    def translate(params, sentences, beams):
        prompts = [[*encode(text), TRANSLATE] for text in sentences]
        found = beam_search(model, params, prompts, Beams(beams), rules)
        lines = ([names[i] for i in row if i > TRANSLATE] for row in found.completions)
        return [texts.surface(" ".join(line)) for line in lines]

    pairs = [(source, texts.surface(target)) for source, target in clean]
    dev, test = pairs[: config.dev], pairs[config.dev : config.dev + config.held_out]
    return Task(model.forward, start, batches, translate, dev, test, mined)


def tokenised(source: Sequence[int], target: Sequence[int]) -> data.Tokenised:
    """Returns a pair as one record: the source and TRANSLATE, then the target and END, which train."""
    tokens = [*source, TRANSLATE, *target, END]
    trains = np.arange(len(tokens)) > len(source)
    return data.Tokenised(np.array(tokens, np.int32), trains.astype(np.float32))


def mixed(
    parts: Sequence[Sequence[data.Tokenised]], domain: str, batch_size: int, length: int, seed: int
) -> Iterator[dict]:
    """Returns endless packed batches of (out-of-domain, in-domain) records.

    Both domains have the same weight in a mixture: the smaller is oversampled by the ratio of their sizes.
    """
    used = [part for part, used in zip(parts, DOMAINS[domain], strict=True) if used]
    weights = data.temperature_weights(list(map(len, used)), np.inf)
    return data.batches(*used, batch_size=batch_size, max_length=length, weights=weights, seed=seed)
