"""Digits under a row of permutations: answers with steps, useless filler, and an end at any time.

A question such as 5031= has a digit and three operations, each one of four fixed permutations of the digits.
An answer writes the digit after each operation, one segment of three characters per step, then the result:
A7;B2;C4;|4. The model is pretrained on answers with filler segments (++;) between the steps, and on answers
that are cut at some segment by the mark "-", after which the result must be guessed: A7;++;-4.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import arithmetic
from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder
from jaxft.rl.rollouts import WHOLE, padded

OPERATIONS, STEPS = 4, "ABC"  # permutations, and the names of an answer's steps
DEPTH = len(STEPS)
END, BAR, FORCED, FILLER = ";", "|", "-", "++;"
SEGMENT = len(FILLER)  # tokens
MOST = 8  # segments of an answer in pretraining
LIMIT = MOST * SEGMENT + 3  # tokens of an answer with its result and stop
FILLED = 0.4  # chance of a filler segment, and of another, at each place
CUT = 0.4  # fraction of pretraining answers that are cut
PLACE = arithmetic.ALPHABET.index
WIDTH = 2 + DEPTH  # tokens of a question
# Room for the longest answer of pretraining, at temperature 1.
SAMPLING = SamplingConfig(LIMIT, stop_ids=(PLACE(arithmetic.STOP),))


class Task(NamedTuple):
    """An untrained model and the questions of one seed; columns `gold` [P, 2] have result and stop."""

    model: Decoder
    start: Any
    table: np.ndarray  # [operations, 10], the permutations
    known: rl.Asked
    held_out: rl.Asked


def task(seed: int, held_out: int, *, width: int = 64, layers: int = 2) -> Task:
    """Draws permutations, splits all 640 questions, and makes a model.

    Raises:
        ValueError: if no question is left to train on.
    """
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(10) for _ in range(OPERATIONS)])
    every = list(itertools.product(range(10), *[range(OPERATIONS)] * DEPTH))
    if not 0 < held_out < len(every):
        raise ValueError(
            f"held_out must be above 0 and below the {len(every)} questions, got {held_out}."
        )
    every = [every[i] for i in rng.permutation(len(every))]
    new, known = (_asked(table, part) for part in (every[:held_out], every[held_out:]))
    model, params = arithmetic.small_model(jax.random.key(seed), width, layers=layers)
    return Task(model, params, table, known, new)


def _asked(table, parts):
    texts = ["".join(map(str, part)) + "=" for part in parts]
    gold = arithmetic.encode_answers([str(states(table, *part)[-1]) for part in parts])
    records = [{"parts": part} for part in parts]
    columns = {"gold": np.array(gold, np.int32), "number": np.arange(len(parts))}
    return rl.Asked(arithmetic.encode(texts), records, columns)


def states(table: np.ndarray, first: int, *operations: int) -> list[int]:
    """Returns the digit after each operation."""
    return list(itertools.accumulate(operations, lambda x, i: int(table[i, x]), initial=first))[1:]


def answer(table: np.ndarray, parts: Sequence[int], rng: np.random.Generator) -> str:
    """Draws a right answer with filler, without its stop; with probability CUT it is cut by the mark."""
    digits = states(table, *parts)
    steps = [f"{name}{x}{END}" for name, x in zip(STEPS, digits, strict=True)]
    # Filler before each step and behind the last.
    counts = rng.geometric(1 - FILLED, DEPTH + 1) - 1
    while counts.sum() > MOST - DEPTH:
        counts[np.argmax(counts)] -= 1
    segments = [FILLER] * counts[0]
    for step, count in zip(steps, counts[1:], strict=True):
        segments += [step] + [FILLER] * count
    if rng.random() < CUT:
        return "".join(segments[: rng.integers(len(segments) + 1)]) + FORCED + str(digits[-1])
    return "".join(segments) + BAR + str(digits[-1])


def rows_of(task: Task, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws rows of `arithmetic.layout`: answers to `count` training questions, drawn with replacement.

    The mark that cuts an answer has no loss: the policy does not learn to give up.
    """
    chosen = rng.integers(0, len(task.known.ids), count)
    asked = ["".join(arithmetic.ALPHABET[i] for i in task.known.ids[n]) for n in chosen]
    given = [answer(task.table, task.known.records[n]["parts"], rng) for n in chosen]
    rows = arithmetic.layout(asked, given)
    return rows | {"loss_mask": rows["loss_mask"] * (rows["tokens"] != PLACE(FORCED))}


def started(task: Task, seed: int, until: float) -> tuple[Any, int]:
    """Trains the model until it writes all digits of a given answer with probability `until`.

    Returns (params, steps). Only the digits of steps and result count, each after the right ones, on cut and
    whole answers to training questions.
    """
    rng = np.random.default_rng(seed)
    rows, some = rows_of(task, 20_000, rng), rows_of(task, 300, rng)
    size = some["completion_mask"].shape[1]
    answers = some["tokens"][:, -size:]
    digits = (answers >= PLACE("0")) & (answers <= PLACE("9"))
    whole = (answers == PLACE(BAR)).any(axis=1)
    some = some | {"completion_mask": some["completion_mask"] & digits}
    some = jax.tree.map(lambda x: x[whole], some)
    probabilities = arithmetic.answer_probabilities(task.model)
    measure = lambda params: float(jnp.mean(probabilities(params, some)))
    return arithmetic.warm_start(
        task.model, task.start, rows, seed, until=until, measure=measure,
        learning_rate=2e-3, batch_size=64,
    )  # fmt: skip


def answers(model: Decoder, width: int = WIDTH) -> Callable[[int], rl.Sample]:
    """Returns group size -> sampler, whose reward is 1 for the right result behind "|" or "-".

    Batches have `width` columns for prompts and LIMIT for answers, so that few programs are compiled.
    """

    def of_size(group_size):
        def sample(params, asked, key):
            batch, _ = rl.sample_groups(
                model, params, asked.ids, key, SAMPLING, group_size, columns=asked.columns
            )
            own = batch["tokens"].shape[1] - batch["completion_mask"].shape[1]
            batch = padded(batch, max(own, width), LIMIT)
            batch |= {name: batch[name][:, -(width + LIMIT) :] for name in WHOLE}
            return batch | {"rewards": rewards(batch)}

        return sample

    return of_size


def rewards(batch: dict[str, Any]) -> np.ndarray:
    """Returns 1.0 for rows that end with "|" or "-", the right result and the stop, else 0.0; [B]."""
    tokens, seen = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"]) > 0
    last = tokens.shape[1] - 1 - np.argmax(seen[:, ::-1], axis=1)
    of = lambda back: tokens[np.arange(len(tokens)), last - back]
    right = (of(1) == batch["gold"][:, 0]) & (of(0) == batch["gold"][:, 1])
    return (right & np.isin(of(2), [PLACE(BAR), PLACE(FORCED)])).astype(np.float32)


def filler(batch: dict[str, Any]) -> float:
    """Returns the fraction of filler among the segments of a batch's answers."""
    size = batch["completion_mask"].shape[1]
    tokens = np.where(batch["completion_mask"], batch["tokens"][:, -size:], 0)
    ended = tokens[:, 2:] == PLACE(END)
    filled = ended & (tokens[:, 1:-1] == PLACE("+")) & (tokens[:, :-2] == PLACE("+"))
    return float(filled.sum() / max(ended.sum(), 1))


ends_of = functools.partial(rl.separator_ends, separator=PLACE(END), most=MOST)
