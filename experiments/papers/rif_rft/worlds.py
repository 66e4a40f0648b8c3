"""Worlds of RIF-RFT's script: tasks on words one after another, or sources of verified questions.

`config` is the Config of experiments/papers/rif_rft/main.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree_util

from experiments.worlds import arithmetic, documents, questions, words
from experiments.worlds import toy_text as toy
from jaxft import losses, rl, train
from jaxft.models import Decoder
from jaxft.rl.filtering import learnable, only
from jaxft.rl.rollouts import side_by_side

# The stream: of the sorted letters, their order, reversed order, and capitals.
STREAM: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sort": lambda x: np.sort(x, axis=1),
    "sort down": lambda x: np.sort(x, axis=1)[:, ::-1],
    "sort to capitals": lambda x: np.sort(x, axis=1) + words.CAPITALS,
}
TASKS = {name: words.TASKS[name] for name in words.OLD} | STREAM
VOCABULARY = words.END + 1 + len(TASKS)
asked = functools.partial(words.questions, tasks=TASKS)


class World(NamedTuple):
    """A start that solves all tasks of a stream sometimes, and how it is trained and measured."""

    model: Decoder
    start: Any  # params
    tasks: tuple[str, ...]
    # params -> {"tasks": accuracy of each task of the stream, "general": of others, "kl": nats an answer}
    measure: Callable[[Any], dict[str, Any]]
    rows: Callable[
        [int, int, Any], Iterator[dict]
    ]  # (task, seed, earlier or None) -> supervised batches
    # (task, credit, seed, ref_params, kept or None) -> answers of the policy
    collect: Callable[..., rl.Collector]
    rates: Callable[
        [Any, int, int], np.ndarray
    ]  # (params, task, seed) -> success rate of each prompt
    # (params, objective, batches, task, rows, seed) -> (params, steps): until the level, or all steps
    fit: Callable[..., tuple[Any, int]]


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: words by a small model or, with --preset full, sources of questions."""
    if config.preset != "full":
        yield functools.partial(of_words, config)
        return
    with questions.opened(config.source) as task:
        others = lambda task, spec: questions.others(task, [spec])
        yield lambda seed: of_sources(config, task, seed, others)


class _Reached(Exception):
    """Ends a run at the step at which its task is learned."""


def of_words(config: Any, seed: int) -> World:
    """Returns the world of words, with a model pretrained for the seed."""
    rng = np.random.default_rng(seed)
    drawn = words.words(rng, 20_000 + config.examples + config.held_out)
    held_out, known, earlier = np.split(drawn, [config.held_out, config.held_out + config.examples])
    model, params = arithmetic.small_model(
        jax.random.key(seed), config.width, 2 * words.SIZE, VOCABULARY, config.layers
    )
    start = pretrained(config, model, params, earlier, rng, seed)
    stream = list(STREAM)
    wanted = [asked(name, known) for name in stream]
    # A share of the prompts has the answer to another word, which no rollout gives.
    wrong = rng.random(len(known)) < config.hopeless
    noisy = [(p, np.where(wrong[:, None], np.roll(a, 1, axis=0), a)) for p, a in wanted]
    right = probabilities(model)
    some = [words.rows_of((p[:256], a[:256])) for p, a in wanted]

    def rows(i, seed, earlier):
        rng = np.random.default_rng(seed)
        own, old = (
            words.rows_of(wanted[i]),
            earlier and words.rows_of(*(wanted[j] for j in earlier)),
        )
        again = round(config.replay * config.batch_size) if old else 0

        def pick(rows, count):
            chosen = rng.integers(0, len(rows["tokens"]), count)
            return jax.tree.map(lambda x: x[chosen], rows)

        while True:
            batch = pick(own, config.batch_size - again)
            yield (
                jax.tree.map(lambda *x: np.concatenate(x), batch, pick(old, again))
                if again
                else batch
            )

    def collect(i, credit, seed, ref_params, kept):
        prompts, answers = wanted[i] if kept is None else noisy[i]
        columns = {"answer": answers}
        drawn = rl.Prompts(prompts.tolist(), config.prompts_per_step, columns=columns, seed=seed)
        drawn = drawn if kept is None else only(drawn, kept)
        scores = [] if ref_params is None else [rl.add_reference(model.forward, ref_params, 1.0)]
        return rl.collect(drawn, answered(model, config.group_size), credit, *scores)

    def rates(params, i, seed):
        prompts, answers = noisy[i]
        asked = rl.Asked(prompts, [{}] * len(prompts), {"answer": answers})
        found = answered(model, config.draws)(params, asked, jax.random.key(seed))
        return found["rewards"].reshape(-1, config.draws).mean(axis=1)

    def fit(params, objective, batches, i, rows, seed):
        found = []

        def look(step, state):
            if (
                step % config.check == 0
                and float(right(state.params, some[i]).mean()) >= config.level
            ):
                found[:] = jax.tree.map(jnp.copy, state.params), step
                raise _Reached

        optimizer = arithmetic.policy_optimizer(config.learning_rate)
        try:
            state, _ = train.fit(
                params, objective, optimizer, batches, steps=config.steps, key=jax.random.key(seed),
                callbacks=[train.Callback(on_step=look)],
            )  # fmt: skip
        except _Reached:
            return found[0], found[1]
        return state.params, config.steps

    measure = measures(model, start, held_out, seed)
    return World(model, start, tuple(stream), measure, rows, collect, rates, fit)


