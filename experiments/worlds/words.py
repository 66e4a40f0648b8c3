"""Words of five letters with five tasks on them, of which a small model knows four and half of the fifth.

`config` has start_seed, held_out, until, share, width and layers; see experiments/papers/otr.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import arithmetic
from experiments.worlds import toy_text as toy
from jaxft import losses
from jaxft.models import Decoder

LETTERS, LENGTH = 10, 5  # a word: five of the first ten tokens
CAPITALS = 10  # the same letters again
END, SIZE = 20, LENGTH + 1  # of an answer
TASKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # words [B, 5] -> answers [B, 5]
    "copy": lambda words: words,
    "reverse": lambda words: words[:, ::-1],
    "shift": lambda words: (words + 1) % LETTERS,
    "capitals": lambda words: words + CAPITALS,
    "target": lambda words: np.sort(words, axis=1),
}
OLD = tuple(TASKS)[:-1]
VOCABULARY = END + 1 + len(TASKS)


def words(rng: np.random.Generator, count: int) -> np.ndarray:
    """Different random words [count, 5]."""
    chosen = rng.choice(LETTERS**LENGTH, count, replace=False)
    return np.stack([chosen // LETTERS**i % LETTERS for i in range(LENGTH)], axis=1)


def questions(
    task: str, words: np.ndarray, tasks: Mapping[str, Callable[[np.ndarray], np.ndarray]] = TASKS
) -> tuple[np.ndarray, np.ndarray]:
    """(prompts [B, 6], answers [B, 6]): the task's token and the word; the answer and END."""
    column = lambda token: np.full((len(words), 1), token)
    prompts = [column(END + 1 + list(tasks).index(task)), words]
    join = lambda columns: np.concatenate(columns, axis=1).astype(np.int32)
    return join(prompts), join([tasks[task](words), column(END)])


def rows_of(*pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of prompts and answers, and `positions`, one after another."""
    prompts, answers = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    rows = jax.tree.map(np.asarray, toy.rows(jnp.asarray(prompts), jnp.asarray(answers)))
    size = prompts.shape[1] + answers.shape[1]
    return rows | {"positions": np.tile(np.arange(size, dtype=np.int32), (len(prompts), 1))}


def splits(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """(known, held out): words to train on, and those of all measurements."""
    drawn = words(np.random.default_rng(config.start_seed), 20_000 + config.held_out)
    return drawn[config.held_out :], drawn[: config.held_out]


def pretrained(config: Any) -> tuple[Decoder, Any]:
    """(model, params): all tasks in one mixture, until the target has the probability `until`."""
    known, _ = splits(config)
    rng = np.random.default_rng(config.start_seed)
    model, params = arithmetic.small_model(
        jax.random.key(config.start_seed), config.width, 2 * SIZE, VOCABULARY, config.layers
    )
    rest = (1 - config.share) / len(OLD)
    names = rng.choice(list(TASKS), len(known), p=[rest] * len(OLD) + [config.share])
    rows = rows_of(*(questions(task, known[names == task]) for task in TASKS))
    some = rows_of(questions("target", known[:500]))
    right = jax.jit(lambda params: jnp.mean(jnp.exp(log_probs(model, params, some))))
    params, steps = arithmetic.warm_start(
        model,
        params,
        rows,
        config.start_seed,
        until=config.until,
        measure=lambda p: float(right(p)),
    )
    print(f"{steps} steps of pretraining", flush=True)
    return model, params


def measures(config: Any, model: Decoder, start: Any) -> Callable[[Any], dict[str, float]]:
    """Returns measure(params): accuracies of held-out words, and KL to the start in nats an answer.

    `target` and `old`: the probability of the right answer, the latter over all old tasks. KL(π || start) is
    along one answer of π to each question, with the whole distribution at each of its tokens.
    """
    _, held_out = splits(config)
    pairs = [questions(task, held_out) for task in TASKS]
    rows, prompts = rows_of(*pairs), jnp.concatenate([jnp.asarray(p) for p, _ in pairs])
    sample = toy.sampler(model, SIZE, END)

    @jax.jit
    def values(params, start, completions, mask):
        batch = toy.rows(prompts, completions, mask)
        here, there = (logits(model, p, batch) for p in (params, start))
        kl = jnp.sum(losses.reverse_kl_divergence(there, here) * mask, axis=1)
        right = jnp.exp(log_probs(model, params, rows))
        return [x.reshape(len(TASKS), -1).mean(axis=1) for x in (right, kl)]

    def measure(params):
        completions, mask, _ = sample(params, prompts, jax.random.key(config.start_seed))
        right, kl = map(np.asarray, values(params, start, completions, mask))
        found = {"target": right[-1], "kl target": kl[-1]}
        found |= {"old": right[:-1].mean(), "kl old": kl[:-1].mean()}
        return {name: float(value) for name, value in found.items()}

    return measure


def logits(model, params, batch):
    """[B, 6, V]: of the answer's tokens."""
    output = model.apply({"params": params}, batch["tokens"], segment_ids=batch["segment_ids"])
    return output.logits[:, SIZE - 1 : -1]


def log_probs(model, params, batch):
    """log p [B] of whole answers."""
    answers = jnp.asarray(batch["tokens"][:, SIZE:])
    return -jnp.sum(losses.cross_entropy(logits(model, params, batch), answers), axis=1)
