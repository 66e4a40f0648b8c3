"""Checks of the flags of reinforce.py before anything expensive."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from experiments.cli import choices, engine, teachers
from experiments.cli import rewards as rewards_cli
from experiments.cli.algorithms import ALGORITHMS
from experiments.cli.servers import UNSERVED
from jaxft import train
from jaxft.parallel import row_shards

COMPANIONS = {
    "kl_horizon": "kl_target",
    "feedback": "turns",
    "sampler_model": "sampler_url",
    "push_dir": "sampler_url",
    "push_api": "push_dir",
    "push_every": "push_dir",
    "distil_as": "teacher",
    "use_bias_correction_kl": "kl_weight",
    "entropy_weight_delta": "entropy_target",
    "entropy_weight_max": "entropy_target",
    "reward_weights": "also_judge",
    "reward_combination": "also_judge",
    "correction_min": "correction",
    "correction_max": "correction",
}
# Flags of the task that have no effect if only a teacher's divergence, or credit, counts.
NO_REWARD = tuple(
    "reward_kl kl_target scale_rewards normalize_advantages reward_combination".split()
)
OF_LOSS = (
    "clip_low",
    "clip_high",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "entropy_target",
)
NO_TASK = ("algorithm", "kl_weight", "entropy_weight", *NO_REWARD, *OF_LOSS)
VERDICTS = ("nft", "expert_iteration")
WITHOUT_ADVANTAGES = ("nft", "online_dpo", "xpo")


def settings(config: Any) -> None:
    """Checks everything that can be checked before anything is loaded."""
    choices.check(config, "algorithm", ALGORITHMS)
    choices.check_companions(config, COMPANIONS)
    teacher(config)
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
    engine.check(config)
    if config.turns < 1 or "" in config.stop:
        raise ValueError(
            f"--turns must be at least 1, got {config.turns}, and no --stop empty: {config.stop}."
        )
    if config.turns > 1 and config.rewards.numbers:
        raise ValueError(
            "--turns needs correct or wrong, which --judge and --reward-model do not give; use --turns 1."
        )
    if config.more.also_judge:
        several_rewards(config)
    if config.sampler_url:
        server(config)
    if config.places is not None:
        places(config)
    if config.max_staleness:
        staleness(config)
    numbers(config)


def teacher(config: Any) -> None:
    """Checks the flags of --teacher and --distil-as."""
    if config.distil_as == "divergence":
        return teachers.check(config, NO_TASK)
    teachers.check(config, NO_REWARD)
    of_divergence = "distil_beta", "distil_temperature", "distil_top_k"
    choices.check_excluded(config, of_divergence, "--distil-as credit")
    if config.distil.served and config.temperature != 1:
        raise ValueError(
            f"--temperature {config.temperature}: a server's log-probs are those at 1, and --distil-as "
            "credit compares them with the policy's; use --temperature 1, or a --teacher that is a model."
        )
    if config.algorithm in WITHOUT_ADVANTAGES:
        raise ValueError(
            f"--distil-as credit adds to advantages, which --algorithm {config.algorithm} has not; use grpo "
            "or another, or --distil-as divergence."
        )


def several_rewards(config: Any) -> None:
    """Checks the rewards of --also-judge, their weights and how they are combined."""
    more, entry = config.more, ALGORITHMS[config.algorithm]
    for spec in more.also_judge:
        rewards_cli.load_judge(spec, "--also-judge")
    if len(more.weights) != 1 + len(more.also_judge) or not all(map(math.isfinite, more.weights)):
        raise ValueError(
            f"--reward-weights {' '.join(map(str, more.weights))}: give a finite weight for the first reward "
            f"and one for each of {len(more.also_judge)} of --also-judge."
        )
    if config.turns > 1:
        raise ValueError(
            "--turns needs correct or wrong, which a sum of rewards is not; leave out --also-judge."
        )
    if config.algorithm in VERDICTS:
        raise ValueError(
            f"--algorithm {config.algorithm} needs correct or wrong, which a sum of rewards is not; leave "
            "out --also-judge, or use grpo."
        )
    if more.reward_combination == "sum_then_normalize":
        return
    given = choices.shown("reward_combination", more.reward_combination)
    if "scale_rewards" not in entry.reads:
        readers = [name for name, other in ALGORITHMS.items() if "scale_rewards" in other.reads]
        raise ValueError(
            f"{given} has no effect with --algorithm {config.algorithm}; use {choices.one_of(readers)}."
        )
    choices.check_excluded(config, ("scale_rewards", "overlong"), given)


def source(config: Any) -> None:
    """Raises ValueError for settings that an encoder-decoder, whose prompts are its source, lacks."""
    given = {
        f"--turns {config.turns}": config.turns > 1,
        f"--sampler-url {config.sampler_url}": bool(config.sampler_url),
        f"--places {config.places}": config.places is not None,
        f"--algorithm {config.algorithm} (it trains a critic)": ALGORITHMS[config.algorithm].values,
    }
    if wrong := [name for name, there in given.items() if there]:
        raise ValueError(
            f"{config.base.model} is an encoder-decoder, which {wrong[0]} does not support; leave it out, or "
            "choose a decoder."
        )


def group(config: Any) -> None:
    """Checks that a group has enough answers for the algorithm."""
    entry = ALGORITHMS[config.algorithm]
    if config.group_size < entry.least_group:
        raise ValueError(
            f"--group-size must be at least {entry.least_group} for --algorithm {config.algorithm}, "
            f"got {config.group_size}."
        )
    if entry.halves and config.group_size % 2:
        raise ValueError(
            f"--algorithm {config.algorithm} samples half of each group from the start: it needs an even "
            f"--group-size, got {config.group_size}."
        )


def numbers(config: Any) -> None:
    """Checks the ranges of numbers."""
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
            f"{config.reward_kl}; start from 0.05, for example."
        )
    weights(config)
    slices = config.optimisation.gradient_accumulation_steps
    if config.policy.top_entropy_quantile < 1 and slices > 1:
        raise ValueError(
            f"--top-entropy-quantile {config.policy.top_entropy_quantile} compares all tokens of a step, "
            f"which --gradient-accumulation-steps {slices} cuts into parts; use 1, and fewer answers."
        )
    if not 0 <= config.overlong <= config.max_new_tokens:
        raise ValueError(
            f"--overlong must lie in 0..--max-new-tokens ({config.max_new_tokens}), got {config.overlong}."
        )


def weights(config: Any) -> None:
    """Checks the importance weights of --correction."""
    low, high = config.policy.correction_min, config.policy.correction_max
    if low and config.correction in ("tokens", "sequences"):
        raise ValueError(
            f"--correction-min {low} has no effect with --correction {config.correction}, which only bounds "
            "weights from above; use token_mask or sequence_mask."
        )
    if not low < high:
        raise ValueError(f"--correction-min {low} must be below --correction-max {high}.")
    if config.algorithm == "vespo" and config.correction in ("sequences", "sequence_mask"):
        raise ValueError(
            f"--correction {config.correction} is refused by --algorithm vespo, which multiplies the weights "
            "of a sequence's tokens; use tokens or token_mask."
        )


def server(config: Any) -> None:
    """Checks that a server's samples can be corrected for."""
    if config.correction == "none":
        raise ValueError(
            "--sampler-url needs --correction tokens or another: the server's policy is not the trainer's."
        )
    if config.temperature != 1:
        raise ValueError(
            f"--sampler-url needs --temperature 1, got {config.temperature}: a server's log-probs may "
            "always be those at temperature 1."
        )
    if config.reward_kl:
        raise ValueError(
            "--sampler-url samples from another policy, so --reward-kl would be its KL; use --kl-weight."
        )
    if config.push_every < 1:
        raise ValueError(f"--push-every must be at least 1 rollout, got {config.push_every}.")
    if config.push_dir:
        train.writable_directory(pathlib.Path(config.push_dir))
        if config.adapter in UNSERVED:
            raise ValueError(
                f"--push-dir: no server takes --adapter {config.adapter}, which is neither LoRA nor can be "
                "merged into the model; use lora or full, or drop --push-dir."
            )


