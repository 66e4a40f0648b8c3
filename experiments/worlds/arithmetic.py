"""A small, exactly measurable task for reinforcement learning: sums, by a character-level model.

The model is created here and trained until it gives the correct answer with a set probability, so that runs
of several seeds are comparable. Because only one string is correct, its probability p under the model is
pass@1 of a sample, and 1 - (1 - p)^k is pass@k: one forward pass, no sampling noise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import data, rl, train
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import completion_log_probs, supervised

# reasoning-gym draws entry i from seed + i.
TASK = "rg:chain_sum?min_terms=2&max_terms=2&min_digits=2&max_digits=2"
SEEDS_APART = 10_000_000
STOP = "\n"
ALPHABET = STOP + "0123456789+-=ABC|;"


class Sums(NamedTuple):
    """Questions and their correct answers as text: "57-87=" and "-30"."""

    questions: list[str]
    answers: list[str]


class Task(NamedTuple):
    """Data and model that the runs of one seed share."""

    model: Decoder
    start: Any  # params of the model, still untrained
    sums: Sums  # for training
    rows: dict[str, np.ndarray]  # `layout` of these
    held_out: Sums
    held_out_rows: dict[str, np.ndarray]
    records: list[dict]  # the held-out questions, for reasoning-gym's verifier
    probabilities: Callable[[Any, dict], jax.Array]  # `answer_probabilities` of the model


def task(seed: int, *, width: int = 96, size: int = 30_000, layers: int = 2) -> Task:
    """Makes additions of two two-digit numbers from `size` draws of chain_sum per split, and a model."""
    first = 1 + seed * SEEDS_APART
    spec = lambda first: f"{TASK}&size={size}&seed={first}"
    known, new, records = chain_sums(spec(first), spec(first + SEEDS_APART // 2))
    model, params = small_model(jax.random.key(seed), width, layers=layers)
    rows, new_rows = layout(*known), layout(*new)
    return Task(model, params, known, rows, new, new_rows, records, answer_probabilities(model))


def started(task: Task, seed: int, until: float) -> tuple[Any, int]:
    """Trains the model until its probability of a correct training answer is `until`: (params, steps)."""
    some = jax.tree.map(lambda x: x[:500], task.rows)
    measure = lambda params: float(jnp.mean(task.probabilities(params, some)))
    return warm_start(task.model, task.start, task.rows, seed, until=until, measure=measure)


def encode(texts: Sequence[str], alphabet: str = ALPHABET) -> list[list[int]]:
    """Returns the ids of each text's characters."""
    return [[alphabet.index(character) for character in text] for text in texts]


def decode(tokens: np.ndarray, mask: np.ndarray) -> str:
    """Decodes the masked tokens, without the stop character."""
    return "".join(ALPHABET[i] for i in tokens[mask]).rstrip(STOP)


def encode_answers(answers: Sequence[str], alphabet: str = ALPHABET) -> list[list[int]]:
    """Returns the ids of each answer and the stop character."""
    return encode([answer + STOP for answer in answers], alphabet)


def chain_sums(spec: str, held_out_spec: str) -> tuple[Sums, Sums, list[dict]]:
    """Returns (training, held out, held-out records): additions of reasoning-gym's chain_sum, shortened.

    Each question occurs once, and no training question is held out.
    """
    question = lambda record: record["metadata"]["metadata"]["expression"].replace(" ", "") + "="
    table = lambda spec: {question(r): r for r in data.load(spec) if "-" not in question(r)}
    known, new = table(spec), table(held_out_spec)
    new = {text: record for text, record in new.items() if text not in known}
    sums = lambda table: Sums(list(table), [r["metadata"]["answer"] for r in table.values()])
    return sums(known), sums(new), list(new.values())


def layout(
    questions: Sequence[str], answers: Sequence[str], alphabet: str = ALPHABET
) -> dict[str, np.ndarray]:
    """Rows of question and answer, padded at both ends like experience.

    `loss_mask` counts the answer with its stop character; `completion_mask` [B, N] is its last N columns.
    """
    asked, given = encode(questions, alphabet), encode_answers(answers, alphabet)
    lead, size = max(map(len, asked)), max(map(len, given))
    tokens = np.zeros((len(asked), lead + size), np.int32)
    seen = np.zeros(tokens.shape, bool)
    for row, valid, question, answer in zip(tokens, seen, asked, given, strict=True):
        place = slice(lead - len(question), lead + len(answer))
        row[place], valid[place] = question + answer, True
    mask = seen.copy()
    mask[:, :lead] = False
    positions = np.maximum(np.cumsum(seen, axis=1) - 1, 0).astype(np.int32)
    return {
        "tokens": tokens,
        "segment_ids": seen.astype(np.int32),
        "positions": positions,
        "loss_mask": mask.astype(np.float32),
        "completion_mask": mask[:, lead:],
    }


def small_model(
    key: jax.Array,
    width: int = 96,
    length: int = 64,
    vocabulary: int = len(ALPHABET),
    layers: int = 2,
) -> tuple[Decoder, Any]:
    """(model, params), with standard deviation inputs^-1/2 for kernels and embedding.

    The usual 0.02 is for widths of a thousand; at 96 it leaves the model near zero for hundreds of steps.
    """
    config = dataclasses.replace(
        tiny_config(vocabulary, length),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        head_dim=width // 4,
        num_layers=layers,
    )
    model = Decoder(config)
    params = jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]

    return model, rescaled(params)


