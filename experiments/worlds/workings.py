"""Additions with several formats of written-out working, and a reward for their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import arithmetic
from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder

FORMATS = "ABC"  # the first character of an answer


def question(a: int, b: int, digits: int = 3) -> str:
    """ "123+456=" """
    return f"{a:0{digits}d}+{b:0{digits}d}="


def answer(name: str, a: int, b: int, digits: int = 3) -> str:
    """Correct string of a format: A0579, the sum; B9750|0579, its reversed digits first; C050709|0579, the
    sums of the digits first.
    """
    total = f"{a + b:0{digits + 1}d}"
    columns = zip(f"{a:0{digits}d}", f"{b:0{digits}d}", strict=True)
    working = {
        "A": "",
        "B": f"{total[::-1]}|",
        "C": "".join(f"{int(x) + int(y):02d}" for x, y in columns) + "|",
    }
    return name + working[name] + total


def lengths(digits: int = 3) -> dict[str, int]:
    """Characters of an answer in each format, without the stop."""
    return {name: len(answer(name, 0, 0, digits)) for name in FORMATS}


def rows_of(pairs: np.ndarray, names: Sequence[str], digits: int = 3) -> dict[str, np.ndarray]:
    """Rows of `arithmetic.layout` of pairs [N, 2] answered in the formats `names` [N]."""
    asked = [question(a, b, digits) for a, b in pairs]
    given = [answer(name, a, b, digits) for name, (a, b) in zip(names, pairs, strict=True)]
    return arithmetic.layout(asked, given)


def right_probability(
    model: Decoder, pairs: np.ndarray, digits: int = 3, names: str = FORMATS
) -> Callable[[Any], float]:
    """Returns measure(params): mean probability that an answer is correct in every character, any format."""
    gold = [rows_of(pairs, name * len(pairs), digits) for name in names]
    probabilities = arithmetic.answer_probabilities(model)
    return lambda params: float(sum(jnp.mean(probabilities(params, rows)) for rows in gold))


def result(text: str, digits: int = 3) -> str | None:
    """Returns the sum at the end of an answer of its format's length, as digits; None for other texts."""
    name, size = text[:1], digits + 1
    if len(text) != lengths(digits).get(name) or not text[-size:].isdigit():
        return None
    return None if name != "A" and text[-size - 1] != "|" else text[-size:]


def sampling(digits: int = 3) -> SamplingConfig:
    """Sampling config with room for the longest answer and its stop."""
    limit = max(lengths(digits).values()) + 1
    return SamplingConfig(limit, stop_ids=(arithmetic.ALPHABET.index(arithmetic.STOP),))


def result_reward(
    totals: Sequence[int] | np.ndarray, digits: int = 3, partial: float = 0.0
) -> rl.DeviceReward:
    """Returns a reward: 1 for a correct sum at the end of a well-formed answer; `partial` for a wrong sum.

    Well-formed means of its format's length. The working may be wrong, and no format gets a reward. `totals`
    has the sum of each prompt.
    """
    size = digits + 1
    wanted = jnp.asarray(arithmetic.encode([f"{total:0{size}d}" for total in totals]))
    place = arithmetic.ALPHABET.index
    stop, bar, zero, nine = map(place, (arithmetic.STOP, "|", "0", "9"))

    def reward(tokens, mask, numbers):
        gold, count = wanted[numbers], jnp.sum(mask, axis=1)
        right = parsed = jnp.zeros(len(tokens), bool)
        for name, length in lengths(digits).items():
            fits = (tokens[:, 0] == place(name)) & (count == length + 1)
            fits &= tokens[:, length] == stop
            if name != "A":
                fits &= tokens[:, length - size - 1] == bar
            given = tokens[:, length - size : length]
            right |= fits & jnp.all(given == gold, axis=1)
            parsed |= fits & jnp.all((given >= zero) & (given <= nine), axis=1)
        return jnp.where(right, 1.0, partial * parsed)

    return reward


class Start(NamedTuple):
    """A partly trained model, and the questions of one seed."""

    model: Decoder
    params: Any
    steps: int  # of pretraining
    pairs: np.ndarray  # [N, 2] the numbers to fine-tune on
    rows: dict[str, np.ndarray]  # these with one annotated working each
    held_out: np.ndarray


def started(
    seed: int,
    sizes: tuple[int, int, int],
    kinds: str,
    until: float,
    *,
    digits: int = 2,
    width: int = 64,
    layers: int = 2,
) -> Start:
    """Pretrains on sums that are not asked later, until a working is correct with probability `until`.

    `sizes`: the numbers of sums to pretrain, fine-tune and hold out; `kinds` of working occur equally often.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(100**digits, sum(sizes), replace=False)
    pairs = np.stack(np.divmod(drawn, 10**digits), axis=1)
    earlier, pairs, held_out = np.split(pairs, np.cumsum(sizes)[:-1])
    annotated = lambda pairs: rows_of(pairs, rng.choice(list(kinds), len(pairs)), digits)
    rows, first = annotated(pairs), annotated(earlier)
    model, params = arithmetic.small_model(jax.random.key(seed), width, layers=layers)
    right = right_probability(model, earlier[:200], digits, kinds)
    params, steps = arithmetic.warm_start(model, params, first, seed, until=until, measure=right)
    return Start(model, params, steps, pairs, rows, held_out)


def supervised_rows(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Selects the columns of `rows_of` for supervised fine-tuning."""
    return {name: rows[name] for name in ("tokens", "segment_ids", "positions", "loss_mask")}
