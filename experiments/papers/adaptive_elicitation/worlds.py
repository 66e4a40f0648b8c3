"""Entities with answers to questions: latent classes with exact Bayes, and real measurements of tumours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.analysis import Questions, latent_class_probs
from jaxft.analysis.elicitation import ProbsFn
from jaxft.keys import stream
from jaxft.models import Decoder
from jaxft.models.config import tiny_config

CLASSES, QUESTIONS, HELD_OUT = 8, 16, 500
# Three tokens for each question; the same for all worlds, which then share programs.
VOCABULARY = 96


class World(NamedTuple):
    """A model before meta-training, and the answers [E, Q] of entities, which no two splits share."""

    model: Decoder
    start: Callable[[jax.Array], Any]  # key -> params
    questions: Questions
    length: int  # tokens of a row
    steps: int  # of meta-training
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    columns: tuple[str, ...]  # of a batch that the objective reads
    always: tuple[int, ...] = ()  # questions that are targets of every episode
    exact: ProbsFn | None = None  # exact Bayes, where the latent variable is known


def latent_classes(config: Any, seed: int) -> World:
    """Yes/no answers of 8 classes to 16 questions, P(yes | class) ~ Beta(.3, .3) clipped to .03..0.97."""
    rng = np.random.default_rng([seed, 0])
    yes = np.clip(rng.beta(0.3, 0.3, (CLASSES, QUESTIONS)), 0.03, 0.97)

    def draw(number):
        of = rng.integers(0, CLASSES, number)
        return (rng.random((number, QUESTIONS)) < yes[of]).astype(int)

    exact = latent_class_probs(np.full(CLASSES, 1 / CLASSES), np.stack([1 - yes, yes], axis=-1))
    splits = draw(config.entities), draw(HELD_OUT), draw(HELD_OUT)
    return _small(config, config.steps, *splits)._replace(exact=exact)


def tumours(config: Any, seed: int) -> World:
    """scikit-learn's breast cancer data: is each of 30 measurements above its median, and is it benign?

    85 % of the 569 tumours, and of these again 85 %, are for training. Medians are those of the training
    split. The last question, the diagnosis, is a target of every episode.
    """
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    order = np.random.default_rng([seed, 1]).permutation(len(data.target))
    first, second = int(0.85**2 * len(order)), int(0.85 * len(order))
    training, validation, test = np.split(order, [first, second])
    above = data.data > np.median(data.data[training], axis=0)
    answers = np.concatenate([above, data.target[:, None]], axis=1).astype(int)
    splits = (answers[part] for part in (training, validation, test))
    return _small(config, config.real_steps, *splits)._replace(always=(answers.shape[1] - 1,))


def _small(config, steps, training, validation, test):
    """The world of a small decoder with one token for a question, and one for a question with its answer.

    With separate tokens of answers, learning from the history did not begin within 3000 steps.
    """
    number = training.shape[1]
    table = Questions(
        asks=[[q] for q in range(number)],
        replies=[[[number + 2 * q + a] for a in range(2)] for q in range(number)],
    )
    sizes = dict(
        hidden_size=config.width, intermediate_size=2 * config.width, num_layers=config.layers,
        num_heads=4, num_kv_heads=4, head_dim=config.width // 4,
    )  # fmt: skip
    model = Decoder(dataclasses.replace(tiny_config(VOCABULARY, 64), **sizes))
    init = jax.jit(model.init)
    start = lambda key: init(stream(key, "init"), jnp.zeros((1, 1), jnp.int32))["params"]
    # Rows of one length and one entity need no segments, which take a quarter of a step.
    splits = training, validation, test
    return World(model, start, table, 2 * config.items, steps, *splits, ("tokens", "loss_mask"))
