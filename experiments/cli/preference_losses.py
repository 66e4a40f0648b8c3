"""What the flags of preference.py say of the loss: checked, and made into an objective."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import numpy as np

from experiments.cli.optimizers import OF_PREDICTIONS
from jaxft import losses, objectives

Loss = Literal[
    "dpo", "robust", "hinge", "ipo", "exo", "nca", "sppo", "bco_pair", "apo_zero", "apo_down", "aot",
    "aot_unpaired", "discopop", "normalised", "length_regularised", "dpop", "hybrid_dpo", "mpo", "simpo",
    "alpha_po", "cpo", "orpo", "slic", "kto", "bco", "hypo", "reward", "outcome", "process",
]  # fmt: skip
UNPAIRED = ("kto", "bco")
REWARDS = ("reward", "outcome", "process")  # of pairs, of answers, of steps
REFERENCE_FREE = ("simpo", "alpha_po", "cpo", "orpo", "slic")


def objective_of(config: Any):
    """forward -> objective, for the loss of the flags; refuses flags that the loss does not have."""
    given = {name: getattr(config, name) for name in ("beta", "label_smoothing")}
    given = {name: value for name, value in given.items() if value is not None}
    if config.beta is not None and not config.beta > 0:
        raise ValueError(f"--beta must be positive, got {config.beta}.")
    smoothed = ("dpo", "robust", "exo", "aot", "aot_unpaired", "simpo", "cpo", "hypo")
    if "label_smoothing" in given and config.loss not in smoothed:
        raise ValueError(f"--label-smoothing is of {', '.join(smoothed)}; {config.loss} has none.")
    if config.center_rewards_coefficient and config.loss != "reward":
        raise ValueError(f"--center-rewards-coefficient is of reward, not of {config.loss}.")
    if config.loss in REWARDS and "beta" in given:
        raise ValueError(f"--beta is of losses with a policy; {config.loss} trains a reward model.")
    if config.loss == "hypo" and (
        config.use_weighting or min(config.online_samples, config.max_new_tokens) < 1
    ):
        raise ValueError(
            f"hypo takes no --use-weighting, and at least one --online-samples and --max-new-tokens; got "
            f"{config.online_samples} and {config.max_new_tokens}."
        )
    if config.f_divergence != "reverse_kl" and config.loss != "dpo":
        raise ValueError(f"--f-divergence is of dpo, not of {config.loss}.")
    if config.ld_alpha != 1 and config.loss in (*UNPAIRED, *REWARDS, "hypo"):
        raise ValueError(f"--ld-alpha is of pairs, not of {config.loss}.")
    if not 0 <= config.ld_alpha <= 1:
        raise ValueError(f"--ld-alpha must lie in [0, 1], got {config.ld_alpha}.")
    if config.kl_weight < 0:
        raise ValueError(f"--kl-weight must be at least 0, got {config.kl_weight}.")
    if config.loss in (*UNPAIRED, *REWARDS) and (config.use_weighting or config.nll_alpha):
        raise ValueError(f"--use-weighting and --nll-alpha are of pairs, not of {config.loss}.")
    _check_following(config)
    if config.loss in REWARDS and config.sharpness in OF_PREDICTIONS:
        raise ValueError(
            f"--sharpness {config.sharpness} compares predictions of tokens, and a reward model gives one "
            "number; take one of sam's family."
        )
    if config.loss in REWARDS:
        centre = config.center_rewards_coefficient
        return {
            "reward": lambda forward: objectives.pairwise_reward(
                forward, center_rewards_coefficient=centre
            ),
            "outcome": objectives.outcome_reward,
            "process": objectives.process_reward,
        }[config.loss]
    if config.loss in UNPAIRED:
        weights = {n: getattr(config, n) for n in ("desirable_weight", "undesirable_weight")}
        if config.loss == "kto":
            return lambda forward: objectives.kto(forward, **given, **weights)
        return lambda forward: objectives.bco(forward, **given)
    own = {
        "dpo": {} if config.f_divergence == "reverse_kl" else {"h": divergence(config)},
        "simpo": {"simpo_gamma": config.simpo_gamma},
        "alpha_po": {"simpo_gamma": config.simpo_gamma},
        "length_regularised": {"alpha": config.alpha_length},
        "orpo": {"nll_on_prompt": config.nll_on_prompt},
    }
    named = losses.f_dpo_loss if own.get(config.loss, {}).get("h") else pair_loss(config.loss)
    loss = functools.partial(named, **given, **own.get(config.loss, {}))
    pairs = losses.Pairs(*[jax.ShapeDtypeStruct((1,), np.float32)] * len(losses.Pairs._fields))
    jax.eval_shape(loss, pairs)  # Bad values fail now, not after minutes.
    whole = loss
    if config.nll_alpha:
        whole = lambda pairs: loss(pairs) + config.nll_alpha * losses.nll_loss(pairs)
        whole.compares_pairs = losses.compares_pairs(loss)
    beta = 0.1 if config.beta is None else config.beta
    if config.loss == "hypo":
        return lambda forward: objectives.hypo(
            forward, whole, beta=beta, kl_weight=config.kl_weight
        )
    return lambda forward: objectives.preference(
        forward,
        whole,
        beta=beta,
        use_weighting=config.use_weighting,
        ld_alpha=config.ld_alpha,
    )


def _check_following(config):
    """The reference that moves, and what else is of few losses."""
    steps, alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
    still = (*REWARDS, *REFERENCE_FREE, "hypo")
    if steps is not None and config.loss in still:
        raise ValueError(
            f"--ref-model-sync-steps moves a reference, which {', '.join(still)} keep or do not have; got "
            f"--loss {config.loss}."
        )
    if steps is not None and not (steps >= 1 and 0 < alpha <= 1):
        raise ValueError(
            "--ref-model-sync-steps must be at least 1 and --ref-model-mixup-alpha lie in (0, 1]; got "
            f"{steps} and {alpha}."
        )
    if config.prompt_embedder and config.loss != "bco":
        raise ValueError(f"--prompt-embedder is of bco, not of {config.loss}.")
    if config.nll_on_prompt and config.loss != "orpo":
        raise ValueError(f"--nll-on-prompt is of orpo, not of {config.loss}.")


def divergence(config: Any):
    """h of `f_dpo_loss`."""
    if config.label_smoothing is not None:
        raise ValueError(f"--label-smoothing is of the reverse KL, not of {config.f_divergence}.")
    if config.f_divergence == "alpha":
        return losses.alpha_divergence(config.f_alpha)
    return getattr(losses, config.f_divergence)


def pair_loss(name: str):
    """The function of `Pairs` of a name."""
    named = {
        "hypo": losses.dpo_loss,
        "robust": losses.robust_dpo_loss,
        "normalised": losses.normalised_dpo_loss,
        "length_regularised": losses.length_regularised_dpo_loss,
    }
    return named.get(name) or getattr(losses, f"{name}_loss")
