"""Groups of responses sampled from the policy, laid out as a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation import SamplingConfig, bucket, decode, fork, generate, left_pad, prefill
from jaxft.models import Decoder
from jaxft.objectives import completion_log_probs
from jaxft.rl.advantages import has_contrast

MIN_BUCKET = 16  # of response lengths

Batch = dict[str, Any]
# (rewards [B], batch) -> what the objective needs besides, such as {"advantages": [B]}
Credit = Callable[[Any, Batch], Batch]

SAMPLING = 0x5A  # purpose of the derived key

score = jax.jit(completion_log_probs, static_argnames=("model", "temperature", "chunk"))


def sample_groups(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    group_size: int,
    *,
    tokenizer: Any = None,
) -> tuple[Batch, list[list[int]]]:
    """(batch, completions): `group_size` responses to each prompt, side by side, from one prefill.

    The batch is that of jaxft.objectives.policy_gradient, as numpy arrays: `sampler_log_probs` under the
    full vocabulary at the temperature; `behaviour_log_probs` under what was sampled from (with top-k,
    top-p or min-p, log π - log of the mass kept); `truncated` [B], True where a response reached the
    limit. Its columns are buckets, of the longest prompt and the longest response.

    Raises:
        ValueError: for greedy sampling, of which no policy gradient can be taken.
    """
    check_policy(config)
    out = generate(model, params, prompts, key, config, samples=group_size, tokenizer=tokenizer)
    tokens, valid = left_pad(prompts, model.config)
    repeat = lambda x: np.repeat(x[: len(prompts)], group_size, axis=0)
    longest = int(out.mask.sum(axis=1).max())
    size = min(bucket(longest, MIN_BUCKET), config.max_new_tokens)
    cut = lambda x: x[:, :size]
    batch = lay_out(
        np,
        repeat(tokens),
        repeat(valid),
        *map(cut, (out.tokens, out.mask, out.log_probs, out.sampler_log_probs)),
    )
    return batch | {"truncated": np.array(out.finish) == "length"}, out.completions


def collect_on_device(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    credit: Credit,
    config: SamplingConfig,
    *,
    prompts_per_step: int,
    group_size: int,
    seed: int = 0,
) -> Callable[[Any], Batch]:
    """As `collect`, with the reward 1 for a response that is its target token by token, else 0.

    Sampling, rewards and advantages are one compiled program, from which nothing returns to the host. A
    target includes the stop token. All prompts share one bucket.

    Raises:
        ValueError: for a target longer than max_new_tokens, which could never be met.
    """
    check_policy(config)
    size = config.max_new_tokens
    if len(prompts) != len(targets) or max(map(len, targets)) > size:
        raise ValueError(
            f"collect_on_device: needs one target a prompt, of at most max_new_tokens = {size}; got "
            f"{len(targets)} for {len(prompts)}, the longest {max(map(len, targets))}."
        )
    tokens, valid = map(jnp.asarray, left_pad(prompts, model.config))
    wanted = jnp.asarray(_right_pad(targets, size))

    @jax.jit
    def run(params, key, chosen):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(chosen)))
        slots = tokens.shape[1] + size
        state = prefill(model, params, tokens[chosen], valid[chosen], keys, slots)
        state, part = decode(model, params, fork(state, group_size), config, steps=size)
        repeat = lambda x: jnp.repeat(x[chosen], group_size, axis=0)
        batch = lay_out(jnp, repeat(tokens), repeat(valid), *part)
        value = same_tokens(part.tokens, part.mask, repeat(wanted)).astype(jnp.float32)
        flat = ~jnp.repeat(has_contrast(value, group_size), group_size)
        truncated = (~state.done).astype(jnp.float32)
        batch["stats"] = {"reward": value, "truncated": truncated, "no_contrast": flat * 1.0}
        return batch | credit(value, batch)

    def batches(state):
        draw = int(state.step)
        chosen = prompts_of(draw, prompts_per_step, len(prompts), seed)
        key = jax.random.fold_in(jax.random.fold_in(state.key, SAMPLING), draw)
        return run(state.params, key, jnp.asarray(chosen))

    return batches


def same_tokens(tokens: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
    """[B]: whether the tokens that the mask counts are those of the target [B, N], padded with -1."""
    given = jnp.where(mask, tokens, -1)
    return jnp.all(given == targets, axis=1)


def lay_out(xp, prompts, valid, tokens, mask, log_probs, sampler_log_probs):
    """The batch of prompts [B, P] and responses [B, N] side by side, padding at either end of a row."""
    seen = xp.concatenate([valid, mask], axis=1)
    return {
        "tokens": xp.concatenate([prompts, xp.where(mask, tokens, 0)], axis=1),
        "segment_ids": seen.astype(xp.int32),
        "positions": xp.maximum(xp.cumsum(seen, axis=1) - 1, 0).astype(xp.int32),
        "completion_mask": mask,
        "sampler_log_probs": log_probs,
        "behaviour_log_probs": sampler_log_probs,
    }


def prompts_of(draw: int, count: int, size: int, seed: int) -> list[int]:
    """The draw-th `count` prompts of `size` in an order that is new each epoch."""
    places = np.arange(draw * count, (draw + 1) * count)
    order = {
        epoch: np.random.default_rng((seed, epoch)).permutation(size)
        for epoch in set((places // size).tolist())
    }
    return [int(order[place // size][place % size]) for place in places.tolist()]


def _right_pad(targets, size):
    table = np.full((len(targets), size), -1, np.int32)
    for row, target in zip(table, targets, strict=True):
        row[: len(target)] = target
    return table


def check_policy(config: SamplingConfig) -> None:
    """Raises for a sampler that is no policy."""
    if config.temperature == 0:
        raise ValueError(
            "collect: temperature=0 is greedy, and no policy to take a gradient of; use 1.0."
        )
