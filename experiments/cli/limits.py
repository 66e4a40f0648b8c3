"""Ranges of numeric flags, by the name of the flag in all scripts."""

from __future__ import annotations

import math
from typing import TypeVar

from experiments.cli import choices, flags

Config = TypeVar("Config")

_COUNTS = (
    "answers batch_size batch_sizes biographies budget chunk context d depth dev digits dims "
    "distil_top_k documents draws early epochs eval_steps evaluate_every every examples expert "
    "fine_tuning_steps gradient_accumulation_steps grid group_size held_out images inner_steps known "
    "layers length limit logging_steps max_length max_new_tokens max_prompt max_steps max_tries "
    "measured microbatches mined most most_steps num_beams num_samples numbers own pairs patience places "
    "pretrain_rows pretrain_steps pretraining problems prompts_per_step questions rank responses "
    "rft_steps rl_steps rollouts rows_at_once sampled_at_once samples save_steps seeds sft_steps "
    "shot_steps shots size sizes slices steps tensor terms text_steps trained_at_once transform_steps "
    "turns updates verifier_steps votes width widths words workers"
).split()
_POSITIVE = (
    "adamw_rate clip_high correction_max distil_temperature entropy_target entropy_weight_delta "
    "entropy_weight_max full_rate full_rates kappa kl_horizon learning_rate learning_rates "
    "max_grad_norm off_policy_mask_threshold pretrain_rate rates sft_rate text_rates timeout"
).split()
_NOT_NEGATIVE = (
    "center_rewards_coefficient clip_low correction_min desirable_weight inner_rate kl kl_weight "
    "max_staleness min_gap min_new_tokens mine negatives nll_alpha reference_weight reward_kl rho "
    "router_balance router_z strong_kl temperature text_kl_weight undesirable_weight value_clip "
    "value_weight warmup_epochs weight_decay xpo_alpha"
).split()
_SHARES = (
    "dense_share distil_beta error errors gamma guide guided_first judged lam ld_alpha learner levels "
    "listed max_bad mix mixture share tau until"
).split()

LIMITS = {
    **dict.fromkeys(_COUNTS, (lambda x: x >= 1, "at least 1")),
    **dict.fromkeys(_POSITIVE, (lambda x: 0 < x < math.inf, "positive and finite")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda x: 0 <= x < math.inf, "at least 0")),
    **dict.fromkeys(_SHARES, (lambda x: 0 <= x <= 1, "between 0 and 1")),
    **dict.fromkeys(("data_axis", "fsdp"), (lambda x: x == -1 or x >= 1, "at least 1, or -1")),
    **dict.fromkeys(
        ("label_smoothing", "warmup_ratio"), (lambda x: 0 <= x < 1, "at least 0 and below 1")
    ),
    # jax.random.key keeps 32 bits, so that a larger seed would repeat the draws of a smaller one.
    **dict.fromkeys(
        ("seed", "first_seed", "start_seed"),
        (lambda x: 0 <= x < 2**32, "at least 0 and below 2^32"),
    ),
    "distil_weight": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_entropy_quantile": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    **dict.fromkeys(("margin", "margin_mined"), (math.isfinite, "a finite number")),
    "alpha": (lambda x: x != 0 and math.isfinite(x), "a number other than 0"),
}


def check(config: Config) -> Config:
    """Returns the config; raises ValueError if a number of a flag is outside its range."""
    for name, value in flags.flat(config).items():
        if name not in LIMITS:
            continue
        fine, said = LIMITS[name]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not fine(number):
                raise ValueError(f"{choices.option(name)} must be {said}, got {number}.")
    return config
