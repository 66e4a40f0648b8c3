"""Groups of responses sampled from the policy, laid out as a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.generation import SamplingConfig, bucket, generate, left_pad
from jaxft.keys import stream
from jaxft.models import Decoder
from jaxft.objectives import completion_log_probs
from jaxft.parallel import to_host

MIN_BUCKET = 16  # of response lengths

Batch = dict[str, Any]
# (rewards [B], batch) -> what the objective needs besides, such as {"advantages": [B]}
Credit = Callable[[Any, Batch], Batch]

score = jax.jit(completion_log_probs, static_argnames=("forward", "temperature", "chunk"))


def sample_groups(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    group_size: int,
    *,
    tokenizer: Any = None,
    sampler: Callable[..., Any] = generate,
) -> tuple[Batch, list[list[int]]]:
    """(batch, completions): `group_size` responses to each prompt, side by side, from one prefill.

    The batch is that of jaxft.objectives.policy, as numpy arrays: `sampler_log_probs` under the
    full vocabulary at the temperature; `behaviour_log_probs` under what was sampled from (with top-k,
    top-p or min-p, log π - log of the mass kept); `truncated` [B], True where a response reached the
    limit. Its columns are buckets, of the longest prompt and the longest response.

    Args:
        tokenizer: needed for stop strings.
        sampler: a function with the signature of `generate`.

    Raises:
        ValueError: for greedy sampling, of which no policy gradient can be taken.
    """
    check_policy(config)
    out = sampler(model, params, prompts, key, config, samples=group_size, tokenizer=tokenizer)
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


def sampling_key(state: Any, name: str, number: int) -> jax.Array:
    """stream(state.key, name, number) of this process alone, where the state's key spans several."""
    data = to_host(jax.random.key_data(state.key))
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(state.key))
    return stream(key, name, number)


def check_policy(config: SamplingConfig) -> None:
    """Raises for a sampler that is no policy."""
    if config.temperature == 0:
        raise ValueError(
            "collect: temperature=0 is greedy, and no policy to take a gradient of; use 1.0."
        )
