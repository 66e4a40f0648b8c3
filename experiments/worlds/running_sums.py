"""Sums of several one-digit numbers modulo 10, written in steps: each step is one running total.

    7+5+9+8=2;1;9

Without the tens the last total cannot be estimated from the question, so that a wrong total spoils the later
ones. Every text of `terms` numbers has the same length. A step ends with ";", the last one with a line end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import arithmetic
from jaxft import rl
from jaxft.models import Decoder

STEP = ";"
DIGITS = 1  # of a running total, which is taken modulo 10**DIGITS
LOW, HIGH = 1, 10  # numbers are LOW..HIGH - 1


def drawn(rng: np.random.Generator, count: int, terms: int) -> np.ndarray:
    """Returns `count` distinct questions [count, terms].

    Raises:
        ValueError: if fewer than half as many questions exist.
    """
    if 2 * count > (most := (HIGH - LOW) ** terms):
        raise ValueError(f"drawn: {terms} terms have {most} questions, too few for {count}.")
    found: dict[tuple, None] = {}
    while len(found) < count:
        found |= dict.fromkeys(map(tuple, rng.integers(LOW, HIGH, (count, terms)).tolist()))
    return np.array(list(found)[:count])


def question(numbers: Sequence[int]) -> str:
    """ "7+5+9=" """
    return "+".join(map(str, numbers)) + "="


def chain(numbers: Sequence[int]) -> str:
    """ "2;1", the running totals."""
    return STEP.join(map(written, np.cumsum(numbers)[1:]))


def written(total: int) -> str:
    """The last digits of a total."""
    return f"{total % 10**DIGITS:0{DIGITS}d}"


def length(terms: int) -> int:
    """Characters of a question, its chain and its stop."""
    return 2 * terms + (DIGITS + 1) * (terms - 1)


def result(text: str, terms: int) -> str | None:
    """Returns the last total of a chain with the right form; None for another text."""
    totals = text.split(STEP)
    formed = len(totals) == terms - 1 and all(len(t) == DIGITS and t.isdigit() for t in totals)
    return totals[-1] if formed else None


def rows_of(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of `arithmetic.layout` of questions [N, terms] and their chains, all of one length."""
    asked = numbers.tolist()
    return arithmetic.layout(list(map(question, asked)), list(map(chain, asked)))


class Start(NamedTuple):
    """A partly trained model, and the questions of one seed, which differ from those it has seen."""

    model: Decoder
    params: Any
    steps: int  # of pretraining
    known: np.ndarray  # [N, terms] questions to learn from
    held_out: np.ndarray  # [N, terms]


def started(
    seed: int,
    sizes: tuple[int, int, int],
    *,
    terms: int,
    max_length: int,
    width: int,
    layers: int,
    until: float,
    most: int,
) -> Start:
    """Trains a model until a sampled chain is right with probability `until`.

    Args:
        sizes: questions to pretrain on, to learn from, and held out.
        max_length: positions of the model.
        until: is measured on questions of the pretraining.
        most: steps, at most.

    Raises:
        RuntimeError: if it is not reached.
    """
    numbers = drawn(np.random.default_rng(seed), sum(sizes), terms)
    early, known, held_out = np.split(numbers, np.cumsum(sizes)[:-1])
    model, params = arithmetic.small_model(jax.random.key(seed), width, max_length, layers=layers)
    rows = rows_of(early)
    some = {name: x[:200] for name, x in rows.items()}
    probabilities = arithmetic.answer_probabilities(model)
    params, steps = arithmetic.warm_start(
        model,
        params,
        rows,
        seed,
        until=until,
        measure=lambda params: float(jnp.mean(probabilities(params, some))),
        learning_rate=1e-3,
        batch_size=64,
        most=most,
    )
    return Start(model, params, steps, known, held_out)


def total_reward(numbers: np.ndarray) -> rl.DeviceReward:
    """Returns a reward: 1 for a chain of the right length that ends with the question's sum."""
    wanted = list(map(written, numbers.sum(axis=1)))
    gold = jnp.asarray(arithmetic.encode_answers(wanted))
    size = (DIGITS + 1) * (numbers.shape[1] - 1)

    def reward(tokens, mask, chosen):
        end = tokens[:, size - DIGITS - 1 : size]
        return jnp.all((end == gold[chosen]) & mask[:, size - DIGITS - 1 : size], axis=1) * 1.0

    return reward
