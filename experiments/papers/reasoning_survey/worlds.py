"""Worlds of the survey's script: sums written in steps, or questions for a model of the hub.

`config` is the Config of main.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.worlds import arithmetic, questions, running_sums
from experiments.worlds.loaded import in_parts
from jaxft import data, rl, train
from jaxft.generation import Cost, Policy, SamplingConfig, Verifier, decoder_policy
from jaxft.keys import stream
from jaxft.models import Decoder
from jaxft.objectives import process_reward
from jaxft.parallel import mesh_context
from jaxft.rewards import add_reward_head, prefix_verifier, stated_answer

Ids = tuple[int, ...]
Right = Callable[[Sequence[int], Sequence[Ids]], Sequence[bool]]


AGENTS = 4  # of a debate, each of whose prompts holds the others' chains


class World(NamedTuple):
    """A model and questions with verified answers; prompts and answers are token ids."""

    model: Decoder
    start: Any  # params
    cost: Cost  # of a token in the model, and in a verifier that is trained from it
    known: list[Ids]  # prompts to learn from
    held_out: list[Ids]
    right_known: Right  # (numbers of prompts, answers) -> whether each answer is right
    right: Right  # the same of held-out prompts
    read: Callable[[Ids], Hashable | None]  # answer -> what is voted on
    ends: Callable[[Ids], list[int]]  # answer -> the tokens up to the end of each step
    again: Callable[[int, Sequence[Ids]], Ids]  # (held-out prompt, attempts) -> prompt after these
    chains: Callable[..., Policy]  # (params, temperature) -> policy whose steps are whole answers
    steps: Callable[[Any], Policy]  # params -> policy of single steps
    depth: int  # steps of an answer, at most
    # (rows with step_ends and step_labels, seed) -> the verifier that learns the labels
    reward_model: Callable[[dict, int], Verifier]
    fit: Callable[..., Any]  # (params, objective, learning rate, batches, rows, steps) -> params
    reinforce: Callable[..., Any]  # (algorithm, steps, seed) -> params from the start


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World: sums written in steps or, with --preset full, the source's questions."""
    if config.preset != "full":
        yield functools.partial(sums, config)
        return
    with questions.opened(config.source) as task:
        world = loaded(config, task)
        yield lambda seed: world


def cost_of(config: Any, params: Any) -> Cost:
    """Returns what a token costs in a decoder of this config."""
    count = sum(x.size for x in jax.tree.leaves(params))
    return Cost(count, config.num_layers * config.hidden_size)


def sums(config: Any, seed: int) -> World:
    """Returns the world of sums of a seed; its model trains here."""
    terms, sizes = config.terms, (config.pretraining, config.questions, config.held_out)
    made = running_sums.started(
        seed, sizes, terms=terms, max_length=AGENTS * running_sums.length(terms), width=config.width,
        layers=config.layers, until=config.until, most=config.most_steps,
    )  # fmt: skip
    print(f"seed {seed}: {made.steps} steps of pretraining", flush=True)
    model, size = made.model, (running_sums.DIGITS + 1) * (terms - 1)
    stop, bar = map(arithmetic.ALPHABET.index, (arithmetic.STOP, running_sums.STEP))
    prompts = lambda numbers: [
        tuple(ids) for ids in arithmetic.encode(list(map(running_sums.question, numbers.tolist())))
    ]
    known, held_out = prompts(made.known), prompts(made.held_out)

    def read(ids):
        text = "".join(arithmetic.ALPHABET[i] for i in ids).removesuffix(arithmetic.STOP)
        return running_sums.result(text, terms)

    def right(numbers):
        totals = list(map(running_sums.written, numbers.sum(axis=1)))
        return lambda chosen, answers: [
            read(ids) == totals[i] for i, ids in zip(chosen, answers, strict=True)
        ]

    def ends(ids):
        inner = [i + 1 for i, token in enumerate(ids[:-1]) if token == bar]
        return [*inner, len(ids)]

    def policy(params, tokens, stops, temperature=1.0):
        rules = SamplingConfig(tokens, temperature, stop_ids=stops)
        return decoder_policy(model, params, rules, (stop,), filled(config.rows_at_once))

    def fit(params, objective, rate, batches, rows, steps):
        optimizer = arithmetic.policy_optimizer(rate)
        return train.fit(params, objective, optimizer, batches, steps=steps)[0].params

    def reinforce(algorithm, steps, seed):
        batches = rl.collect_on_device(
            model, rl.Prompts(known, 32, seed=seed), running_sums.total_reward(made.known),
            algorithm.credit, SamplingConfig(size, stop_ids=(stop,)), group_size=8,
        )  # fmt: skip
        return fit(made.params, algorithm.objective, config.rl_rate, batches, 256, steps)

    return World(
        model, made.params, cost_of(model.config, made.params), known, held_out,
        right(made.known), right(made.held_out), read, ends,
        lambda number, attempts: sum((held_out[number] + ids for ids in attempts), ())
        + held_out[number],
        lambda params, temperature=1.0: policy(params, size, (stop,), temperature),
        lambda params: policy(params, running_sums.DIGITS + 1, (bar, stop)),
        terms - 1,
        functools.partial(
            reward_model, config, model, made.params, fit,
            lambda params: prefix_verifier(model, params, at_once=config.rows_at_once),
        ),
        fit, reinforce,
    )  # fmt: skip


