"""What the scripts' --optimizer and --sharpness stand for."""

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

Optimizer = Literal["adamw", "lion", "lion_int8", "adafactor", "muon", "sgd"]
Sharpness = Literal[
    "none", "sam", "asam", "fisher_sam", "m_sam", "look_sam", "tram", "tram_0", "tram_x", "tram_fisher",
    "trpo", "mesa", "r3f",
]  # fmt: skip

# Those that compare the predictions of two models, or of one with and without noise on its inputs.
OF_PREDICTIONS = ("tram", "tram_0", "tram_x", "tram_fisher", "trpo", "mesa", "r3f")


def optimizer_rule(name: Optimizer) -> optax.GradientTransformation:
    """What turns gradients into a direction; clipping, decay and learning rate are the same for all."""
    rules = {
        "adamw": lambda: optax.scale_by_adam(),
        "lion": lambda: scale_by_lion(0.95, 0.98),  # the paper's for language models
        "lion_int8": lambda: scale_by_lion(0.95, 0.98, "int8"),
        "adafactor": lambda: optax.chain(optax.scale_by_factored_rms(), clip_by_layer_rms(1.0)),
        # Matrices by Newton-Schulz, the rest by Adam; -1 leaves sign and rate to the chain.
        "muon": lambda: optax.contrib.muon(-1.0, muon_weight_dimension_numbers=muon_axes),
        "sgd": lambda: optax.trace(0.9),
    }
    return rules[name]()


class Sharpened(NamedTuple):
    """What jaxft.train.fit takes for a method."""

    objective: Objective
    optimizer: optax.GradientTransformation
    gradient: Callable[..., Any]
    extra_args: Mapping[str, Callable[..., Any]]


def sharpen(
    name: Sharpness,
    build: Callable[[Forward], Objective],
    forward: Forward,
    base: optax.GradientTransformation,
    rho: float | None = None,
) -> Sharpened:
    """A sharpness-aware or trust-region method around the base optimizer, for any objective.

    Args:
        build: forward -> the objective, such as `jaxft.objectives.supervised`.
        forward: of the model; distances of predictions and noise on the inputs come from the same one.
        rho: the radius; None: the method's own. For tram it scales the distance, for the penalties
            (trpo, mesa, r3f) it is their weight.

    Raises:
        ValueError: for rho < 0, and for a rho that the method "none" would not use.
    """
    objective, plain = build(forward), jax.value_and_grad
    if name == "none":
        if rho is not None:
            raise ValueError(f"--rho {rho} has no effect without --sharpness, such as sam.")
        return Sharpened(objective, base, plain, {})
    if rho is None:
        usual = {"sam": 0.05, "m_sam": 0.05, "look_sam": 0.05, "asam": 0.5}
        usual |= {"tram": 1.0, "tram_0": 1.0, "tram_x": 1.0}
        rho = usual.get(name, 0.1)
    if name == "m_sam":
        # Each slice of the batch (--gradient-accumulation-steps) has its own perturbation.
        return Sharpened(objective, base, sam(rho), {})
    logits = token_logits(forward)
    if name == "r3f":
        return Sharpened(r3f(objective, logits, rho), base, plain, {})
    moved = {"distance_fn": function_distance(logits)}
    noised = lambda: {"noised_fn": mean_of(build(with_noise(forward, embedding_noise())))}
    optimizer, extra_args = {
        "sam": lambda: (with_sam(base, rho), {}),
        "asam": lambda: (with_sam(base, perturb=perturb_asam(rho)), {}),
        "fisher_sam": lambda: (with_sam(base, perturb=perturb_fisher(rho)), {}),
        "look_sam": lambda: (look_sam(base, rho), {}),
        "tram_fisher": lambda: (with_tram_fisher(base, rho), noised()),
        "tram": lambda: (with_tram(base, 0.0, d_scale=rho), moved),
        "tram_0": lambda: (with_tram(base, 1.0, d_scale=rho), moved),
        "tram_x": lambda: (
            with_tram(base, None, d_scale=rho),
            {"distance_fn": noise_distance(logits)},
        ),
        "trpo": lambda: (with_trust_region(base, rho, 0.0), moved),
        "mesa": lambda: (with_trust_region(base, rho, 0.999), moved),
    }[name]()
    return Sharpened(objective, optimizer, plain, extra_args)
