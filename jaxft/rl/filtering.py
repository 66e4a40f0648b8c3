"""Filters of prompts by how often the policy answers them right.

Lai et al., 2025, arxiv.org/abs/2507.05386 (RIF-RFT): prompts that no rollout solves give groups without
contrast, or noise, and are left out before a task is trained on. Success rates come from
`estimate_success`, or from any samples and verdicts.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxft.rl.prompts import Prompts


def learnable(
    rates: np.ndarray, *, above: float = 0.0, at_most: float = 1.0, task: str = "the data"
) -> np.ndarray:
    """Returns which prompts to keep [N]: those with above < rate <= at_most.

    Args:
        rates: success rates [N] of K rollouts each.
        above: 0 keeps prompts with at least one right rollout.
        at_most: below 1, as 1 - 1 / K, prompts that all rollouts solve are left out too.
        task: name for the error.

    Raises:
        ValueError: for rates outside 0..1, or if no prompt is kept.
    """
    rates = np.asarray(rates, float)
    if rates.ndim != 1 or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(
            f"learnable: rates must be a vector of numbers in 0..1, got {rates!r:.80}."
        )
    kept = (rates > above) & (rates <= at_most)
    if not kept.any():
        raise ValueError(
            f"{task}: of {len(rates)} prompts none has a success rate above {above} and at most {at_most}; "
            "draw more rollouts, or start from a model that solves some."
        )
    return kept


def only(prompts: Prompts, kept: np.ndarray) -> Prompts:
    """Returns the prompts that `kept` [N] marks, with their records and columns.

    Raises:
        ValueError: for a mask of another length.
    """
    kept = np.asarray(kept, bool)
    if kept.shape != (len(prompts.ids),):
        raise ValueError(f"only: a mask of {len(prompts.ids)} prompts is needed, got {kept.shape}.")
    numbers = np.flatnonzero(kept).tolist()
    return dataclasses.replace(
        prompts,
        ids=[prompts.ids[i] for i in numbers],
        records=[prompts.records[i] for i in numbers],
        columns={name: np.asarray(column)[numbers] for name, column in prompts.columns.items()},
    )
