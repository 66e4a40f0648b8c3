"""Parts that the samplers share: checks of a request, keys of its rows, stop strings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation.decoding import SamplingConfig


def check_request(
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    samples: int,
    limits: Sequence[int] | None,
    tokenizer: Any,
) -> np.ndarray:
    """Returns the most new tokens of each prompt's answers, [prompts] int32.

    Raises:
        ValueError: for stop strings without a tokenizer, fewer samples than 1, or limits that are not one for
            each prompt in 1..max_new_tokens.
    """
    if config.stop_strings and tokenizer is None:
        raise ValueError("generate: stop_strings need tokenizer=.")
    if samples < 1:
        raise ValueError(f"generate: samples must be at least 1, got {samples}.")
    if limits is None:
        return np.full(len(prompts), config.max_new_tokens, np.int32)
    limits = np.asarray(limits)
    if limits.shape != (len(prompts),) or limits.dtype.kind not in "iu":
        raise ValueError(
            f"generate: limits must be one number of tokens for each of {len(prompts)} prompts, got "
            f"{limits.dtype} of shape {limits.shape}."
        )
    if limits.size and not 1 <= limits.min() <= limits.max() <= config.max_new_tokens:
        raise ValueError(
            f"generate: limits must lie in 1..max_new_tokens={config.max_new_tokens}, got "
            f"{limits.min()}..{limits.max()}; leave out prompts that need no answer, and raise "
            "max_new_tokens to the largest limit."
        )
    return limits.astype(np.int32)


def row_keys(
    key: jax.Array, rows: int, row_ids: Sequence[int] | None, size: int | None = None
) -> jax.Array:
    """One key for each row, fold_in(key, row_ids[i]); rows added up to `size` have some key.

    Raises:
        ValueError: for more or fewer ids than rows.
    """
    ids = np.arange(rows) if row_ids is None else np.asarray(row_ids)
    if ids.shape != (rows,):
        raise ValueError(
            f"generate: row_ids must be one id for each of {rows} rows, got {ids.shape}."
        )
    ids = np.pad(ids, (0, (size or rows) - rows))
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(ids))


def sample_keys(keys: jax.Array, samples: int) -> jax.Array:
    """Keys [B samples], adjacent for each of the rows' keys [B]; those themselves for 1 sample."""
    if samples == 1:
        return keys
    fold = lambda key: jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(samples))
    return jax.vmap(fold)(keys).reshape(-1)


def after_string(ids: list[int], config: SamplingConfig, tokenizer: Any) -> int | None:
    """Returns the number of tokens that complete the first stop string of a text, or None."""
    found = lambda n: any(s in tokenizer.decode(ids[:n]) for s in config.stop_strings)
    if not found(len(ids)):
        return None
    return next(n for n in range(1, len(ids) + 1) if found(n))
