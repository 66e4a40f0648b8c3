"""A trained reward model as a reward of texts, and as the verifier of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.data import Renderer, TokenisedGroup, answered, finite_group_batches
from jaxft.generation import Verifier, left_pad
from jaxft.models import Decoder, Forward
from jaxft.parallel import mesh_context
from jaxft.rewards.heads import sequence_rewards, token_rewards
from jaxft.rewards.pool import RewardFn


def model_rewards(
    forward: Forward,
    params: Any,
    renderer: Renderer,
    *,
    max_length: int,
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> RewardFn:
    """(completions, records) -> the head's value at the last token of each answer, as in training.

    If question and answer are too long together, there is no verdict: NaN.

    Args:
        forward: see `jaxft.objectives.supervised`.
        params: must have a reward head (`reward/kernel`).
        renderer: has the reward model's own tokenizer and template.
        max_length: in tokens.
        batch_size: sequences at a time.
        mesh: the mesh that the params are sharded over.

    Raises:
        ValueError: if the params have no head.
    """
    if "reward" not in params:
        raise ValueError(
            "model_rewards: the params have no reward head; train one with preference.py --loss reward."
        )
    run = jax.jit(lambda params, batch: sequence_rewards(forward, params, batch)[0])

    def rewards(completions: Sequence[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
        parts = [
            renderer(answered(record, text))[-1]
            for text, record in zip(completions, records, strict=True)
        ]
        values = np.full(len(parts), np.nan)
        fits = sorted(
            (i for i, part in enumerate(parts) if len(part.tokens) <= max_length),
            key=lambda i: len(parts[i].tokens),
        )
        groups = [TokenisedGroup((parts[i],), {}) for i in fits]
        found = []
        if groups:
            batches = finite_group_batches(groups, batch_size=batch_size, max_length=max_length)
            with mesh_context(mesh):
                found = np.concatenate([np.asarray(run(params, batch))[:, 0] for batch in batches])
        values[fits] = found[: len(fits)]
        return values.tolist()

    return rewards


def prefix_verifier(
    model: Decoder, params: Any, *, at_once: int = 1024, mesh: Mesh | None = None
) -> Verifier:
    """prefixes -> σ(the head's value at each one's last token), for the searches of jaxft.generation.

    The head is an outcome reward model's if it was trained at the ends of answers, and a process reward
    model's if at the ends of steps.

    Args:
        at_once: prefixes that are scored at a time, always as many.

    Raises:
        ValueError: if the params have no head.
    """
    if "reward" not in params:
        raise ValueError(
            "prefix_verifier: the params have no reward head; see add_reward_head and process_reward."
        )

    @jax.jit
    def run(params, tokens, valid):
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": valid.astype(jnp.int32)}
        batch = {name: x[:, None] for name, x in batch.items()}
        return jax.nn.sigmoid(token_rewards(model.forward, params, batch)[:, 0, -1])

    def values(prefixes):
        found = []
        for start in range(0, len(prefixes), at_once):
            part = list(prefixes[start : start + at_once])
            filled = part + [part[0]] * (at_once - len(part))
            with mesh_context(mesh):
                made = np.asarray(run(params, *left_pad(filled, model.config)))
            found += made[: len(part)].tolist()
        return found

    return values
