"""What can be seen to be wrong with the flags of reinforce.py before minutes are spent."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from experiments.cli import choices
from experiments.cli.algorithms import ALGORITHMS
from experiments.cli.servers import UNSERVED
from jaxft import train

COMPANIONS = {
    "kl_horizon": "kl_target",
    "feedback": "turns",
    "sampler_model": "sampler_url",
    "push_dir": "sampler_url",
    "push_api": "push_dir",
    "push_every": "push_dir",
}


def settings(config: Any) -> None:
    """What can be seen to be wrong before anything is loaded."""
    choices.check(config, "algorithm", ALGORITHMS)
    choices.check_companions(config, COMPANIONS)
    rows = config.prompts_per_step * config.group_size
    parts = config.updates * config.optimisation.gradient_accumulation_steps
    if min(rows, parts, config.prompts_per_step, config.updates, config.epochs) < 1 or rows % parts:
        raise ValueError(
            f"--prompts-per-step {config.prompts_per_step} x --group-size {config.group_size} = {rows} "
            f"answers must be a positive multiple of --updates {config.updates} x "
            f"--gradient-accumulation-steps {config.optimisation.gradient_accumulation_steps}, and --epochs "
            f"({config.epochs}) positive."
        )
    group(config)
    if config.turns < 1 or "" in config.stop:
        raise ValueError(
            f"--turns must be at least 1, got {config.turns}, and no --stop empty: {config.stop}."
        )
    if config.turns > 1 and config.rewards.numbers:
        raise ValueError(
            "--turns needs right or wrong, which --judge and --reward-model do not tell; take --turns 1."
        )
    if config.sampler_url:
        server(config)
    numbers(config)


def group(config: Any) -> None:
    """Whether a group has the answers that the algorithm compares."""
    entry = ALGORITHMS[config.algorithm]
    if config.group_size < entry.least_group:
        raise ValueError(
            f"--group-size must be at least {entry.least_group} for --algorithm {config.algorithm}, "
            f"got {config.group_size}."
        )
    if entry.halves and config.group_size % 2:
        raise ValueError(
            f"--algorithm {config.algorithm} gives half of each group to the start: it needs an even "
            f"--group-size, got {config.group_size}."
        )


def numbers(config: Any) -> None:
    """Whether numbers lie in their ranges."""
    if config.temperature <= 0:
        raise ValueError(f"--temperature must be positive, got {config.temperature}.")
    if config.beta <= 0 or config.xpo_alpha < 0:
        raise ValueError(
            "--beta must be positive and --xpo-alpha at least 0, got "
            f"{config.beta} and {config.xpo_alpha}."
        )
    if config.kl_target is not None and not (config.reward_kl > 0 and config.kl_target > 0):
        raise ValueError(
            f"--kl-target {config.kl_target} must be positive and adapts --reward-kl, which is "
            f"{config.reward_kl}; start from 0.05, say."
        )
    if not 0 <= config.overlong <= config.max_new_tokens:
        raise ValueError(
            f"--overlong must lie in 0..--max-new-tokens ({config.max_new_tokens}), got {config.overlong}."
        )


def server(config: Any) -> None:
    """Whether what a server samples can be corrected for."""
    if config.correction == "none":
        raise ValueError(
            "--sampler-url needs --correction tokens or sequences: the server's policy is not the trainer's."
        )
    if config.temperature != 1:
        raise ValueError(
            f"--sampler-url needs --temperature 1, got {config.temperature}: at others a server's log-probs "
            "may be those of 1."
        )
    if config.reward_kl:
        raise ValueError(
            "--sampler-url samples from another policy, whose KL --reward-kl would be; take --kl-weight."
        )
    if config.push_every < 1:
        raise ValueError(f"--push-every must be at least 1 rollout, got {config.push_every}.")
    if config.push_dir:
        train.writable_directory(pathlib.Path(config.push_dir))
        if config.adapter in UNSERVED:
            raise ValueError(
                f"--push-dir: no server takes --adapter {config.adapter}, which is neither LoRA nor can be "
                "merged into the model; take lora or full, or drop --push-dir."
            )


def mesh(config: Any, devices: Any) -> None:
    """Whether there is one host, and the rows of a step can be laid over its devices."""
    if jax.process_count() > 1 and config.sampler_url:
        raise ValueError(
            f"--sampler-url: each of the {jax.process_count()} hosts would get answers of its own; let the "
            "trainer sample, or use the devices of one host."
        )
    if config.mesh.context != 1:
        raise ValueError(
            f"--context {config.mesh.context} is of sft.py and preference.py: sampling goes token by token "
            "and does not split rows. Use --fsdp or --tensor."
        )
    parts = 1 if devices is None else devices.shape["data"] * devices.shape["fsdp"]
    rows = config.prompts_per_step * config.group_size
    rows = rows // 2 if ALGORITHMS[config.algorithm].halves else rows  # sampled at a time
    slices = config.optimisation.gradient_accumulation_steps
    if rows % (parts * config.updates * slices):
        raise ValueError(
            f"{rows} answers of a rollout, in {config.updates} updates of {slices} parts, cannot be laid "
            f"over data x fsdp = {parts} devices; raise --prompts-per-step or --group-size."
        )


def length(config: Any, model: Any, *, prompts: Sequence[Sequence[int]]) -> None:
    """Whether the longest question and an answer fit the model."""
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"the longest question has {longest} tokens; with --max-new-tokens {config.max_new_tokens} that "
            f"exceeds the {model.config.max_length} positions of {config.base.model}."
        )
