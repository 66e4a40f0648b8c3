"""A trained reward model as a reward of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.data import Renderer, TokenisedGroup, answered, finite_group_batches
from jaxft.models import Forward
from jaxft.parallel import mesh_context
from jaxft.rewards.heads import sequence_rewards
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
