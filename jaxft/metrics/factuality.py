"""Factuality of texts: how many of their claims are correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def factual_precision(
    responses: Sequence[Sequence[Any]], correct: Callable[[Any], bool]
) -> dict[str, float]:
    """Means over responses of their claims; FActScore without its penalty of short responses.

    Min et al., 2023, FActScore, arxiv.org/abs/2305.14251, section 3.1.

    Args:
        responses: the claims of each response; a response without claims says nothing.
        correct: whether a claim is correct: `known.__contains__` of a set of facts, or a lookup of scores.

    Returns:
        `correct` and `incorrect`, claims per response; `precision`, mean over the responses with claims of
        correct claims / claims (NaN if there is none); `claims_per_response`, over all responses;
        `response_ratio`, the share of responses with claims.

    Raises:
        ValueError: if there is no response.
    """
    if not len(responses):
        raise ValueError("factual_precision: no responses; expected at least one list of claims.")
    right = np.array([sum(map(bool, map(correct, claims))) for claims in responses], float)
    total = np.array([len(claims) for claims in responses], float)
    said = total > 0
    return {
        "correct": float(right.mean()),
        "incorrect": float((total - right).mean()),
        "precision": float(np.mean(right[said] / total[said])) if said.any() else float("nan"),
        "claims_per_response": float(total.mean()),
        "response_ratio": float(said.mean()),
    }
