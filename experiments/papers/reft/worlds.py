"""Worlds of ReFT's script: sums with written-out workings, or questions with workings from a file.

`config` is the Config of experiments/papers/reft/main.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from experiments.worlds import arithmetic, documents, questions, workings
from jaxft import rl, train
from jaxft.models import Decoder
from jaxft.rewards import answer_reward, in_process, numbers_equal, stated_answer

# The authors' text of a question.
FORM = functools.partial(documents.worked, asked="Question:\n{}\nAnswer reasoning:\n")


class World(NamedTuple):
    """A model, and questions with one annotated working each; records have "question" and "answer"."""

    model: Decoder
    start: Any  # params before the warm-up
    known: rl.Asked  # ids and records of the questions to train on
    held_out: rl.Asked
    gold: list[str]  # the annotated workings
    lay_out: Callable[..., dict]  # (numbers of questions, workings) -> supervised rows
    # (params, known or held_out, samples, seed, temperature) -> texts of each question
    answers: Callable[..., list[list[str]]]
    parse: Callable[[str], str | None]  # working -> its answer
    collect: Callable[..., rl.Collector]  # (prompts a step, reward if wrong, credit, seed, ...)
    fit: Callable[..., tuple]  # `fit` of (params, objective, learning rate, batches, rows, ...)
    kinds: str = ""  # first characters of workings that are counted


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: sums with workings or, with --preset full, the source's questions."""
    if config.preset != "full":
        yield lambda seed: sums(config, started(config, seed))
        return
    with questions.opened(config.source, FORM) as task:
        records = task.known.records
        lay_out = lambda numbers, texts: documents.lay_out(
            task, [records[i] for i in numbers], texts
        )

        def answers(params, part, samples, seed, temperature=1.0):
            decoding = dict(temperature=temperature)
            return questions.texts(task, params, part.ids, samples, seed, **decoding)

        def collect(per_step, partial, credit, seed, **settings):
            rewards = in_process(answer_reward(stated_answer, numbers_equal, partial))
            return questions.experience(
                task, credit, per_step, seed, group_size=1, rewards=rewards, **settings
            )

        yield lambda seed: World(
            task.model, task.params, task.known, task.held_out,
            [record["completion"] for record in records], lay_out, answers, stated_answer, collect,
            functools.partial(questions.fit, task),
        )  # fmt: skip


def started(config: Any, seed: int) -> workings.Start:
    """Returns the pretrained model and the sums of a seed."""
    sizes = (config.pretraining, config.questions, config.held_out)
    start = workings.started(
        seed, sizes, config.kinds, config.until, digits=config.digits, width=config.width,
        layers=config.layers,
    )  # fmt: skip
    print(f"seed {seed}: {start.steps} steps of pretraining", flush=True)
    return start


def sums(config: Any, made: workings.Start) -> World:
    """Returns the world of sums."""
    model, digits = made.model, config.digits

    def asked(pairs):
        texts = [workings.question(*pair, digits) for pair in pairs]
        records = [
            {"question": text, "answer": total}
            for text, total in zip(texts, pairs.sum(axis=1), strict=True)
        ]
        return rl.Asked(arithmetic.encode(texts), records)

    known, held_out = asked(made.pairs), asked(made.held_out)
    gold = [
        arithmetic.decode(tokens, mask > 0)
        for tokens, mask in zip(made.rows["tokens"], made.rows["loss_mask"], strict=True)
    ]
    lay_out = lambda numbers, texts: arithmetic.layout(
        [known.records[i]["question"] for i in numbers], texts
    )

    def answers(params, part, samples, seed, temperature=1.0):
        sampling = dataclasses.replace(workings.sampling(digits), temperature=temperature)
        drawn = rl.sample_on_device(
            model, params, part.ids, jax.random.key(seed), sampling, samples
        )
        rows = zip(*drawn, strict=True)
        return [[arithmetic.decode(t, m) for t, m in zip(*row, strict=True)] for row in rows]

    def collect(per_step, partial, credit, seed, **settings):
        return rl.collect_on_device(
            model, rl.Prompts(known.ids, per_step, seed=seed),
            workings.result_reward(made.pairs.sum(axis=1), digits, partial), credit,
            workings.sampling(digits), group_size=1, **settings,
        )  # fmt: skip

    def fit(params, objective, rate, batches, rows, **more):
        return train.fit(params, objective, arithmetic.policy_optimizer(rate), batches, **more)

    parse = functools.partial(workings.result, digits=digits)
    return World(
        model,
        made.params,
        known,
        held_out,
        gold,
        lay_out,
        answers,
        parse,
        collect,
        fit,
        config.kinds,
    )
