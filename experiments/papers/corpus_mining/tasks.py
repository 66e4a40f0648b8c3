"""A translation task of corpus_mining: a model with data of two domains, one of them mined.

`toy` makes the toy language pair with a small model; `full.py` reads a model and text files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.worlds import parallel_texts as texts
from jaxft import data
from jaxft.generation import Beams, SamplingConfig, beam_search
from jaxft.models import EncoderDecoder, EncoderDecoderConfig, StackConfig

DOMAINS = {"out": (1, 0), "in": (0, 1), "both": (1, 1)}
LONGEST = 31  # words of a sentence of the toy languages; pairs with longer ones are left out
END, START = 1, 2  # after 0, the padding


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
    mesh: Any = None
    microbatches: int = 1


def toy(config: Any, seed: int) -> Task:
    """Returns the toy language pair: `pairs` out-of-domain pairs, `mined` in-domain ones with noise."""
    language, rng = texts.Language(), np.random.default_rng(seed)
    join = lambda sentence: [" ".join(sum((c[i] for c in sentence), [])) for i in (0, 1)]
    drawn = lambda count, domain: [
        tuple(join(language.sentence(rng, domain))) for _ in range(count)
    ]
    outside = drawn(config.pairs, 0)
    inside, mined = texts.mined_pairs(language, rng, config.mined, config.error, LONGEST)
    known = set(inside)
    clean = [pair for pair in drawn(config.dev + config.held_out + 50, 1) if pair not in known]
    words = [word for side in language.vocabulary() for word in side]
    ids = {word: i for i, word in enumerate(["", "END", "START", *words])}
    model = encoder_decoder(len(ids), config.width, config.layers)
    encode = lambda text: [ids[word] for word in text.split()]
    parts = [[tokenised(encode(a), encode(b)) for a, b in pairs] for pairs in (outside, inside)]

    def batches(domain, seed):
        return mixed(parts, domain, config.batch_size, config.max_length, seed)

    names = list(ids)
    rules = SamplingConfig(LONGEST + 1, temperature=0.0, stop_ids=(END,))

    def translate(params, sentences, beams):
        prompts = [[*encode(text), END] for text in sentences]
        found = beam_search(model, params, prompts, Beams(beams), rules)
        lines = ([names[i] for i in row if i > START] for row in found.completions)
        return [texts.surface(" ".join(line)) for line in lines]

    pairs = [(source, texts.surface(target)) for source, target in clean]
    dev, test = pairs[: config.dev], pairs[config.dev : config.dev + config.held_out]
    return Task(model.forward, initial(model, seed), batches, translate, dev, test, mined)


@functools.cache
def encoder_decoder(vocabulary: int, width: int, layers: int) -> EncoderDecoder:
    """Returns a model of Marian's kind, with norms before the sublayers: it needs no long warm-up."""
    stack = StackConfig(
        hidden_size=width, intermediate_size=2 * width, num_layers=layers, num_heads=4,
        head_dim=width // 4, activation="relu", pre_norm=True,
    )  # fmt: skip
    return EncoderDecoder(
        EncoderDecoderConfig(
            vocab_size=vocabulary, encoder=stack, decoder=stack, positions="sinusoidal", max_length=128,
            embedding_scale=width**0.5, final_norm=True, family="marian", start=START,
        )
    )  # fmt: skip


def initial(model: EncoderDecoder, seed: int) -> Any:
    """Returns params with standard deviation inputs^-1/2 for kernels, and width^-1/2 for embeddings.

    The usual 0.02 is for widths of several hundred.
    """
    params = jax.jit(model.init)(jax.random.key(seed), model.example_input())["params"]

    def rescale(path, x):
        inputs = {"kernel": x.shape[0], "embedding": x.shape[-1]}.get(path[-1].key)
        return x if inputs is None else x * (inputs**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(rescale, params)


def tokenised(source: Sequence[int], target: Sequence[int]) -> data.Tokenised:
    """Returns a pair as a record: source and END for the encoder; START, target and END for the decoder."""
    tokens = np.array([START, *target, END], np.int32)
    trains = (np.arange(len(tokens)) > 0).astype(np.float32)
    return data.Tokenised(tokens, trains, source=np.array([*source, END], np.int32))


def mixed(
    parts: Sequence[Sequence[data.Tokenised]], domain: str, batch_size: int, length: int, seed: int
) -> Iterator[dict]:
    """Returns endless packed batches of (out-of-domain, in-domain) records.

    Both domains have the same weight in a mixture: the smaller is oversampled by the ratio of their sizes.
    """
    used = [part for part, used in zip(parts, DOMAINS[domain], strict=True) if used]
    weights = data.temperature_weights(list(map(len, used)), np.inf)
    return data.batches(*used, batch_size=batch_size, max_length=length, weights=weights, seed=seed)