def places(config: Any) -> None:
    """Checks that this process samples answers of one turn."""
    given = {
        f"--sampler-url {config.sampler_url}, which has its own batches": config.sampler_url,
        f"--turns {config.turns}, whose answers go on together": config.turns > 1,
    }
    if wrong := [name for name, there in given.items() if there]:
        raise ValueError(f"--places {config.places} does not go with {wrong[0]}; drop one of them.")


def staleness(config: Any) -> None:
    """Checks that samples of an older policy can be corrected for, and that their age is known."""
    given = f"--max-staleness {config.max_staleness}"
    if config.correction == "none":
        raise ValueError(
            f"{given} needs --correction tokens or sequences: the policy that samples is older than the "
            "one that trains."
        )
    if config.reward_kl:
        raise ValueError(
            f"{given} samples from an older policy, so --reward-kl would be its KL; use --kl-weight."
        )
    if config.sampler_url and not config.push_dir:
        raise ValueError(
            f"{given} needs --push-dir with --sampler-url: without new weights, the server's policy becomes "
            "older than any bound."
        )
    if config.push_every > 1:
        raise ValueError(
            f"{given} needs --push-every 1, got {config.push_every}: the server's weights would be older "
            "than the thread that samples knows."
        )


def mesh(config: Any, devices: Any) -> None:
    """Checks the number of hosts, and that the devices divide the rows of a step."""
    if jax.process_count() > 1 and config.sampler_url:
        raise ValueError(
            f"--sampler-url: each of the {jax.process_count()} hosts would get different answers; let the "
            "trainer sample, or use the devices of one host."
        )
    if config.max_staleness and devices is not None and devices.size > 1:
        raise ValueError(
            f"--max-staleness {config.max_staleness} needs one device, got {devices.size}: two threads could "
            "start programs of several devices in different orders, which is a deadlock; use 0."
        )
    if config.mesh.context != 1:
        raise ValueError(
            f"only sft.py and preference.py support --context {config.mesh.context}: sampling generates "
            "token by token and does not split rows. Use --fsdp or --tensor."
        )
    parts = 1 if devices is None else row_shards(devices)
    rows = config.prompts_per_step * config.group_size
    rows = rows // 2 if ALGORITHMS[config.algorithm].halves else rows  # sampled at once
    slices = config.optimisation.gradient_accumulation_steps
    if rows % (parts * config.updates * slices):
        raise ValueError(
            f"{rows} answers of a rollout, in {config.updates} updates of {slices} parts, cannot be laid "
            f"over data x fsdp x expert = {parts} devices; raise --prompts-per-step or --group-size."
        )


def length(config: Any, model: Any, *, prompts: Sequence[Sequence[int]]) -> None:
    """Checks that the longest question and an answer fit the model."""
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"the longest question has {longest} tokens; with --max-new-tokens {config.max_new_tokens} that "
            f"exceeds the {model.config.max_length} positions of {config.base.model}."
        )
