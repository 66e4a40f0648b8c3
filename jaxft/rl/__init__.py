"""Reinforcement learning of language models: advantages, experience, algorithms."""

from jaxft.rl.algorithms import (
    Algorithm,
    Credit,
    cispo,
    dapo,
    dr_grpo,
    expert_iteration,
    grpo,
    gspo,
    luspo,
    nft,
    ppo,
    reads_kl_weight,
    reinforce_plus_plus,
    reinforce_with_baseline,
    rloo,
    sapo,
    vespo,
)
from jaxft.rl.collection import Collector, KlControl, collect
from jaxft.rl.environments import Environment, Reply, tagged, try_again, with_tool
from jaxft.rl.exploratory import answers_of_both, xpo
from jaxft.rl.filtering import learnable
from jaxft.rl.forced import add_chances, exact_chances, sampled_chances, with_terminations
from jaxft.rl.groups import in_groups, without_idle
from jaxft.rl.guided import guided_answers, writer
from jaxft.rl.on_device import (
    DeviceReward,
    collect_on_device,
    equals,
    estimate_success,
    sample_on_device,
)
from jaxft.rl.online import (
    SamplesBeside,
    best_and_worst,
    online_preference,
)
from jaxft.rl.progress import (
    mrt_online,
    mrt_stale,
    normalised_regret,
    separator_ends,
    split_episodes,
    text_ends,
)
from jaxft.rl.prompts import Asked, Prompts, prompts_of
from jaxft.rl.rollouts import Sample, answers, sample_groups
from jaxft.rl.selective import gpg_advantages, largest_advantages, pass_at_k_advantages
from jaxft.rl.self_training import offline_collect, online_self_training, right_samples
from jaxft.rl.several import normalised_sums
from jaxft.rl.teachers import add_served_teacher, add_teacher, reverse_kl_credit
from jaxft.rl.transforms import (
    Transform,
    add_old_policy,
    add_penalty,
    add_reference,
    add_values,
    mask_truncated,
    policy_log_probs,
    until_contrast,
)
from jaxft.rl.turns import episodes
from jaxft.rl.two_critics import add_guided_policy, guided_ppo, with_references

__all__ = [
    "Algorithm",
    "Asked",
    "Collector",
    "Credit",
    "DeviceReward",
    "Environment",
    "KlControl",
    "Prompts",
    "Reply",
    "Sample",
    "SamplesBeside",
    "Transform",
    "add_guided_policy",
    "add_chances",
    "add_old_policy",
    "add_penalty",
    "add_reference",
    "add_served_teacher",
    "add_teacher",
    "add_values",
    "answers",
    "answers_of_both",
    "best_and_worst",
    "cispo",
    "collect",
    "collect_on_device",
    "dapo",
    "dr_grpo",
    "episodes",
    "equals",
    "estimate_success",
    "exact_chances",
    "expert_iteration",
    "grpo",
    "gspo",
    "guided_answers",
    "guided_ppo",
    "in_groups",
    "luspo",
    "learnable",
    "mask_truncated",
    "mrt_online",
    "mrt_stale",
    "nft",
    "normalised_sums",
    "normalised_regret",
    "offline_collect",
    "online_preference",
    "online_self_training",
    "policy_log_probs",
    "ppo",
    "prompts_of",
    "reads_kl_weight",
    "reverse_kl_credit",
    "reinforce_plus_plus",
    "reinforce_with_baseline",
    "right_samples",
    "rloo",
    "sapo",
    "vespo",
    "sample_groups",
    "sample_on_device",
    "sampled_chances",
    "separator_ends",
    "split_episodes",
    "tagged",
    "text_ends",
    "try_again",
    "until_contrast",
    "with_references",
    "with_terminations",
    "with_tool",
    "without_idle",
    "writer",
    "xpo",
    "gpg_advantages",
    "largest_advantages",
    "pass_at_k_advantages",
]
