"""Interface between value_drifts.py's two sizes and its measurements, and the objectives of both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxft import losses
from jaxft.analysis import Stances
from jaxft.models import Forward
from jaxft.objectives import Objective, preference

TEMPERATURE = 0.7  # of the answers whose stances are measured

# (name or arm, params at the start, callbacks) -> params at the end
Stage = Callable[[Any, Any, Sequence[Any]], Any]


class Arm(NamedTuple):
    """One run of preference optimisation."""

    method: str  # DPO, SimPO or RLOO
    rho: float  # fraction of pairs with a value gap; 0: the standard set
    strong: bool = False  # RLOO with the larger weight of the KL

    @property
    def name(self) -> str:
        """Returns the name in tables and records."""
        return f"{self.method}{', strong KL' if self.strong else ''}, ρ = {self.rho:g}"


class World(NamedTuple):
    """A base model, its SFT sets and preference sets, and how checkpoints are measured."""

    base: Any  # params
    sets: Sequence[str]  # names of the SFT sets
    arms: Sequence[Arm]  # from each of the SFT models
    measure: Callable[[Any], Stances]  # params -> stances on held-out prompts
    style: Callable[[Any], float] | None  # params -> share of answers in the preferred style
    supervise: Stage  # (name of a set, ...)
    prefer: Stage  # (arm, ...)
    gaps: dict[str, list[float]]  # ρ -> G of its pairs, mean over topics


def objective(config: Any, method: str, forward: Forward) -> Objective:
    """Returns the objective of DPO or SimPO."""
    loss = {
        "DPO": functools.partial(losses.dpo_loss, beta=config.beta),
        "SimPO": functools.partial(
            losses.simpo_loss, beta=config.simpo_beta, simpo_gamma=config.simpo_gamma
        ),
    }[method]
    return preference(forward, loss, beta=config.beta)