def reward_model(
    config: Any,
    model: Decoder,
    start: Any,
    fit: Callable[..., Any],
    verifier: Callable[[Any], Verifier],
    rows: dict[str, np.ndarray],
    seed: int,
) -> Verifier:
    """Trains all params of the start, with a reward head, on labels at the ends of steps."""
    key = stream(jax.random.key(seed), "reward head")
    params = add_reward_head(key, start, model.config.hidden_size)
    rate, size = config.learning_rate, config.batch_size
    batches, objective = arithmetic.epochs(rows, seed, size), process_reward(model.forward)
    return verifier(fit(params, objective, rate, batches, size, config.verifier_steps))


def filled(at_once: int) -> Callable[..., Any]:
    """Returns `generate` of `at_once` rows at a time, always as many: few programs are compiled."""

    def sample(model, params, prompts, key, rules, samples):
        size = max(1, at_once // samples)
        more = -len(prompts) % size
        prompts = [*prompts, *[prompts[0]] * more]
        out = in_parts(model, params, prompts, key, rules, at_once=size, samples=samples)
        kept = (len(prompts) - more) * samples
        return out._replace(**{name: x[:kept] for name, x in out._asdict().items()})

    return sample


def loaded(
    config: Any,
    task: questions.Task,
    sampler: Callable[..., Any] | None = None,
) -> World:
    """Returns the world of a model's questions; a step ends with an empty line.

    `sampler` has the arguments of `generate`; None: the task's.
    """
    tokenizer, settings = task.renderer.tokenizer, task.settings
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    ending, sampler = task.sampling.stop_ids, sampler or questions.sampler(task)
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    parts = [[i for i, text in enumerate(texts) if mark in text] for mark in ("\n\n", "\n")]
    breaks = tuple(set(parts[0] or parts[1]) - set(ending))

    def right(asked):
        return lambda chosen, answers: [
            value >= 1
            for value in task.rewards(
                [decode(ids).strip() for ids in answers], [asked.records[i] for i in chosen]
            )
        ]

    def again(number, attempts):
        # Attempts are cut so that prompt and answer fit.
        room = task.model.config.max_length - settings.max_prompt - settings.max_new_tokens
        room = max(0, room - 64) // max(1, len(attempts))
        earlier = [f"\n\nAn earlier solution:\n{decode(ids[:room]).strip()}" for ids in attempts]
        said = data.as_messages(task.held_out.records[number])
        asked = [message["content"] for message in said or () if message["role"] == "user"]
        asked = asked[-1] if asked else task.held_out.records[number]["prompt"]
        text = f"{asked}{''.join(earlier)}\n\nIt may be wrong. Solve the problem."
        record = data.normalise_question({"question": text, "answer": "0"})
        return tuple(data.render_prompts([record], task.renderer)[0])

    def policy(params, tokens, stops, temperature=1.0):
        rules = SamplingConfig(tokens, temperature, stop_ids=stops)
        inner = decoder_policy(task.model, params, rules, ending, sampler)

        def propose(*args):
            with mesh_context(task.mesh):
                return inner(*args)

        return propose

    def ends(ids):
        inner = [i + 1 for i, token in enumerate(ids[:-1]) if token in breaks]
        return [*inner, len(ids)]

    def fit(params, objective, rate, batches, rows, steps):
        return questions.fit(task, params, objective, rate, batches, rows, steps=steps)[0].params

    def reinforce(algorithm, steps, seed):
        sizes = dict(prompts_per_step=config.batch_size // 8, group_size=8)
        return questions.reinforce(
            task, algorithm, steps=steps, seed=seed, learning_rate=config.rl_rate, **sizes
        )[0]

    return World(
        task.model, task.params, cost_of(task.model.config, task.params),
        list(map(tuple, task.known.ids))[: config.questions],
        list(map(tuple, task.held_out.ids))[: config.held_out],
        right(task.known), right(task.held_out), lambda ids: stated_answer(decode(ids)), ends, again,
        lambda params, temperature=1.0: policy(
            params, settings.max_new_tokens, ending, temperature
        ),
        # Steps are cut so that all of them are no longer than an answer.
        lambda params: policy(
            params, max(1, settings.max_new_tokens // config.depth), (*breaks, *ending)
        ),
        config.depth,
        functools.partial(
            reward_model, config, task.model, task.params, fit,
            lambda params: prefix_verifier(
                task.model, params, at_once=settings.trained_at_once, mesh=task.mesh
            ),
        ),
        fit, reinforce,
    )  # fmt: skip


def padded(pairs: Sequence[tuple[Ids, Ids]]) -> dict[str, np.ndarray]:
    """Rows [N, T] of prompts and answers, padded at the end; the loss is on the answers."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens = np.zeros((len(pairs), width), np.int32)
    seen, mask = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for i, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        tokens[i, :end], seen[i, :end], mask[i, len(prompt) : end] = prompt + answer, 1, 1
    positions = np.maximum(np.cumsum(seen, axis=1, dtype=np.int32) - 1, 0)
    return {"tokens": tokens, "segment_ids": seen, "positions": positions, "loss_mask": mask}
