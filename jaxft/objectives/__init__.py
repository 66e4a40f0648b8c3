"""Objectives: a model's apply, a loss and a reduction make objective(params, batch, key)."""

from jaxft.objectives.reparametrised import reparametrised
from jaxft.objectives.supervised import Objective, shift, supervised

__all__ = ["Objective", "reparametrised", "shift", "supervised"]
