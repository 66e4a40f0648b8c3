"""optax transforms and gradient estimators; needs jax and optax, and nothing else of jaxft but kernels."""

from jaxft.optim.directions import normal, rademacher, sphere
from jaxft.optim.lion import LionState, lion, lion_apply, scale_by_lion
from jaxft.optim.mezo import MezoRecord, mezo_replay, mezo_step
from jaxft.optim.rounding import round_stochastically
from jaxft.optim.subspace import subspace_gradient
from jaxft.optim.zeroth_order import coordinate_differences, rge, spsa

__all__ = [
    "LionState",
    "MezoRecord",
    "coordinate_differences",
    "lion",
    "lion_apply",
    "mezo_replay",
    "mezo_step",
    "normal",
    "rademacher",
    "rge",
    "round_stochastically",
    "scale_by_lion",
    "spsa",
    "sphere",
    "subspace_gradient",
]
