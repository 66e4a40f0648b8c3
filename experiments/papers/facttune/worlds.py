"""The worlds of facttune: what main.py needs of one, and people with attributes for a small model.

A corpus mentions each fact (person, attribute, value) as often as Zipf's law says for its rank: popular
people and common attributes often, others never. Each mention is a line of questions and answers, "e7 a2 ?
v21", and stands in a biography, "e7 : a0 v03 a2 v21": the k-th biography of a person has the attributes with
at least k mentions. One mention in ten of the rarer half of the facts has a wrong value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.worlds import toy_text as toy
from jaxft import train
from jaxft.keys import stream
from jaxft.losses import dpo_loss
from jaxft.models import Decoder
from jaxft.objectives import preference, sequence_log_probs, supervised
from jaxft.rewards import (
    ClaimExtractor,
    ConfidenceScorer,
    PatternClaimExtractor,
    ReferenceScorer,
)

ATTRIBUTES, VALUES = 6, 8  # values of each attribute, which are its own
END, ASK, BIO = range(3)
NAMES = 3 + ATTRIBUTES + ATTRIBUTES * VALUES  # id of the first person
SIZE = 2 * ATTRIBUTES + 1  # tokens of the longest biography, with END
MOST = 20  # mentions of the most popular facts
RARE, WRONG = 0.5, 0.1  # the rarer part of the facts, and the share of their mentions that is wrong
# The pattern of a claim, and what it says, asks and answers.
PATTERN = (
    r"(?P<attribute>a\d) (?P<value>v\d\d)",
    "{subject} {attribute} {value}",
    "{subject} {attribute} ?",
    "{value}",
)


class World(NamedTuple):
    """A model that writes about subjects, how claims are found and scored, and how it trains."""

    start: Any  # params of the fine-tuned model
    known: list[dict]  # records with `prompt` and `subject` whose responses are scored and paired
    held_out: list[dict]  # those of all measurements, about other subjects
    # (params, records, samples, key) -> responses to each
    respond: Callable[[Any, Sequence[dict], int, jax.Array], list[list[str]]]
    extract: ClaimExtractor
    reference: ReferenceScorer
    confidence: ConfidenceScorer
    # (start, pairs, seed, callback of states) -> params after DPO
    dpo: Callable[[Any, list[dict], int, Callable], Any]


class Facts(NamedTuple):
    """Values of the attributes of each person, and how often the corpus mentions them."""

    values: np.ndarray  # [people, ATTRIBUTES] int
    mentions: np.ndarray  # [people, ATTRIBUTES] int, from 0 to MOST
    rare: np.ndarray  # [people, ATTRIBUTES] bool


def draw(rng: np.random.Generator, people: int, rarest: float) -> Facts:
    """Draws facts; `rarest` is the expected number of mentions of the last fact in rank."""
    shape = (people, ATTRIBUTES)
    popular = (
        rng.normal(size=(people, 1)) + 0.5 * rng.normal(size=ATTRIBUTES) + rng.normal(size=shape)
    )
    rank = (1 + np.argsort(np.argsort(-popular, axis=None))).reshape(shape) / popular.size
    mentions = np.minimum(rng.poisson(rarest / rank), MOST)
    return Facts(rng.integers(0, VALUES, shape), mentions, rank > RARE)


def corpus(rng: np.random.Generator, facts: Facts) -> list[list[int]]:
    """The lines that mention facts, as ids."""
    lines = []
    for person, counts in enumerate(facts.mentions):
        for k in range(counts.max(initial=0)):
            biography = [NAMES + person, BIO]
            for attribute in np.flatnonzero(counts > k):
                value = facts.values[person, attribute]
                if facts.rare[person, attribute] and rng.random() < WRONG:
                    value = (value + rng.integers(1, VALUES)) % VALUES
                said = [3 + attribute, value_id(attribute, value)]
                biography += said
                lines.append([NAMES + person, said[0], ASK, said[1], END])
            lines.append([*biography, END])
    return lines


def value_id(attribute: int, value: int) -> int:
    """Returns the id of a value."""
    return int(3 + ATTRIBUTES + VALUES * attribute + value)


def words(people: int) -> list[str]:
    """Returns the word of each id."""
    values = [f"v{a}{v}" for a in range(ATTRIBUTES) for v in range(VALUES)]
    names = [f"e{i}" for i in range(people)]
    return ["END", "?", ":", *(f"a{i}" for i in range(ATTRIBUTES)), *values, *names]


def small(config: Any, seed: int) -> World:
    """A small model that was pretrained on the corpus and fine-tuned on biographies."""
    rng, people = np.random.default_rng(seed), config.known + config.held_out
    size = dict(width=32, layers=1) if config.smoke else {}
    vocabulary = words(people)
    model = _model(len(vocabulary), **size)
    ids = {word: i for i, word in enumerate(vocabulary)}
    facts = draw(rng, people, config.rarest)
    lines = _rows(corpus(rng, facts), 1)
    fit = functools.partial(_trained, objective=supervised(model.forward), size=64, seed=seed)
    initial = jax.jit(model.init)(jax.random.key(seed), model.example_input())["params"]
    base = fit(initial, rows=lines, steps=config.pretrain_steps, rate=3e-3)
    names = [f"e{i}" for i in range(people)]
    order = rng.permutation(people)
    known, held_out = ([names[i] for i in part] for part in np.split(order, [config.known]))
    decode = lambda row: " ".join(vocabulary[i] for i in row if i != END)
    truth = {
        name: {f"{name} a{a} {vocabulary[value_id(a, v)]}" for a, v in enumerate(facts.values[i])}
        for i, name in enumerate(names)
    }

    def answers(questions, count):
        """`count` sampled answers of the base model to each question."""
        prompts = np.repeat([[ids[w] for w in q.split()] for q in questions], count, axis=0)
        tokens = sampled(model, base, prompts, 2, stream(jax.random.key(seed), "answers"))
        texts = list(map(decode, tokens))
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def respond(params, records, count, key):
        prompts = np.repeat([[ids[r["subject"]], BIO] for r in records], count, axis=0)
        texts = list(map(decode, sampled(model, params, prompts, SIZE, key)))
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    records_of = lambda names: [{"prompt": name, "subject": name} for name in names]
    biographies = _own_biographies(rng, known, answers, config, ids)
    start = fit(base, rows=_rows(biographies, 2), steps=config.sft_steps, rate=1e-3)
    return World(
        start, *map(records_of, (known, held_out)), respond, PatternClaimExtractor(*PATTERN),
        ReferenceScorer(truth), ConfidenceScorer(answers, config.answers),
        functools.partial(_dpo, model, config, ids),
    )  # fmt: skip


def sampled(
    model: Decoder, params: Any, prompts: Any, size: int, key: jax.Array
) -> list[list[int]]:
    """One sample for each prompt [B, P], without END; 1024 rows at a time, for one compiled program."""
    sample, rows = toy.sampler(model, size, END), min(1024, 1 << (len(prompts) - 1).bit_length())
    found = []
    for number, start in enumerate(range(0, len(prompts), rows)):
        part = prompts[start : start + rows]
        padded = np.concatenate([part, np.repeat(part[:1], rows - len(part), axis=0)])
        tokens, mask, _ = sample(
            params, jnp.asarray(padded, jnp.int32), stream(key, "rows", number)
        )
        pairs = zip(np.asarray(tokens), np.asarray(mask), strict=True)
        found += [[i for i in row[seen].tolist() if i != END] for row, seen in pairs][: len(part)]
    return found


def _own_biographies(rng, known, answers, config, ids):
    """Biographies in the format of fine-tuning, whose values are the base model's own answers.

    Each lists an attribute with the probability `listed`, known or not: true values would teach the facts,
    and would show which attributes of a person the model does not know.
    """
    questions = [f"{name} a{a} ?" for name in known for a in range(ATTRIBUTES)]
    given = iter(answers(questions, config.answers))
    biographies = []
    for name in known:
        found = [next(given) for _ in range(ATTRIBUTES)]
        for _ in range(config.biographies):
            line = [ids[name], BIO]
            for a in np.flatnonzero(rng.random(ATTRIBUTES) < config.listed):
                value = rng.choice(found[a]).split(" ")[0]
                line += [ids[f"a{a}"], ids[value]] if value.startswith(f"v{a}") else []
            biographies.append([*line, END])
    return biographies


def _dpo(model, config, ids, start, pairs, seed, look):
    # A response that reached the limit has no end.
    encode = lambda text: [*(ids[word] for word in text.split()), END][:SIZE]
    prompts = np.array([[[ids[pair["subject"]], BIO]] for pair in pairs])
    texts = [encode(pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    tokens, mask = (x.reshape(len(pairs), 2, SIZE) for x in _padded(texts, SIZE))
    rows = {name: np.asarray(x) for name, x in toy.rows(prompts, tokens, mask).items()}
    parts, whole = np.array_split(np.arange(len(pairs)), -(-len(pairs) // 256)), _sums(model)
    # Parts of one size, for one compiled program.
    part_of = lambda part: {name: leaf[np.resize(part, 256)] for name, leaf in rows.items()}
    ref = np.concatenate([whole(start, part_of(part))[: len(part)] for part in parts])
    objective = preference(
        model.forward, functools.partial(dpo_loss, beta=config.beta), beta=config.beta
    )
    return _trained(
        start, objective, rows | {"ref_log_probs": ref}, config.batch_size, config.steps,
        config.learning_rate, seed, [train.every(config.every, look)],
    )  # fmt: skip


@functools.cache
def _sums(model):
    return jax.jit(lambda params, batch: sequence_log_probs(model.forward, params, batch).sums)


@functools.cache
def _model(vocabulary, **size):
    return toy.decoder(vocabulary, SIZE + 3, **size)


def _trained(params, objective, rows, size, steps, rate, seed, callbacks=()):
    """Trains params on random batches of the rows, with Adam and a cosine schedule."""
    optimizer = optax.adam(lambda count: rate * train.cosine(count / steps))
    rng, count = np.random.default_rng((seed, 1)), len(rows["tokens"])

    def batches():
        while True:
            chosen = rng.integers(0, count, size)
            yield {name: leaf[chosen] for name, leaf in rows.items()}

    key = jax.random.key(seed)
    fitted = train.fit(
        params, objective, optimizer, batches(), steps=steps, key=key, callbacks=callbacks
    )
    return fitted[0].params


def _rows(lines, given):
    """A batch of all lines, which train on what follows their first `given` tokens."""
    tokens, mask = _padded([line[given:] for line in lines], SIZE + 2 - given)
    prompts = np.array([line[:given] for line in lines])
    return {name: np.asarray(x) for name, x in toy.rows(prompts, tokens, mask).items()}


def _padded(lines, size):
    mask = np.arange(size) < np.array(list(map(len, lines)))[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(lines)
    return tokens, mask
