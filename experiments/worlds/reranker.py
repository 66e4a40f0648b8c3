"""A small binary classifier that ranks sampled workings by correctness, from a language model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.worlds import arithmetic
from jaxft import train
from jaxft.models import Decoder
from jaxft.objectives import outcome_reward
from jaxft.rewards import add_reward_head, sequence_rewards
from jaxft.rl import prompts_of

Texts = Sequence[Sequence[str]]  # samples of each question


def train_reranker(
    model: Decoder,
    params: Any,
    questions: Sequence[str],
    texts: Texts,
    correct: Sequence[Sequence[bool]],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Any:
    """Trains params with a head that classifies workings as correct; equal samples count once."""
    labels = {
        (question, text): good
        for question, some, verdicts in zip(questions, texts, correct, strict=True)
        for text, good in zip(some, verdicts, strict=True)
    }
    rows = _rows(list(labels)) | {"label": np.array(list(labels.values()))}
    batches = (
        jax.tree.map(lambda x, draw=draw: x[prompts_of(draw, batch_size, len(labels), seed)], rows)
        for draw in range(steps)
    )
    start = add_reward_head(jax.random.key(seed), params, model.config.hidden_size)
    optimizer = arithmetic.policy_optimizer(learning_rate)
    return train.fit(start, outcome_reward(model.forward), optimizer, batches)[0].params


def scores(
    model: Decoder, params: Any, questions: Sequence[str], texts: Texts, chunk: int = 4000
) -> list[list[float]]:
    """Returns the head's value of each text: the log-odds that it is correct."""
    pairs = [
        (question, text) for question, some in zip(questions, texts, strict=True) for text in some
    ]
    rows = _rows(pairs)
    parts = [
        _read(model, params, jax.tree.map(lambda x, i=i: x[i : i + chunk], rows))
        for i in range(0, len(pairs), chunk)
    ]
    values = np.concatenate([np.asarray(part) for part in parts])
    ends = np.cumsum([len(some) for some in texts])[:-1]
    return [part.tolist() for part in np.split(values, ends)]


@functools.partial(jax.jit, static_argnums=0)
def _read(model, params, rows):
    return sequence_rewards(model.forward, params, rows)[0][:, 0]


def _rows(pairs):
    """Returns rows [B, 1, T], one completion per record, as in batches of reward models."""
    rows = arithmetic.layout(*zip(*pairs, strict=True))
    return {name: x[:, None] for name, x in rows.items() if name != "completion_mask"}
