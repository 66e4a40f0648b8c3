"""Answers in a file and a language model from the hub: adaptive_elicitation's --preset full."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import flags
from experiments.papers.adaptive_elicitation.worlds import World
from jaxft import data
from jaxft.analysis import Questions
from jaxft.analysis.elicitation import EMPTY
from jaxft.checkpoints import load_model, load_tokenizer

COLUMNS = ("entity", "question", "answer")
# The authors' settings for GPT-2, except the number of episodes: 10,000 in the paper.
SIZES = dict(
    steps=20_000, batch_size=36, learning_rate=1e-4, episodes=1000, ahead=100, questions=10, pool=20
)


@flags.without_prefix
@dataclasses.dataclass(frozen=True)
class Source:
    """The model and the answers of --preset full; the flags have no effect without it."""

    model: str | None = None  # directory or hub id; None: gpt2. All params train
    # file or hub id with the columns entity, question and answer, one row for each answer
    data: str | None = None
    max_length: int = 1024  # tokens of a row
    microbatches: int = 4  # parts of a batch that are processed in turn


def world(config: Any) -> World:
    """Reads answers and model; entities are split 85/15, and those for training again 85/15.

    Raises:
        ValueError: without --data; DataError for its rows, before the model is read.
    """
    source = config.source
    if source.data is None:
        raise ValueError(
            f"--preset full: --data missing; give a file or hub id with the columns {', '.join(COLUMNS)} "
            "(the authors' repository, namkoong-lab/adaptive-elicitation, says where its answers are)."
        )
    rows = data.load(source.data, form=_row)
    names = [sorted({row[name] for row in rows}) for name in COLUMNS]
    place = [{name: i for i, name in enumerate(column)} for column in names]
    answers = np.full((len(names[0]), len(names[1])), EMPTY)
    for row in rows:
        entity, question, answer = (at[row[c]] for at, c in zip(place, COLUMNS, strict=True))
        answers[entity, question] = answer
    # The same split for all seeds, which are of weights, orders and episodes.
    order = np.random.default_rng(0).permutation(len(answers))
    splits = np.split(order, [int(0.85**2 * len(order)), int(0.85 * len(order))])
    if min(map(len, splits)) < 1:
        raise data.DataError(
            f"{source.data}: {len(order)} entities; expected at least 7, for three splits."
        )
    name = source.model or "gpt2"
    tokenizer = load_tokenizer(name)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    # Plain text replaces the authors' four added tokens. No space before an answer: in a tokenizer of
    # bytes it would be the first token of all answers.
    table = Questions(
        asks=[encode(f"{question}\nAnswer:") for question in names[1]],
        replies=[[encode(f"{answer}\n") for answer in names[2]]] * len(names[1]),
    )
    table.answer_ids()
    model, params = load_model(name, dtype=jnp.float32)
    start = lambda key: jax.tree.map(jnp.copy, params)
    length = min(source.max_length, model.config.max_length)
    columns = ("tokens", "loss_mask", "segment_ids", "positions")
    return World(
        model, start, table, length, config.steps, *(answers[part] for part in splits), columns
    )


def _row(raw, fields):
    del fields
    if lacking := [name for name in COLUMNS if raw.get(name) is None]:
        raise data.DataError(
            f"no {' and no '.join(lacking)}; a row has {', '.join(COLUMNS)}.", "schema"
        )
    return {name: str(raw[name]) for name in COLUMNS}
