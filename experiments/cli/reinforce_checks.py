"""What can be seen to be wrong with the flags of reinforce.py before minutes are spent."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from jaxft import train

UNGROUPED = ("reinforce", "reinforce_plus_plus", "expert_iteration", "ppo")
OF_VERDICTS = ("expert_iteration", "nft")
UNSERVED = ("bottleneck", "parallel", "prompt", "prefix", "intrinsic")
ONLINE = ("online_dpo", "xpo")
NO_RATIO = ("expert_iteration",)  # takes -r log π, right at the policy that sampled
KL_IN_REWARD = ("rloo", "reinforce_plus_plus", "ppo")


def settings(config: Any) -> None:
    """What can be seen to be wrong before anything is loaded."""
    rows = config.prompts_per_step * config.group_size
    parts = config.updates * config.gradient_accumulation_steps
    if min(rows, parts, config.prompts_per_step, config.updates, config.epochs) < 1 or rows % parts:
        raise ValueError(
            f"--prompts-per-step {config.prompts_per_step} x --group-size {config.group_size} = {rows} "
            f"answers must be a positive multiple of --updates {config.updates} x "
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps}, and --epochs "
            f"({config.epochs}) positive."
        )
    if config.turns < 1 or "" in config.stop:
        raise ValueError(
            f"--turns must be at least 1, got {config.turns}, and no --stop empty: {config.stop}."
        )
    if config.algorithm in NO_RATIO and config.updates * config.epochs > 1:
        raise ValueError(
            f"{config.algorithm} takes its gradient at the policy that sampled, with no importance ratio: "
            f"--updates 1 and --epochs 1; got {config.updates} and {config.epochs}. For several updates a "
            "rollout take rloo, dr_grpo, dapo, gspo or ppo."
        )
    if config.sampler_url:
        server(config)
    elif config.push_dir:
        raise ValueError(
            f"--push-dir {config.push_dir} is where a server finds weights: give its --sampler-url too."
        )
    if config.temperature <= 0:
        raise ValueError(f"--temperature must be positive, got {config.temperature}.")
    if config.reward_kl and config.algorithm not in KL_IN_REWARD:
        raise ValueError(
            f"--reward-kl is for {', '.join(KL_IN_REWARD)}; {config.algorithm} takes --kl-weight."
        )
    if config.kl_target is not None and not (config.reward_kl > 0 and config.kl_target > 0):
        raise ValueError(
            f"--kl-target {config.kl_target} must be positive and adapts --reward-kl, which is "
            f"{config.reward_kl}; start from 0.05, say."
        )
    if config.algorithm in ONLINE:
        online(config)
    if (
        config.reward_model
        and config.algorithm in OF_VERDICTS
        or _judged(config)
        and config.turns > 1
    ):
        raise ValueError(
            f"{', '.join(OF_VERDICTS)} and --turns need right or wrong, which --reward-model does not tell "
            "(nor --judge, for --turns)."
        )
    if config.group_size < 2 and config.algorithm not in UNGROUPED:
        raise ValueError(
            f"--group-size must be at least 2 for {config.algorithm}, got {config.group_size}."
        )
    if not 0 <= config.overlong <= config.max_new_tokens:
        raise ValueError(
            f"--overlong must lie in 0..--max-new-tokens ({config.max_new_tokens}), got {config.overlong}."
        )


def _judged(config):
    return config.judge or config.reward_model


def online(config: Any) -> None:
    """Whether the credit of pairs is that of the policy that is trained, and xpo's halves are halves."""
    if config.updates * config.epochs > 1 or config.sampler_url or config.beta <= 0:
        raise ValueError(
            f"{config.algorithm} takes its gradient at the policy that sampled: --updates 1, --epochs 1, no "
            f"--sampler-url, and a positive --beta; got {config.updates}, {config.epochs}, "
            f"{config.sampler_url} and {config.beta}."
        )
    if config.algorithm != "xpo":
        return
    if (
        config.group_size % 2
        or config.turns > 1
        or config.correction != "none"
        or config.xpo_alpha < 0
    ):
        raise ValueError(
            "xpo gives half of each group to the start: it needs an even --group-size, --turns 1, "
            "--correction none (the start is another policy) and --xpo-alpha of at least 0; got "
            f"{config.group_size}, {config.turns}, {config.correction} and {config.xpo_alpha}."
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
    if config.context != 1:
        raise ValueError(
            f"--context {config.context} is of sft.py and preference.py: sampling goes token by token and "
            "does not split rows. Use --fsdp or --tensor."
        )
    parts = 1 if devices is None else devices.shape["data"] * devices.shape["fsdp"]
    rows = config.prompts_per_step * config.group_size
    rows = rows // 2 if config.algorithm == "xpo" else rows  # sampled at a time
    if rows % (parts * config.updates * config.gradient_accumulation_steps):
        raise ValueError(
            f"{rows} answers of a rollout, in {config.updates} updates of "
            f"{config.gradient_accumulation_steps} parts, cannot be laid over data x fsdp = {parts} devices; "
            "raise --prompts-per-step or --group-size."
        )


def length(config: Any, model: Any, *, prompts: Sequence[Sequence[int]]) -> None:
    """Whether the longest question and an answer fit the model."""
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"the longest question has {longest} tokens; with --max-new-tokens {config.max_new_tokens} that "
            f"exceeds the {model.config.max_length} positions of {config.model}."
        )
