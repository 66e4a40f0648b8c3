"""Optax transforms and gradient estimators; imports only jax, optax and jaxft.kernels."""

from jaxft.optim.directions import normal, rademacher, sphere
from jaxft.optim.estimators import evaluates, evaluates_at_params
from jaxft.optim.meta import maml, mldg, reptile
from jaxft.optim.mezo import MezoRecord, mezo_replay, mezo_step
from jaxft.optim.perturbations import (
    Perturbation,
    global_norm,
    perturb_asam,
    perturb_fisher,
    perturb_sam,
)
from jaxft.optim.rounding import round_stochastically
from jaxft.optim.sharpness import (
    asam,
    fisher_sam,
    in_groups,
    m_sam,
    sam,
    sharpness_aware,
    tram,
    tram_fisher,
)
from jaxft.optim.sign_momentum import LionState, lion, lion_apply, scale_by_lion
from jaxft.optim.subspace import subspace_gradient
from jaxft.optim.trust_penalty import (
    TrustRegionState,
    parameter_distance,
    with_tram,
    with_trust_region,
)
from jaxft.optim.with_sharpness import (
    AlternatingSamState,
    LookSamState,
    alternating_sam,
    evaluation_params,
    look_sam,
    with_sam,
    with_tram_fisher,
)
from jaxft.optim.zeroth_order import coordinate_differences, rge, spsa

__all__ = [
    "AlternatingSamState",
    "LionState",
    "LookSamState",
    "MezoRecord",
    "Perturbation",
    "TrustRegionState",
    "alternating_sam",
    "asam",
    "coordinate_differences",
    "evaluates",
    "evaluates_at_params",
    "evaluation_params",
    "fisher_sam",
    "global_norm",
    "in_groups",
    "lion",
    "lion_apply",
    "look_sam",
    "m_sam",
    "maml",
    "mezo_replay",
    "mezo_step",
    "mldg",
    "normal",
    "parameter_distance",
    "perturb_asam",
    "perturb_fisher",
    "perturb_sam",
    "rademacher",
    "reptile",
    "rge",
    "round_stochastically",
    "sam",
    "scale_by_lion",
    "sharpness_aware",
    "spsa",
    "sphere",
    "subspace_gradient",
    "tram",
    "tram_fisher",
    "with_sam",
    "with_tram",
    "with_tram_fisher",
    "with_trust_region",
]