def answered(model: Decoder, group_size: int) -> rl.Sample:
    """Returns sample(params, asked, key): answers to prompts of one length; reward 1 for `asked`'s answer.

    One compiled program serves all tasks, since the prompts and the right answers are not part of it.
    """
    draw = toy.sampler(model, words.SIZE, words.END)

    def sample(params, asked, key):
        repeat = lambda x: np.repeat(np.asarray(x, np.int32), group_size, axis=0)
        prompts, right = repeat(asked.ids), repeat(asked.columns["answer"])
        tokens, mask, log_probs = map(np.asarray, draw(params, prompts, key))
        whole = np.ones(prompts.shape, bool)
        batch = side_by_side(np, prompts, whole, tokens, mask, log_probs, log_probs)
        return batch | {
            "rewards": np.all(np.where(mask, tokens, -1) == right, axis=1).astype(np.float32),
            "truncated": ~np.any(mask & (tokens == words.END), axis=1),
        }

    return sample


def probabilities(model: Decoder) -> Callable[[Any, dict], jax.Array]:
    """Returns right(params, rows of `words.rows_of`) [B]: the probability of the whole answer."""
    return jax.jit(lambda params, rows: jnp.exp(words.log_probs(model, params, rows)))


def pretrained(config, model, params, drawn, rng, seed) -> Any:
    """Returns params trained on all tasks, those of the stream rarely, until they reach `until`."""
    rest = (1 - config.share) / len(words.OLD)
    parts = [rest] * len(words.OLD) + [config.share / len(STREAM)] * len(STREAM)
    names = rng.choice(list(TASKS), len(drawn), p=parts)
    rows = words.rows_of(*(asked(task, drawn[names == task]) for task in TASKS))
    some = words.rows_of(*(asked(task, drawn[:200]) for task in STREAM))
    right = probabilities(model)
    measure = lambda params: float(right(params, some).reshape(len(STREAM), -1).mean(axis=1).min())
    return arithmetic.warm_start(model, params, rows, seed, until=config.until, measure=measure)[0]


def measures(model: Decoder, start: Any, held_out: np.ndarray, seed: int) -> Callable[[Any], dict]:
    """Returns measure(params): accuracies of held-out words, and the KL to the start on the old tasks."""
    rows = words.rows_of(*(asked(task, held_out) for task in TASKS))
    prompts = jnp.concatenate([jnp.asarray(asked(task, held_out)[0]) for task in words.OLD])
    right, sample = probabilities(model), toy.sampler(model, words.SIZE, words.END)

    @jax.jit
    def divergence(params, completions, mask):
        batch = toy.rows(prompts, completions, mask)
        here, there = (words.logits(model, p, batch) for p in (params, start))
        return jnp.mean(jnp.sum(losses.reverse_kl_divergence(there, here) * mask, axis=1))

    def measure(params):
        rates = np.asarray(right(params, rows)).reshape(len(TASKS), -1).mean(axis=1)
        completions, mask, _ = sample(params, prompts, jax.random.key(seed))
        return {
            "tasks": rates[len(words.OLD) :].tolist(),
            "general": float(rates[: len(words.OLD)].mean()),
            "kl": float(divergence(params, completions, mask)),
        }

    return measure


def of_sources(
    config: Any,
    first: questions.Task,
    seed: int,
    others: Callable[[questions.Task, str], tuple[rl.Asked, Any]],
) -> World:
    """Returns the world of the sources `stream` and `eval_stream`, whose answers are verified.

    Args:
        first: the model, and the source of the general ability.
        others: (task, source) -> its questions, and what verifies answers to them.
    """
    known = [others(first, spec) for spec in config.stream]
    new = [others(first, spec) for spec in config.eval_stream]
    tasks = [
        first._replace(known=a, held_out=b, rewards=rewards)
        for (a, rewards), (b, _) in zip(known, new, strict=True)
    ]

    def measure(params):
        graded = lambda task: questions.graded(task, params, task.held_out, 1, seed)[1].mean()
        general, kl = questions.drift(first, params, first.held_out, first.rewards, seed)
        return {"tasks": [float(graded(task)) for task in tasks], "general": general, "kl": kl}

    def rows(i, seed, earlier):
        chosen = [tasks[i], *(tasks[j] for j in earlier or ())]
        parts = [documents.batches(task, config.batch_size, seed) for task in chosen]
        for own, *old in zip(*parts, strict=False):
            count = round(config.replay * config.batch_size / max(len(old), 1)) if old else 0
            cut = lambda batch, size: tree_util.tree_map(lambda x: np.asarray(x)[:size], batch)
            size = config.batch_size - count * len(old)
            some = [cut(own, size), *(cut(batch, count) for batch in old)]
            yield tree_util.tree_map(lambda *x: np.concatenate(x), *some)

    def collect(i, credit, seed, ref_params, kept):
        asked = tasks[i].known
        if kept is not None:
            numbers = np.flatnonzero(kept)
            asked = rl.Asked(*([x[j] for j in numbers] for x in (asked.ids, asked.records)))
        return questions.experience(
            tasks[i]._replace(known=asked), credit, config.prompts_per_step, seed,
            group_size=config.group_size, ref_params=ref_params,
        )  # fmt: skip

    def rates(params, i, seed):
        return questions.graded(tasks[i], params, tasks[i].known, config.draws, seed)[1].mean(
            axis=1
        )

    def fit(params, objective, batches, i, rows, seed):
        state, _ = questions.fit(
            tasks[i], params, objective, config.learning_rate, batches, rows, steps=config.steps,
            key=jax.random.key(seed),
        )  # fmt: skip
        return state.params, config.steps

    names = tuple(spec.removeprefix("rg:").partition("?")[0] for spec in config.stream)
    return World(first.model, first.params, names, measure, rows, collect, rates, fit)


def kept_prompts(config: Any, world: World, params: Any, i: int, seed: int) -> np.ndarray:
    """Returns which prompts of a task are kept: with `solved` 0, those that any rollout solves."""
    return learnable(world.rates(params, i, seed), above=config.solved, task=world.tasks[i])
