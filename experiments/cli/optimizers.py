"""The choices of --optimizer and --sharpness of the training scripts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import optax
import optax.contrib

from jaxft.models import Forward, with_noise
from jaxft.objectives import (
    Objective,
    embedding_noise,
    function_distance,
    mean_of,
    noise_distance,
    r3f,
    token_logits,
)
from jaxft.optim import (
    look_sam,
    perturb_asam,
    perturb_fisher,
    sam,
    scale_by_lion,
    with_sam,
    with_tram,
    with_tram_fisher,
    with_trust_region,
)
from jaxft.train import clip_by_layer_rms, muon_axes

# Transforms from gradients to a direction; clipping, decay and learning rate are the same for all.
OPTIMIZERS = {
    "adamw": lambda: optax.scale_by_adam(),
    "lion": lambda: scale_by_lion(0.95, 0.98),  # the paper's values for language models
    "lion_int8": lambda: scale_by_lion(0.95, 0.98, "int8"),
    "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), clip_by_layer_rms(1.0)),
    # Newton-Schulz for matrices, Adam for the rest; -1 leaves sign and rate to the chain.
    "muon": lambda: optax.contrib.muon(-1.0, muon_weight_dimension_numbers=muon_axes),
    "sgd": lambda: optax.trace(0.9),
}


class Parts(NamedTuple):
    """Inputs of a method of --sharpness."""

    build: Callable[[Forward], Objective]
    forward: Forward
    base: optax.GradientTransformation
    rho: float | None


class Sharpened(NamedTuple):
    """Arguments of jaxft.train.fit for a method."""

    objective: Objective
    optimizer: optax.GradientTransformation
    gradient: Callable[..., Any] = jax.value_and_grad
    extra_args: Mapping[str, Callable[..., Any]] = {}


class Method(NamedTuple):
    """Makes a method; names what it needs, reads and refuses (see `choices`)."""

    make: Callable[[Parts], Sharpened]
    rho: float | None = 0.1  # the radius, if --rho is not given
    of_predictions: bool = False  # needs a distribution over tokens at each position
    reads: tuple[str, ...] = ("rho",)
    refuses: Mapping[str, str] = {}


def _optimizer(wrap, rho):
    """Returns a method that is an optimizer around the base: `wrap(base, rho)`."""
    return Method(lambda p: Sharpened(p.build(p.forward), wrap(p.base, p.rho)), rho)


def _distant(wrap, rho=0.1, distance=function_distance):
    """Returns a method whose optimizer also takes a distance between predictions."""

    def make(p):
        moved = {"distance_fn": distance(token_logits(p.forward))}
        return Sharpened(p.build(p.forward), wrap(p.base, p.rho), extra_args=moved)

    return Method(make, rho, True)


def _slices(p):
    # Each slice of the batch (--gradient-accumulation-steps) has its own perturbation.
    return Sharpened(p.build(p.forward), p.base, sam(p.rho))


def _r3f(p):
    objective = r3f(p.build(p.forward), token_logits(p.forward), p.rho)
    return Sharpened(objective, p.base)


def _tram_fisher(p):
    noised = {"noised_fn": mean_of(p.build(with_noise(p.forward, embedding_noise())))}
    return Sharpened(p.build(p.forward), with_tram_fisher(p.base, p.rho), extra_args=noised)


SHARPNESS = {
    "none": Method(lambda p: Sharpened(p.build(p.forward), p.base), None, reads=()),
    "sam": _optimizer(with_sam, 0.05),
    "asam": _optimizer(lambda base, rho: with_sam(base, perturb=perturb_asam(rho)), 0.5),
    "fisher_sam": _optimizer(lambda base, rho: with_sam(base, perturb=perturb_fisher(rho)), 0.1),
    "m_sam": Method(_slices, 0.05),
    "look_sam": _optimizer(look_sam, 0.05),
    "tram": _distant(lambda base, rho: with_tram(base, 0.0, d_scale=rho), 1.0),
    "tram_0": _distant(lambda base, rho: with_tram(base, 1.0, d_scale=rho), 1.0),
    "tram_x": _distant(lambda base, rho: with_tram(base, None, d_scale=rho), 1.0, noise_distance),
    "tram_fisher": Method(_tram_fisher, 0.1, True),
    "trpo": _distant(lambda base, rho: with_trust_region(base, rho, 0.0)),
    "mesa": _distant(lambda base, rho: with_trust_region(base, rho, 0.999)),
    "r3f": Method(_r3f, 0.1, True),
}

Optimizer = Literal[tuple(OPTIMIZERS)]
Sharpness = Literal[tuple(SHARPNESS)]


def sharpen(
    name: Sharpness,
    build: Callable[[Forward], Objective],
    forward: Forward,
    base: optax.GradientTransformation,
    rho: float | None = None,
) -> Sharpened:
    """Builds a sharpness-aware or trust-region method around the base optimizer, for any objective.

    Args:
        build: forward -> the objective, such as `jaxft.objectives.supervised`.
        forward: the model's forward; distances of predictions and noise on the inputs use it too.
        rho: the radius; None: the method's own. For tram it scales the distance; for the penalties
            (trpo, mesa, r3f) it is the weight.

    Raises:
        ValueError: if rho < 0.
    """
    method = SHARPNESS[name]
    return method.make(Parts(build, forward, base, method.rho if rho is None else rho))
