"""The choices of --loss and --f-divergence of preference.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.cli import choices
from experiments.cli.optimizers import SHARPNESS
from jaxft import losses, objectives
from jaxft.models import Forward
from jaxft.objectives import Objective


class Entry(NamedTuple):
    """Makes a loss; names what it needs, reads and refuses (see `choices`)."""

    make: Callable[[Any], Callable[[Forward], Objective]]  # config -> forward -> objective
    reads: tuple[str, ...] = ()
    refuses: Mapping[str, str] = {}
    records: Literal["pairs", "labels", "steps"] = "pairs"  # the kind of records that it needs
    trains: Literal["policy", "reward"] = "policy"
    reference: bool = True  # reads log-probs of a reference
    online: bool = False  # needs the policy's own answers, and the initial model to score them


class Divergence(NamedTuple):
    """h of `losses.diverged`, None for the reverse KL; and the flags that it reads and refuses."""

    make: Callable[[Any], Callable[[jax.Array], jax.Array] | None]
    reads: tuple[str, ...] = ()
    refuses: Mapping[str, str] = {}


DIVERGENCES = {
    "reverse_kl": Divergence(lambda config: None),
    "forward_kl": Divergence(lambda config: losses.forward_kl),
    "jensen_shannon": Divergence(lambda config: losses.jensen_shannon),
    "alpha": Divergence(lambda config: losses.alpha_divergence(config.f_alpha), ("f_alpha",)),
}

OF_PAIRS = ("beta", "too_long", "ld_alpha", "nll_alpha", "use_weighting")
MOVING = ("ref_model_sync_steps", "ref_model_mixup_alpha")


def pair_loss(loss: Callable[..., Any], config: Any, arguments: Mapping[str, str]):
    """Binds given flags to `loss`, {its argument: the flag}; invalid values raise ValueError."""
    given = {name: getattr(config, flag) for name, flag in arguments.items()}
    loss = functools.partial(loss, **{name: x for name, x in given.items() if x is not None})
    pairs = losses.Pairs(*[jax.ShapeDtypeStruct((1,), np.float32)] * len(losses.Pairs._fields))
    jax.eval_shape(loss, pairs)  # Invalid values fail now, not after minutes.
    if not config.nll_alpha:
        return loss
    return lambda pairs: loss(pairs) + config.nll_alpha * losses.nll_loss(pairs)


def _of_pairs(loss, *, reference=True, diverges=False, **arguments):
    """Returns the entry of a pair loss whose `arguments` are flags; `diverges`: see `losses.diverged`."""

    def make(config):
        h = DIVERGENCES[config.f_divergence].make(config) if diverges else None
        found = loss if h is None else losses.diverged(loss, h)
        made = pair_loss(found, config, {"beta": "beta", **arguments})
        return lambda forward: objectives.preference(
            forward,
            made,
            beta=_beta(config),
            use_weighting=config.use_weighting,
            ld_alpha=config.ld_alpha,
        )

    moving = MOVING if reference else ()
    divergence = ("f_divergence", "f_alpha") if diverges else ()
    reads = (*OF_PAIRS, *moving, *divergence, *arguments.values())
    return Entry(make, reads, reference=reference)


_smoothed = functools.partial(_of_pairs, label_smoothing="label_smoothing")


def _hypo(config):
    arguments = {"beta": "beta", "label_smoothing": "label_smoothing"}
    loss = pair_loss(losses.dpo_loss, config, arguments)
    return lambda forward: objectives.hypo(
        forward, loss, beta=_beta(config), kl_weight=config.kl_weight
    )


def _kto(config):
    weights = {name: getattr(config, name) for name in ("desirable_weight", "undesirable_weight")}
    return lambda forward: objectives.kto(forward, beta=_beta(config), **weights)


def _bco(config):
    return lambda forward: objectives.bco(forward, beta=_beta(config))


def _reward(config):
    centre = config.center_rewards_coefficient
    return lambda forward: objectives.pairwise_reward(forward, center_rewards_coefficient=centre)


def _beta(config):
    return 0.1 if config.beta is None else config.beta


LOSSES = {
    "dpo": _smoothed(losses.dpo_loss, diverges=True),
    "robust": _smoothed(losses.robust_dpo_loss, diverges=True),
    "hinge": _of_pairs(losses.hinge_loss, diverges=True),
    "ipo": _of_pairs(losses.ipo_loss, diverges=True),
    "exo": _smoothed(losses.exo_loss, diverges=True),
    "nca": _of_pairs(losses.nca_loss),
    "sppo": _of_pairs(losses.sppo_loss),
    "bco_pair": _of_pairs(losses.bco_pair_loss),
    "apo_zero": _of_pairs(losses.apo_zero_loss),
    "apo_down": _of_pairs(losses.apo_down_loss),
    "aot": _smoothed(losses.aot_loss),
    "aot_unpaired": _smoothed(losses.aot_unpaired_loss),
    "discopop": _of_pairs(losses.discopop_loss, diverges=True),
    "normalised": _of_pairs(losses.normalised_dpo_loss, diverges=True),
    "length_regularised": _of_pairs(
        losses.length_regularised_dpo_loss, diverges=True, alpha="alpha_length"
    ),
    "dpop": _of_pairs(losses.dpop_loss),
    "hybrid_dpo": _of_pairs(losses.hybrid_dpo_loss),
    "mpo": _of_pairs(losses.mpo_loss),
    "simpo": _smoothed(losses.simpo_loss, reference=False, simpo_gamma="simpo_gamma"),
    "alpha_po": _of_pairs(losses.alpha_po_loss, reference=False, simpo_gamma="simpo_gamma"),
    "cpo": _smoothed(losses.cpo_loss, reference=False),
    "cpo_ipo": _of_pairs(losses.cpo_ipo_loss, reference=False),
    "orpo": _of_pairs(losses.orpo_loss, reference=False, nll_on_prompt="nll_on_prompt"),
    "slic": _of_pairs(losses.slic_loss, reference=False),
    "kto": Entry(
        _kto,
        ("beta", "too_long", "desirable_weight", "undesirable_weight", *MOVING),
        records="labels",
    ),
    "bco": Entry(
        _bco,
        ("beta", "too_long", "prompt_embedder", "min_density_ratio", "max_density_ratio", *MOVING),
        records="labels",
    ),
    "hypo": Entry(
        _hypo,
        ("beta", "too_long", "nll_alpha", "label_smoothing")
        + ("kl_weight", "online_samples", "max_new_tokens"),
        online=True,
    ),
    "reward": Entry(_reward, ("too_long", "center_rewards_coefficient"), trains="reward"),
    "outcome": Entry(
        lambda config: objectives.outcome_reward,
        ("too_long",),
        records="labels",
        trains="reward",
    ),
    "process": Entry(lambda config: objectives.process_reward, records="steps", trains="reward"),
}

Loss = Literal[tuple(LOSSES)]
DivergenceName = Literal[tuple(DIVERGENCES)]
COMPANIONS = {
    "ref_model_mixup_alpha": "ref_model_sync_steps",
    "min_density_ratio": "prompt_embedder",
    "max_density_ratio": "prompt_embedder",
}


def objective_of(config: Any) -> Callable[[Forward], Objective]:
    """Returns forward -> objective for --loss; refuses flags that the loss does not read."""
    choices.check(config, "loss", LOSSES)
    choices.check(config, "f_divergence", DIVERGENCES)
    choices.check_companions(config, COMPANIONS)
    _check_numbers(config)
    entry, sharpness = LOSSES[config.loss], config.optimisation.sharpness
    if entry.trains == "reward" and SHARPNESS[sharpness].of_predictions:
        raise ValueError(
            f"--sharpness {sharpness} compares predictions of tokens, but the model of --loss "
            f"{config.loss} gives one number; use a method of sam's family."
        )
    return entry.make(config)


def _check_numbers(config):
    steps, alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
    if config.beta is not None and not config.beta > 0:
        raise ValueError(f"--beta must be positive, got {config.beta}.")
    if min(config.online_samples, config.max_new_tokens) < 1:
        raise ValueError(
            "--online-samples and --max-new-tokens must be at least 1, got "
            f"{config.online_samples} and {config.max_new_tokens}."
        )
    if not 0 <= config.ld_alpha <= 1:
        raise ValueError(f"--ld-alpha must lie in [0, 1], got {config.ld_alpha}.")
    if config.kl_weight < 0:
        raise ValueError(f"--kl-weight must be at least 0, got {config.kl_weight}.")
    if steps is not None and not (steps >= 1 and 0 < alpha <= 1):
        raise ValueError(
            "--ref-model-sync-steps must be at least 1 and --ref-model-mixup-alpha lie in (0, 1]; got "
            f"{steps} and {alpha}."
        )
