"""Objectives of params that a model reads only after a function of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxft.objectives.supervised import Objective


def reparametrised(objective: Objective, dense_params: Callable[[Any], Any]) -> Objective:
    """objective(dense_params(params), batch, key), for example with jaxft.adapters.intrinsic_apply."""
    return lambda params, batch, key: objective(dense_params(params), batch, key)