def rescaled(params: Any) -> Any:
    """Params drawn with the deviation 0.02, with that of `small_model` for kernels and tables."""

    def rescale(path, x):
        inputs = {"kernel": x.shape[0], "embedding": x.shape[-1], "positions": x.shape[-1]}
        inputs = inputs.get(path[-1].key)
        return x if inputs is None else x * (inputs**-0.5 / 0.02)

    return jax.tree_util.tree_map_with_path(rescale, params)


def answer_probabilities(model: Decoder) -> Callable[[Any, dict], jax.Array]:
    """Returns probabilities(params, rows of `layout`) [B] of the whole answer, stop character included."""

    @jax.jit
    def probabilities(params, rows):
        return jnp.exp(jnp.sum(completion_log_probs(model.forward, params, rows), axis=1))

    return probabilities


def pass_at(probabilities: np.ndarray, k: int) -> float:
    """Mean over questions of 1 - (1 - p)^k."""
    return float(np.mean(1.0 - (1.0 - np.asarray(probabilities, np.float64)) ** k))


def warm_start(
    model: Decoder,
    params: Any,
    rows: dict[str, np.ndarray],
    seed: int,
    *,
    until: float,
    measure: Callable[[Any], float],
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    check: int = 10,
    most: int = 3000,
) -> tuple[Any, int]:
    """Trains on `rows` until measure(params) reaches `until`; returns (params, steps).

    After a fixed number of steps, seeds would differ too much in what is left to learn. `measure` must use
    only training questions: with held-out ones the start would be selected by the reported metric.

    Raises:
        RuntimeError: if `most` steps do not reach it.
    """
    reached: list[int] = []

    def look(step, state):
        if step % check == 0 and measure(state.params) >= until:
            reached.append(step)

    batches = itertools.islice(batches_of(rows, seed, batch_size), most)
    state, _ = train.fit(
        params,
        supervised(model.forward),
        optax.adamw(learning_rate),
        itertools.takewhile(lambda _: not reached, batches),
        callbacks=[train.Callback(on_step=look)],
    )
    if not reached:
        raise RuntimeError(f"warm_start: {until} was not reached in {most} steps.")
    return state.params, reached[0]


def batches_of(rows: dict[str, np.ndarray], seed: int, batch_size: int) -> Iterator[dict]:
    """Yields endless random batches of rows."""
    rng = np.random.default_rng(seed)
    rows = {name: rows[name] for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    count = len(rows["tokens"])
    while True:
        chosen = rng.integers(0, count, batch_size)
        yield jax.tree.map(lambda x, chosen=chosen: x[chosen], rows)


def epochs(rows: dict[str, np.ndarray], seed: int, batch_size: int) -> Iterator[dict]:
    """Yields endless batches of rows, each row once an epoch."""
    count = len(rows["tokens"])
    for draw in itertools.count():
        chosen = rl.prompts_of(draw, batch_size, count, seed)
        yield jax.tree.map(lambda x, chosen=chosen: x[chosen], rows)


def rising(learning_rate: float, steps: int = 10) -> optax.Schedule:
    """Learning rate that rises over its first steps, in which Adam's moments are unreliable."""
    return lambda step: learning_rate * jnp.minimum((step + 1) / steps, 1.0)


def policy_optimizer(
    learning_rate: float, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """Optimizer of all reinforcement learning methods on this task; the default decay is optax's."""
    adamw = optax.adamw(rising(learning_rate), weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def reinforce(
    model: Decoder,
    params: Any,
    sums: Sums,
    algorithm: rl.Algorithm,
    *,
    steps: int,
    seed: int,
    learning_rate: float = 3e-4,
    prompts_per_step: int = 32,
    group_size: int = 8,
    updates: int = 1,
    callbacks: Sequence[Any] = (),
) -> tuple[Any, list[dict]]:
    """Takes `steps` optimizer steps on the policy's answers, reward 1 if correct; (params, history)."""
    batches = experience(
        model,
        sums,
        algorithm.credit,
        prompts_per_step,
        seed,
        group_size=group_size,
        updates=updates,
    )
    state, history = train.fit(
        params,
        algorithm.objective,
        policy_optimizer(learning_rate),
        batches,
        steps=steps,
        key=jax.random.key(seed),
        callbacks=callbacks,
    )
    return state.params, history


def experience(
    model: Decoder, sums: Sums, credit: rl.Credit, per_step: int, seed: int, **settings: Any
) -> rl.Collector:
    """Returns `collect_on_device` of answers to sums, at temperature 1."""
    answers = encode_answers(sums.answers)
    size = max(map(len, answers))
    config = SamplingConfig(size, stop_ids=(ALPHABET.index(STOP),))
    reward = rl.equals(answers, size)
    prompts = rl.Prompts(encode(sums.questions), per_step, seed=seed)
    return rl.collect_on_device(model, prompts, reward, credit, config, **settings)
