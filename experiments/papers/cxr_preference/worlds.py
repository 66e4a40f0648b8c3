"""The objectives of cxr_preference.py, and what each of its sizes gives to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxft import losses
from jaxft.data import Judged
from jaxft.models import Forward
from jaxft.objectives import Objective, kto, preference

FIVE = ("DPO", "KTO", "IPO", "SimPO", "ORPO")
BASELINES = ("more SFT", "best of 4")


class World(NamedTuple):
    """A fine-tuned start, pairs of its own judged reports, and how methods train and are measured."""

    start: Any  # params from which all methods begin
    judged: Judged
    lengths: tuple[float, float]  # mean tokens of chosen and rejected reports
    measure: Callable[[Any, Any], dict[str, Any]]  # (params, cases) -> numbers
    validation: Any  # cases that choose the checkpoint
    test: Any
    method: Callable[[str], tuple[Objective, Any]]  # name -> (objective, batches)
    optimizer: Any
    fit: dict[str, Any]  # further arguments of `train.fit`
    others: Callable[[Any], Any] | None = (
        None  # cases -> with the images of other cases; None: no images
    )
    prior: dict[str, float] | None = None  # measures of reports that are written without an image


def objective(
    name: str, forward: Forward, reference: Callable[[Any], Any] | None = None
) -> Objective:
    """Returns the objective of one of FIVE; `reference` is for batches without ref_log_probs."""
    if name == "KTO":
        return kto(forward, beta=0.1, reference=reference)
    loss = {
        "DPO": functools.partial(losses.dpo_loss, beta=0.1),
        "IPO": functools.partial(losses.ipo_loss, beta=0.5),
        "SimPO": functools.partial(losses.simpo_loss, beta=2.0, simpo_gamma=1.0),
        "ORPO": functools.partial(losses.orpo_loss, beta=1.0),
    }[name]
    reference = None if name in ("SimPO", "ORPO") else reference
    return preference(forward, loss, beta=0.1, reference=reference)
