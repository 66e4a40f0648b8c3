"""Switches for work that reinforce.py can leave out of an update: --share-prompts, --drop-idle."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax

from experiments.cli.algorithms import ALGORITHMS
from experiments.cli.optimizers import SHARPNESS
from jaxft.models import Decoder
from jaxft.parallel import row_shards

Switch = Literal["auto", "on", "off"]


class Saved(NamedTuple):
    """Arguments of jaxft.rl.collect, and `share_prompts` of its transforms."""

    share_prompts: int | None = None
    drop_idle: bool = False
    microbatches: int = 1


def idle_obstacle(config: Any) -> str | None:
    """The reason why idle rows must stay in the batch, if there is one; known from the flags."""
    entry, sharpness = ALGORITHMS[config.algorithm], config.optimisation.sharpness
    if config.kl_weight:
        return f"--kl-weight {config.kl_weight} has a gradient in all rows"
    if config.entropy_weight:
        return f"--entropy-weight {config.entropy_weight} has a gradient in all rows"
    if config.policy.entropy_target is not None:
        return f"--entropy-target {config.policy.entropy_target} has a bonus in all rows"
    if (quantile := config.policy.top_entropy_quantile) < 1:
        return f"--top-entropy-quantile {quantile} compares the tokens of all rows"
    if _diverges(config):
        return "--teacher has a gradient in all rows"
    if entry.all_rows:
        return f"--algorithm {config.algorithm} {entry.all_rows}"
    if SHARPNESS[sharpness].of_predictions:
        return f"--sharpness {sharpness} compares the predictions of all rows"
    return None


def check(config: Any) -> None:
    """Raises ValueError for switches that contradict other flags."""
    if config.share_prompts == "on" and config.group_size == 1:
        raise ValueError("--share-prompts on needs --group-size of at least 2, got 1.")
    if config.drop_idle == "on" and (why := idle_obstacle(config)):
        raise ValueError(f"--drop-idle on: {why}; use --drop-idle auto or off.")


def saved(config: Any, model: Any, params: Any, mesh: Any) -> Saved:
    """Returns what the switches choose; "auto" says in one line why it does without.

    Raises:
        ValueError: for "on" where it cannot be.
    """
    slices = config.optimisation.gradient_accumulation_steps
    devices = 1 if mesh is None else row_shards(mesh)
    share = config.group_size > 1 and _chosen(
        "--share-prompts", config.share_prompts, _unshared(config, model, params, slices * devices)
    )
    many = "several processes divide the rows" if jax.process_count() > 1 else None
    drop = _chosen("--drop-idle", config.drop_idle, idle_obstacle(config) or many)
    return Saved(config.group_size if share else None, drop, slices)


def _diverges(config):
    """True if a teacher's divergence is in the loss."""
    return config.distil.teacher is not None and config.distil_as == "divergence"


def _unshared(config, model, params, parts):
    if _diverges(config):
        return "--teacher reads each answer behind its own prompt"
    if not isinstance(model, Decoder):
        return f"{config.base.model} is not a decoder"
    if why := model.branch_obstacle(params):
        return why
    if SHARPNESS[config.optimisation.sharpness].of_predictions:
        return f"--sharpness {config.optimisation.sharpness} compares predictions row by row"
    if config.prompts_per_step % (config.updates * parts):
        return (
            f"--prompts-per-step {config.prompts_per_step} is not a multiple of --updates x "
            f"--gradient-accumulation-steps x devices = {config.updates * parts}"
        )
    return None


def _chosen(flag, switch, obstacle):
    """True if the switch is on, or "auto" without an obstacle."""
    if switch == "off" or obstacle is None:
        return switch != "off"
    if switch == "on":
        raise ValueError(f"{flag} on: {obstacle}; use {flag} auto or off.")
    print(f"{flag} off: {obstacle}.", flush=True)
    return False
