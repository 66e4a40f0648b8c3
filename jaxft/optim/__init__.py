"""optax transforms and gradient estimators; needs jax and optax, and nothing else of jaxft but kernels."""

from jaxft.optim.lion import LionState, lion, lion_apply, scale_by_lion
from jaxft.optim.rounding import round_stochastically

__all__ = [
    "LionState",
    "lion",
    "lion_apply",
    "round_stochastically",
    "scale_by_lion",
]
