"""Guided feedback: a stronger model, the guide, writes the beginning or the end of each response.

Chang et al., 2023, arxiv.org/abs/2306.11816; the authors' code is github.com/Cornell-RL/tril.

    policy, guide = writer(model, config), writer(model, config, guide_params)
    sample = guided_answers(model, policy, guide, judge, lols(0.8), size=config.max_new_tokens)
    credit, objective = guided_ppo(model.forward)
    batches = collect(prompts, sample, credit, add_guided_policy(model.forward, 1.0), updates=2, epochs=2)
    fit(with_critics(model, params), objective, optimizer, batches, steps=100)

A response has a roll-in, its first h tokens, and a roll-out, the rest. The policy's tokens train the policy;
the roll-out's tokens train the critic of its writer, which is also the one of GAE:

| schedule | roll-in | roll-out | policy loss on | critic, and where it is trained |
|---|---|---|---|---|
| PPO: `guide_begins`, mix 0 | - | policy | all tokens | V, all tokens |
| PPO++: `guide_begins` | guide | policy | t > h | V, t > h |
| AggreVaTeD: `guide_ends` | policy | guide | t <= h | V^g, t > h |
| LOLS: `lols(tau)` | PPO++ in a share tau of the rollouts, else AggreVaTeD | | | |
| D2LOLS: `d2lols(tau)` | AggreVaTeD in the first tau rollouts, then PPO++ | | | |

The critics and PPO are in `jaxft.rl.two_critics`. Batches have `author` [B, N] (POLICY, GUIDE; 0 is padding)
and `guide_critic` [B], True where the guide ends; `completion_mask` counts the tokens of both writers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxft.generation import Generation, SamplingConfig, generate, left_pad
from jaxft.keys import stream
from jaxft.models import Decoder
from jaxft.rl.rollouts import Sample, check_no_columns, check_policy, padded, side_by_side
from jaxft.rl.turns import GUIDE, POLICY

# (params, contexts, limits [B], key) -> at most limits[i] new tokens after each context
Writer = Callable[[Any, list[list[int]], np.ndarray, jax.Array], Generation]
# (number of the rollout, key) -> True if the guide begins and the policy ends, False if they change places
Schedule = Callable[[int, jax.Array], Any]
# (completions, records) -> rewards [B], NaN for no verdict
Judge = Callable[[list[list[int]], Sequence[Mapping[str, Any]]], Any]


def writer(
    model: Decoder,
    config: SamplingConfig,
    params: Any = None,
    *,
    sampler: Callable[..., Generation] = generate,
    tokenizer: Any = None,
) -> Writer:
    """Returns a writer that samples from the policy or, with `params`, from a frozen guide.

    A guide that is not a Decoder of this process is any function with the signature of `Writer`; only its
    tokens and their mask are needed.

    Args:
        config: its own sampling config. The ratio of PPO is that of the full vocabulary, so a policy should
            not truncate its distribution.
        sampler: a function with the signature of `generate`, `limits` included.
        tokenizer: needed for stop strings.

    Raises:
        ValueError: for a policy that is greedy.
    """
    if params is None:
        check_policy(config)

    def write(current, contexts, limits, key):
        own = current if params is None else params
        return sampler(model, own, contexts, key, config, limits=limits, tokenizer=tokenizer)

    return write


def guide_begins(number: int, key: jax.Array) -> bool:
    """Returns True: the schedule of PPO++, and of PPO with a mix of 0."""
    del number, key
    return True


def guide_ends(number: int, key: jax.Array) -> bool:
    """Returns False: the schedule of AggreVaTeD."""
    del number, key
    return False


def lols(tau: float = 0.8) -> Schedule:
    """Returns the schedule of LOLS: PPO++ with probability tau, else AggreVaTeD.

    Raises:
        ValueError: for a tau outside of [0, 1].
    """
    _check_share("lols: tau", tau)
    return lambda number, key: jax.random.bernoulli(stream(key, "schedule"), tau)


def d2lols(tau: int) -> Schedule:
    """Returns the schedule of D2LOLS: AggreVaTeD in the first `tau` rollouts, then PPO++.

    Raises:
        ValueError: for a negative tau.
    """
    if tau < 0:
        raise ValueError(f"d2lols: tau must be at least 0 rollouts, got {tau}.")
    return lambda number, key: number >= tau


def switch_times(key: jax.Array, lengths: Int[Array, " B"], mix: float) -> Int[Array, " B"]:
    """h [B]: uniform in 1..L - 1 with probability `mix`, else 0; 0 for roll-ins of L < 2 tokens.

    Raises:
        ValueError: for a mix outside of [0, 1].
    """
    _check_share("switch_times: mix", mix)
    lengths = jnp.asarray(lengths)
    drawn = jax.random.randint(
        stream(key, "place"), lengths.shape, 1, jnp.maximum(lengths, 2), lengths.dtype
    )
    mixed = jax.random.bernoulli(stream(key, "mixed"), mix, lengths.shape)
    return jnp.where(mixed & (lengths >= 2), drawn, 0)


class Mixed(NamedTuple):
    """Responses of two writers, [B, N] arrays of numpy."""

    tokens: np.ndarray  # int32
    mask: np.ndarray  # bool, True on tokens of either writer
    rolled_in: np.ndarray  # bool, True on the first h tokens
    log_probs: np.ndarray  # each token's under its own writer, as that writer's Generation has it
    sampler_log_probs: np.ndarray
    switch: np.ndarray  # [B] int, h
    truncated: np.ndarray  # [B] bool, True if a response reached `size` tokens without an end


def mixed_rollout(
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    first: Writer,
    last: Writer,
    size: int,
    mix: float = 0.8,
) -> Mixed:
    """Samples a whole roll-in of each prompt, keeps its first h tokens, and lets `last` continue.

    With a mix of 0 nothing is rolled in, and `last` gets the key itself: the result is that of
    `generate(model, params, prompts, key, config)`.

    Args:
        params: of the policy, which writers with params of their own ignore.
        size: N, tokens of the longest response.
        mix: see `switch_times`.

    Raises:
        ValueError: for a mix outside of [0, 1], or a writer that returns other rows than the contexts, more
            tokens than its limits, or no token at all.
    """
    _check_share("mixed_rollout: mix", mix)
    limits, begun = np.full(len(prompts), size), None
    switch, contexts = np.zeros(len(prompts), int), [list(prompt) for prompt in prompts]
    if mix:
        begun = _written(first, "roll-in", params, contexts, limits, stream(key, "roll-in"), size)
        lengths = begun.mask.sum(axis=1)
        switch = np.asarray(switch_times(stream(key, "switch"), lengths, mix))
        rows = zip(contexts, begun.tokens, switch, strict=True)
        contexts = [context + tokens[:h].tolist() for context, tokens, h in rows]
    ended = _written(last, "roll-out", params, contexts, limits - switch, key, size)
    place = np.arange(size)[None]
    early = place < switch[:, None]
    after = np.maximum(place - switch[:, None], 0)
    join = lambda a, b: np.where(early, a, np.take_along_axis(b, after, axis=1))
    names = ("tokens", "mask", "log_probs", "sampler_log_probs")
    tokens, mask, *scores = (join(getattr(begun or ended, n), getattr(ended, n)) for n in names)
    return Mixed(tokens, mask, early & mask, *scores, switch, np.array(ended.finish) == "length")


def guided_answers(
    model: Decoder,
    policy: Writer,
    guide: Writer,
    judge: Judge,
    schedule: Schedule,
    *,
    size: int,
    mix: float = 0.8,
) -> Sample:
    """Returns a sampler for `collect`: one mixed response to each prompt, with authors.

    `sampler_log_probs` are those of each token's writer. Logged: `switch` (h, in tokens) and
    `guide_tokens` (the guide's share of a response).

    Args:
        model: a Decoder, whose config the batch is laid out for.
        judge: function of the completions (token ids, stop token included) and the prompts' records; for
            rewards of texts, `jaxft.rl.rollouts.judged`.
        schedule: `guide_begins`, `guide_ends`, `lols(tau)`, `d2lols(tau)` or any other; its number is that
            of the draw of prompts, which equals the rollout's unless draws are repeated (`until_contrast`).
        size, mix: see `mixed_rollout`.

    Raises:
        ValueError: for a mix outside of [0, 1].
    """
    _check_share("guided_answers: mix", mix)

    def sample(params, asked, key):
        check_no_columns(asked.columns, "guided_answers")
        begins, count = bool(schedule(asked.number, key)), len(asked.ids)
        pair = (guide, policy) if begins else (policy, guide)
        out = mixed_rollout(params, asked.ids, key, *pair, size, mix)
        tokens, valid = left_pad(asked.ids, model.config)
        scores = (out.log_probs, out.sampler_log_probs)
        batch = side_by_side(np, tokens[:count], valid[:count], out.tokens, out.mask, *scores)
        written = np.where(out.rolled_in == begins, GUIDE, POLICY)
        batch |= {"author": np.where(out.mask, written, 0).astype(np.int8)}
        if asked.width is not None:
            batch = padded(batch, asked.width, size)
        given = [row[seen].tolist() for row, seen in zip(out.tokens, out.mask, strict=True)]
        by_guide = (batch["author"] == GUIDE).sum(axis=1) / np.maximum(out.mask.sum(axis=1), 1)
        return batch | {
            "guide_critic": np.full(count, not begins),
            "rewards": judge(given, asked.records),
            "truncated": out.truncated,
            "stats": {"switch": out.switch * 1.0, "guide_tokens": by_guide},
        }

    return sample


def _written(write, name, params, contexts, limits, key, size):
    """Returns what a writer gives, with `size` columns."""
    found = write(params, contexts, limits, key)
    counts = np.asarray(found.mask).sum(axis=1)
    if len(counts) != len(contexts) or (counts > limits).any():
        raise ValueError(
            f"guided: the {name} must have {len(contexts)} rows of at most the given limits ({limits.max()} "
            f"tokens), got {len(counts)} rows of up to {counts.max(initial=0)}; cut what the writer returns."
        )
    if not counts.any():
        raise ValueError(
            f"guided: the {name} has no token in any of {len(counts)} rows; check the writer's stop ids."
        )
    fit = lambda x: np.pad(x[:, :size], ((0, 0), (0, max(size - x.shape[1], 0))))
    return Generation(*(fit(np.asarray(x)) for x in found[:4]), found.finish)


def _check_share(name, value):
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}; the paper uses 0.8.")
