"""Items whose values a table has, of which the largest is asked: steps, useless filler, an end at any time.

A question such as A57B03C91= has three items of two digits. A fixed table gives each of the hundred items a
value, one digit; the result is the largest of the three. An answer writes the values, one segment of three
characters per step, then the result: A7;B2;C4;|7. The model is pretrained on answers with filler segments
(++;) between the steps, and on answers that are cut at some segment by the mark "-", after which it gives
the largest value so far: A2;++;-2, or 0 if there is none.

There are a million questions, so that the model cannot remember their results. In pretraining some values
are wrong at random, which is what training can improve, with or without filler. Each step raises the chance
that the largest value so far is the result.
"""

from __future__ import annotations

import functools
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

STEPS = "ABC"  # names of the items of a question, and of an answer's steps
DEPTH, ITEMS = len(STEPS), 100
END, BAR, FORCED, FILLER = ";", "|", "-", "++;"
SEGMENT = len(FILLER)  # tokens
MOST = 10  # segments of an answer in pretraining
LIMIT = MOST * SEGMENT + 3  # tokens of an answer with its result and stop
FILLED = 0.35  # chance of a filler segment, and of another, at each place
ERRORS = 0.25  # fraction of an answer's values in pretraining that are random digits
CUT = 0.4  # fraction of pretraining answers that are cut
PLACE = arithmetic.ALPHABET.index
WIDTH = 3 * DEPTH + 1  # tokens of a question
# Room for the longest answer of pretraining, at temperature 1.
SAMPLING = SamplingConfig(LIMIT, stop_ids=(PLACE(arithmetic.STOP),))


class Task(NamedTuple):
    """An untrained model and the questions of one seed; columns `gold` [P, 2] have result and stop."""

    model: Decoder
    start: Any  # params
    table: np.ndarray  # [ITEMS], the digit that is an item's value
    pretraining: np.ndarray  # [P, DEPTH], the items of the questions of pretraining
    known: rl.Asked  # the first of these, on which methods train
    held_out: rl.Asked


def task(
    seed: int, pretraining: int, known: int, held_out: int, *, width: int = 64, layers: int = 2
) -> Task:
    """Draws a table and the given numbers of different questions, and makes a model.

    Raises:
        ValueError: if there are fewer questions, or fewer of pretraining than are to be known.
    """
    if known > pretraining or pretraining + held_out > ITEMS**DEPTH:
        raise ValueError(
            f"pretraining must be at least known and at most {ITEMS**DEPTH:,} less held_out; got pretraining "
            f"{pretraining}, known {known} and held_out {held_out}."
        )
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 10, ITEMS)
    drawn = rng.choice(ITEMS**DEPTH, pretraining + held_out, replace=False)
    every = np.stack(np.unravel_index(drawn, (ITEMS,) * DEPTH), axis=1)
    old, new = (_asked(table, part) for part in (every[:known], every[pretraining:]))
    model, params = arithmetic.small_model(jax.random.key(seed), width, layers=layers)
    return Task(model, params, table, every[:pretraining], old, new)


def _asked(table, questions):
    gold = arithmetic.encode_answers([str(table[items].max()) for items in questions])
    columns = {"gold": np.array(gold, np.int32), "number": np.arange(len(questions))}
    return rl.Asked(arithmetic.encode(map(question, questions)), [{}] * len(questions), columns)


def question(items: Sequence[int]) -> str:
    """Returns the text of a question."""
    return "".join(f"{name}{item:02d}" for name, item in zip(STEPS, items, strict=True)) + "="


def answer(
    table: np.ndarray, items: Sequence[int], rng: np.random.Generator, errors: float = ERRORS
) -> str:
    """Draws an answer with filler, without its stop; with probability CUT it is cut by the mark."""
    values = np.where(
        rng.random(DEPTH) < errors, rng.integers(0, 10, DEPTH), table[np.asarray(items)]
    )
    steps = [f"{name}{value}{END}" for name, value in zip(STEPS, values, strict=True)]
    # Filler before each step and behind the last.
    counts = rng.geometric(1 - FILLED, DEPTH + 1) - 1
    while counts.sum() > MOST - DEPTH:
        counts[np.argmax(counts)] -= 1
    segments = [FILLER] * counts[0]
    for step, count in zip(steps, counts[1:], strict=True):
        segments += [step] + [FILLER] * count
    if rng.random() < CUT:
        kept = segments[: rng.integers(len(segments) + 1)]
        found = [segment[1] for segment in kept if segment != FILLER]
        return "".join(kept) + FORCED + max(found, default="0")
    return "".join(segments) + BAR + str(values.max())


def rows_of(
    table: np.ndarray, questions: np.ndarray, rng: np.random.Generator, errors: float = ERRORS
) -> dict[str, np.ndarray]:
    """Draws rows of `arithmetic.layout`, one answer to each of the questions [P, DEPTH].

    The mark that cuts an answer has no loss: the policy does not learn to give up.
    """
    given = [answer(table, items, rng, errors) for items in questions]
    rows = arithmetic.layout(list(map(question, questions)), given)
    return rows | {"loss_mask": rows["loss_mask"] * (rows["tokens"] != PLACE(FORCED))}


def started(task: Task, seed: int, until: float) -> tuple[Any, int]:
    """Trains the model until it writes all digits of a right answer with probability `until`.

    Returns (params, steps). Only the digits of values and result count, each after the right ones, on whole
    answers to questions of pretraining.
    """
    rng = np.random.default_rng(seed)
    rows = rows_of(task.table, task.pretraining, rng)
    some = rows_of(task.table, task.pretraining[:300], rng, errors=0.0)
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
