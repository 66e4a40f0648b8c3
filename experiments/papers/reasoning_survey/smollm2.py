"""The part `--preset smollm2`: SmolLM2-135M-Instruct on reasoning-gym's chain_sum.

The question is that of reasoning-gym, as a chat, and the last number of the reply is the answer: "The final
answer to this arithmetic problem is 14." A reply has no steps, so that only choices among whole replies are
measured, with an outcome verifier. It is a linear head on the model's last hidden states, which stay as they
are: a state is computed once, however many methods read it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers.reasoning_survey import worlds
from experiments.papers.reasoning_survey.worlds import Ids, World
from experiments.worlds import arithmetic, questions, smollm2
from jaxft import data, train
from jaxft.generation import Verifier, left_pad
from jaxft.models import Prediction
from jaxft.objectives import process_reward
from jaxft.parallel import mesh_context

_SUMS = "rg:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size={}&seed={}"
SIZES = dict(
    model="smollm2", data=_SUMS.format(24, 1), eval_data=_SUMS.format(24, 1_000_000), fields={},
    eval_fields={}, max_prompt=64, max_new_tokens=20, sampled_at_once=32, trained_at_once=32,
    questions=24, held_out=24, sizes=(8,), most=8, own=8, rollouts=0, verifier_steps=40,
    rows_at_once=32,
)  # fmt: skip


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], World]]:
    """Yields seed -> World, the same for every seed."""
    with questions.opened(config.source, record_of) as task:
        made = world(config, smollm2.in_float32(task))
        yield lambda seed: made


def stated(text: str) -> str | None:
    """The last whole number of a text."""
    return (re.findall(r"-?\d+", text) or [None])[-1]


def record_of(row: Mapping[str, Any], fields: Mapping[str, str] | None) -> data.Record:
    """The record of an entry of reasoning-gym: its question as a chat."""
    system = {"role": "system", "content": "You add numbers."}
    kept = {name: row[name] for name in ("question", "answer", "metadata")}
    return {"prompt": [system, {"role": "user", "content": row["question"]}]} | kept


def world(config: Any, task: questions.Task) -> World:
    """Returns the world of the task's questions; the reward is that of the stated number."""
    rewards = lambda texts, rows: task.rewards([stated(x) or "" for x in texts], rows)
    decode = task.renderer.tokenizer.decode
    made = worlds.loaded(
        config, task._replace(rewards=rewards), sampler=worlds.filled(config.rows_at_once)
    )
    return made._replace(
        read=lambda ids: stated(decode(ids, skip_special_tokens=True)),
        reward_model=functools.partial(reward_model, config, states(task)),
    )


def states(task: questions.Task) -> Callable[[Sequence[Ids]], np.ndarray]:
    """Returns prefixes -> last hidden states [N, D] at their last tokens; each is computed once.

    The state of a prefix is read from that of a longer one in the same call, since attention is causal.
    """
    known: dict[Ids, np.ndarray] = {}
    at_once = task.settings.trained_at_once

    @jax.jit
    def run(params, tokens, valid):
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": valid.astype(jnp.int32)}
        return task.model.forward(params, batch, None).hidden

    def of(prefixes):
        new = set(prefixes) - known.keys()
        inside: dict[Ids, list[Ids]] = {}  # whole -> those of its prefixes that are read from it
        for whole in sorted(new, key=len, reverse=True):
            if whole in new:
                inside[whole] = [
                    whole[:end] for end in range(1, len(whole) + 1) if whole[:end] in new
                ]
                new -= set(inside[whole])
        wholes = list(inside)
        for start in range(0, len(wholes), at_once):
            part = wholes[start : start + at_once]
            more = part + [part[0]] * (at_once - len(part))
            with mesh_context(task.mesh):
                hidden = np.asarray(run(task.params, *left_pad(more, task.model.config)))
            for row, whole in zip(hidden, part, strict=False):
                own = row[len(row) - len(whole) :]
                known.update((prefix, own[len(prefix) - 1]) for prefix in inside[whole])
        return np.stack([known[prefix] for prefix in prefixes])

    return of


def reward_model(
    config: Any,
    states: Callable[[Sequence[Ids]], np.ndarray],
    rows: Mapping[str, np.ndarray],
    seed: int,
) -> Verifier:
    """Logistic regression of labels on standardised hidden states, from weights of 0.

    All labels are one batch, so that the seed has no effect.
    """
    ends, labels = rows["step_ends"], rows["step_labels"]
    places = [tuple(place) for place in np.argwhere(ends >= 0).tolist()]
    found = states([tuple(rows["tokens"][i, 0, : ends[i, j] + 1].tolist()) for i, j in places])
    middle, spread = found.mean(axis=0), found.std(axis=0) + 1e-6

    def inputs(found):
        return np.pad((found - middle) / spread, ((0, 0), (0, 1)), constant_values=1.0)

    count, values = len(places), np.array([labels[place] for place in places], np.float32)
    batch = {
        "tokens": np.zeros((count, 1, 1), np.int32), "loss_mask": np.ones((count, 1, 1), np.float32),
        "inputs": inputs(found)[:, None].astype(np.float32),
        "step_ends": np.zeros((count, 1), np.int32), "step_labels": values[:, None],
    }  # fmt: skip
    # The trunk's states are data: only the head is in the params.
    forward = lambda params, batch, key=None: Prediction(batch["inputs"], None)
    params = {"reward": {"kernel": jnp.zeros((found.shape[1] + 1, 1))}}
    optimizer = arithmetic.policy_optimizer(config.learning_rate)
    batches = itertools.repeat(batch, config.verifier_steps)
    params = train.fit(params, process_reward(forward), optimizer, batches)[0].params
    kernel = np.asarray(params["reward"]["kernel"], np.float64)[:, 0]
    return lambda prefixes: (1 / (1 + np.exp(-inputs(states(prefixes)) @ kernel))).tolist()
