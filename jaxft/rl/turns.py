"""Multi-turn episodes: actions of the policy and replies of an environment in one row of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.checkpoints import check_tokenizer
from jaxft.generation import SamplingConfig, bucket, generate, left_pad
from jaxft.generation.turns import can_continue, first_turn, next_turn
from jaxft.keys import stream
from jaxft.models import Decoder, virtual_tokens
from jaxft.rl.environments import Environment
from jaxft.rl.prompts import MIN_BUCKET
from jaxft.rl.rollouts import (
    Batch,
    Sample,
    check_policy,
    columns_of,
    padded,
    side_by_side,
    with_columns,
)

# Who wrote a token of a response; 0 is padding.
POLICY, FORCED, ENVIRONMENT, GUIDE = 1, 2, 3, 4


@dataclasses.dataclass
class Episode:
    """One episode (row) under construction."""

    prompt: list[int]
    state: Any
    ids: list[int] = dataclasses.field(default_factory=list)  # after the prompt
    authors: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(
        default_factory=list
    )  # 0 except for the policy's tokens
    behaviour: list[float] = dataclasses.field(default_factory=list)
    lead: str = ""  # forced beginning of its next action
    reward: float = 0.0
    turns: int = 0
    done: bool = False
    truncated: bool = False

    def write(self, ids, author, log_probs=None, behaviour=None) -> None:
        """Appends tokens of one author."""
        zeros = [0.0] * len(ids)
        self.ids += ids
        self.authors += [author] * len(ids)
        self.log_probs += zeros if log_probs is None else list(log_probs)
        self.behaviour += zeros if behaviour is None else list(behaviour)


def episodes(
    model: Decoder,
    tokenizer: Any,
    environment: Environment,
    config: SamplingConfig,
    group_size: int,
    *,
    next_turn: Callable[[str], Sequence[int]],
    max_observation: int = 2000,
    sampler: Callable[..., Any] | None = None,
) -> Sample:
    """Returns a sampler of `group_size` episodes from each prompt, for `collect`.

    Each turn's prompt is the ids so far; sampled ids are reused without encoding them again, and their keys
    and values are kept from turn to turn, so that only new tokens are computed. An action that
    reaches the limit of new tokens ends its episode, truncated, after its reply's reward; so does an action
    after which the model's context has no room for another. The batch has `author` [B, N] (POLICY, FORCED,
    ENVIRONMENT) and `turns` [B]; `completion_mask` counts only the policy's tokens.

    A row's samples depend only on its row number and turn, not on which other episodes continue; with an
    environment of one turn the result equals `answers`.

    Args:
        config: sampling config of one turn. Text after a stop string is left to the next turn.
        next_turn: function that returns the ids of an observation after an action's stop token and the
            prompt for the next action: `Renderer.next_turn`.
        max_observation: maximum characters; the middle of a longer observation is removed.
        sampler: a function with the signature of `generate`, called with the whole contexts each turn; None:
            this process samples. Caches that cannot go on (`can_continue`) are also filled anew each turn.
    """
    check_policy(config)
    check_tokenizer(tokenizer, model.config)
    kept = sampler is None and can_continue(model)

    def draw(params, rows, columns, going, turn, key, before):
        """Samples the actions of the rows `going`, and returns what the next turn needs of this one."""
        run = _in_cache if kept else functools.partial(_anew, sampler or generate)
        draw_from = functools.partial(run, before, model, params, tokenizer=tokenizer)
        if turn == 0:  # One prefill per group.
            prompts = [row.prompt for row in rows[::group_size]]
            return draw_from(prompts, key, config, samples=group_size, **columns_of(columns))
        contexts = [rows[i].prompt + rows[i].ids for i in going]
        key = stream(key, "turn", turn)  # `generate` folds the rows' numbers into the key itself.
        given = {name: x[np.array(going) // group_size] for name, x in columns.items()}
        return draw_from(contexts, key, config, row_ids=going, **columns_of(given))

    def observe(row, reply, room):
        """Appends the observation if there is room for it and the next action."""
        closing = [] if row.ids[-1] in config.stop_ids else list(config.stop_ids[:1])
        shown = list(next_turn(_cut(reply.observation, max_observation)))
        forced = _encode(tokenizer, reply.forced)
        if len(row.prompt + row.ids + closing + shown + forced) > room:
            row.done = row.truncated = True
            return
        row.write(closing, FORCED)
        row.write(shown, ENVIRONMENT)
        row.write(forced, FORCED)
        row.lead = reply.forced

    def sample(params, asked, key):
        states = environment.start([r for r in asked.records for _ in range(group_size)])
        rows = [Episode(list(prompt), None) for prompt in asked.ids for _ in range(group_size)]
        rows = [dataclasses.replace(row, state=s) for row, s in zip(rows, states, strict=True)]
        room = model.config.max_length - virtual_tokens(params) - config.max_new_tokens
        before = None
        for turn in range(environment.turns):
            going = [i for i, row in enumerate(rows) if not row.done]
            if not going:
                break
            out, before = draw(params, rows, asked.columns, going, turn, key, before)
            acting = [rows[i] for i in going]
            for row, reply in zip(acting, _act(acting, out, environment, tokenizer), strict=True):
                row.done = row.truncated or reply.observation is None
                row.done |= turn + 1 == environment.turns
                if not row.done:
                    observe(row, reply, room)
        longest = config.max_new_tokens if environment.turns == 1 else model.config.max_length
        batch = _as_batch(rows, group_size, model.config, longest)
        batch = batch if asked.width is None else padded(batch, asked.width, longest)
        return with_columns(batch, asked.columns, group_size)

    return sample


def _anew(sampler, before, *given, **settings):
    """The actions of one turn, whose contexts the sampler reads from their first token on."""
    del before
    return sampler(*given, **settings), None


def _in_cache(
    before, model, params, contexts, key, config, *, row_ids=None, columns=None, **settings
):
    """The same in the cache of the turn before: (actions, (the rows, which are `row_ids`, their `Turn`))."""
    if before is None:
        given = columns_of(columns) | settings
        out, turn = first_turn(model, params, contexts, key, config, **given)
        return out, (list(range(len(turn.contexts))), turn)
    ids, turn = before
    rows = [ids.index(i) for i in row_ids]
    settings |= {"row_ids": row_ids}
    out, turn = next_turn(model, params, turn, rows, contexts, key, config, **settings)
    return out, (row_ids, turn)


def _act(rows, out, environment, tokenizer):
    """Appends the rows' actions; returns the environment's replies."""
    texts = []
    for i, row in enumerate(rows):
        mask = out.mask[i]
        ids = out.tokens[i][mask].tolist()
        row.write(ids, POLICY, out.log_probs[i][mask], out.sampler_log_probs[i][mask])
        row.truncated = out.finish[i] == "length"
        texts.append((row.lead + tokenizer.decode(ids, skip_special_tokens=True)).strip())
    replies = environment.step([row.state for row in rows], texts)
    for row, (state, reply) in zip(rows, replies, strict=True):
        row.state = state
        row.reward += reply.reward
        row.turns += 1
    return [reply for _, reply in replies]


def _as_batch(rows: Sequence[Episode], group_size: int, config: Any, limit: int) -> Batch:
    """Builds a batch of the rows, with at most `limit` response columns."""
    tokens, valid = left_pad([row.prompt for row in rows[::group_size]], config)
    count = len(rows) // group_size
    repeat = lambda x: np.repeat(x[:count], group_size, axis=0)
    size = min(bucket(max(len(row.ids) for row in rows), MIN_BUCKET), limit)

    def table(name, dtype):
        filled = np.zeros((len(rows), size), dtype)
        for line, row in zip(filled, rows, strict=True):
            line[: len(row.ids)] = getattr(row, name)
        return filled

    author = table("authors", np.int8)
    ids, log_probs = table("ids", np.int32), table("log_probs", np.float32)
    parts = (ids, author > 0, log_probs, table("behaviour", np.float32))
    of_rows = lambda name, dtype: np.array([getattr(row, name) for row in rows], dtype)
    return side_by_side(np, repeat(tokens), repeat(valid), *parts) | {
        "author": author,
        "completion_mask": author == POLICY,
        "rewards": of_rows("reward", np.float32),
        "truncated": of_rows("truncated", bool),
        "turns": of_rows("turns", np.float32),
    }


def _cut(text: str, most: int) -> str:
    """Replaces the middle of a text of more than `most` characters by a mark."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


def _encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False) if text else []
