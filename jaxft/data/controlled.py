"""Preference pairs whose two sides differ in stance in a chosen fraction of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.preference import Record


def controlled_preference(
    records: Sequence[Mapping[str, Any]],
    *,
    chosen: str,
    rejected: str,
    rho: float = 1.0,
    seed: int = 0,
) -> list[Record]:
    """Makes one pair of each record; a fraction ρ prefers the stance `chosen` to `rejected`.

    In the other pairs both sides have one stance, drawn from those with several responses, and the earlier of
    the two responses in its list is chosen: lists are in order of quality, or shuffled for pairs without any
    preference. Sides of different stances have the same place in their lists. The value gap is ρ for `chosen`
    and -ρ for `rejected`. With ρ = 1 this is the synthetic set of Bhatia et al., 2025,
    arxiv.org/abs/2510.26707.

    Args:
        records: with `prompt` and `responses`, a dict of stance -> responses; other columns are kept.
        chosen, rejected: names of stances.
        rho: ρ; round(ρ N) of N pairs carry the gap.
        seed: of all draws.

    Returns:
        Records with `prompt`, `chosen`, `rejected`, `stance_chosen` and `stance_rejected`.

    Raises:
        DataError: for ρ outside [0, 1], equal stances, or a record that lacks a response for its pair.
    """
    if not 0 <= rho <= 1 or chosen == rejected:
        raise DataError(
            f"controlled_preference: rho must lie in [0, 1] and the stances must differ, got rho={rho}, "
            f"{chosen!r} and {rejected!r}."
        )
    rng = np.random.default_rng(seed)
    gapped = np.zeros(len(records), bool)
    gapped[rng.permutation(len(records))[: round(rho * len(records))]] = True
    pairs = []
    for i, (record, has_gap) in enumerate(zip(records, gapped.tolist(), strict=True)):
        responses = record["responses"]
        pick = _across(responses, chosen, rejected, rng) if has_gap else _within(responses, rng)
        if pick is None:
            needed = f"{chosen!r} and {rejected!r}" if has_gap else "one stance, two of it"
            raise DataError(
                f"controlled_preference: record {i} needs different responses of {needed}."
            )
        better, worse = pick
        own = {"chosen": responses[better[0]][better[1]], "rejected": responses[worse[0]][worse[1]]}
        own |= {"stance_chosen": better[0], "stance_rejected": worse[0]}
        pairs.append({k: v for k, v in record.items() if k != "responses"} | own)
    return pairs


def _across(responses, chosen, rejected, rng):
    """((stance, place), (stance, place)) of a pair with a gap, or None."""
    number = min(len(responses.get(name, ())) for name in (chosen, rejected))
    places = [i for i in range(number) if responses[chosen][i] != responses[rejected][i]]
    if not places:
        return None
    place = places[rng.integers(len(places))]
    return (chosen, place), (rejected, place)


def _within(responses, rng):
    """The same of a pair of one stance."""
    choices = [
        (stance, i, j)
        for stance, own in responses.items()
        for j in range(len(own))
        for i in range(j)
        if own[i] != own[j]
    ]
    stances = list(dict.fromkeys(stance for stance, *_ in choices))
    if not stances:
        return None
    stance = stances[rng.integers(len(stances))]
    own = [(i, j) for name, i, j in choices if name == stance]
    first, second = own[rng.integers(len(own))]
    return (stance, first), (stance, second)
