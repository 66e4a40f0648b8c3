"""The choices of --algorithm and --correction of reinforce.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jaxft import rl
from jaxft.losses import dpo_loss
from jaxft.models import Forward
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import Correction as PolicyCorrection
from jaxft.objectives.policy import (
    sequence_correction,
    sequence_mask,
    token_correction,
    token_mask,
)
from jaxft.rl.advantages import (
    batch_scaled_advantages,
    centred_advantages,
    grpo_advantages,
)
from jaxft.rl.algorithms import Build
from jaxft.rl.token_losses import off_policy_masked

CORRECTIONS = {
    "none": lambda low, high: None,
    "tokens": lambda low, high: token_correction(high),
    "sequences": lambda low, high: sequence_correction(high),
    "token_mask": token_mask,
    "sequence_mask": sequence_mask,
}
SCALES = {
    "group": grpo_advantages,
    "batch": batch_scaled_advantages,
    "none": centred_advantages,
}


class Entry(NamedTuple):
    """Makes an algorithm; names what it needs, reads and refuses (see `choices`)."""

    make: Callable[[Build, Any], rl.Algorithm]  # (build, config)
    reads: tuple[str, ...] = ()
    refuses: Mapping[str, str] = {}
    least_group: int = 2  # smallest group of answers to a question; 1: no comparison
    values: bool = False  # needs a value head and the values of a rollout
    halves: bool = False  # the initial model samples half of each group
    all_rows: str = ""  # why rows with advantage 0 must stay in the batch


MASKED = ("off_policy_mask_threshold", "top_entropy_quantile")
CLIPPED = (*MASKED, "clip_low", "clip_high")
IN_REWARD = ("reward_kl", "kl_target", "kl_horizon")
AT_SAMPLER = "computes its gradient at the sampling policy, without an importance ratio"
ONLY_SAMPLER = {name: AT_SAMPLER for name in ("updates", "epochs", "max_staleness")}
VERDICTS = {"reward_model": "needs correct or wrong, which a reward model does not give"}
ONLINE = ONLY_SAMPLER | {"sampler_url": AT_SAMPLER}
HALF = "samples half of each group from the initial model"


def _pair_loss(config):
    return functools.partial(dpo_loss, beta=config.beta)


def _scale(config):
    return SCALES[config.policy.scale_rewards]


def _scaled(make, *clips):
    """Returns the entry of an algorithm of groups with `clips`, or both."""

    def made(build, c):
        return make(build, c.group_size, advantage=_scale(c), **c.policy.clips(*clips))

    return Entry(made, (*MASKED, *(clips or ("clip_low", "clip_high")), "scale_rewards"))


def correction(config: Any) -> PolicyCorrection | None:
    """Returns the weights of --correction."""
    low, high = config.policy.correction_min, config.policy.correction_max
    return CORRECTIONS[config.correction](low, high)


ALGORITHMS = {
    "reinforce": Entry(
        lambda build, c: rl.reinforce_with_baseline(build, **c.policy.clips()),
        CLIPPED,
        least_group=1,
    ),
    "rloo": Entry(
        lambda build, c: rl.rloo(
            build,
            c.group_size,
            c.reward_kl,
            normalised=c.policy.normalize_advantages,
            **c.policy.clips(),
        ),
        (*IN_REWARD, *CLIPPED, "normalize_advantages"),
    ),
    "grpo": _scaled(rl.grpo),
    "dr_grpo": Entry(
        lambda build, c: rl.dr_grpo(
            build, c.group_size, c.max_new_tokens * c.turns, **c.policy.clips()
        ),
        CLIPPED,
    ),
    "dapo": _scaled(rl.dapo),
    "gspo": _scaled(rl.gspo),
    "luspo": _scaled(rl.luspo),
    "cispo": _scaled(rl.cispo, "clip_high"),
    "sapo": Entry(
        lambda build, c: rl.sapo(build, c.group_size, advantage=_scale(c)),
        (*MASKED, "scale_rewards"),
    ),
    "vespo": Entry(
        lambda build, c: rl.vespo(
            build, c.group_size, advantage=_scale(c), correction=correction(c)
        ),
        (*MASKED, "scale_rewards"),
    ),
    "reinforce_plus_plus": Entry(
        lambda build, c: rl.reinforce_plus_plus(build, c.reward_kl, **c.policy.clips()),
        (*IN_REWARD, *CLIPPED),
        least_group=1,
    ),
    "expert_iteration": Entry(
        lambda build, _: rl.expert_iteration(build),
        refuses=ONLY_SAMPLER | VERDICTS,
        least_group=1,
    ),
    "nft": Entry(
        lambda build, c: rl.nft(build, c.group_size),
        refuses=VERDICTS,
        all_rows="weighs answers without advantages",
    ),
    "ppo": Entry(
        lambda build, c: rl.ppo(
            build,
            c.reward_kl,
            gamma=c.gamma,
            lam=c.lam,
            value_clip=c.value_clip,
            value_weight=c.value_weight,
            **c.policy.clips(),
        ),
        (*IN_REWARD, *CLIPPED, "gamma", "lam", "value_clip", "value_weight"),
        least_group=1,
        values=True,
        all_rows="trains its critic on all rows",
    ),
    "online_dpo": Entry(
        lambda build, c: rl.online_preference(build, _pair_loss(c), c.group_size),
        ("beta",),
        ONLINE,
    ),
    "xpo": Entry(
        lambda build, c: rl.xpo(build, _pair_loss(c), c.group_size, c.xpo_alpha),
        ("beta", "xpo_alpha"),
        ONLINE | {"turns": HALF, "places": HALF, "correction": f"{HALF}, which is another policy"},
        halves=True,
    ),
}

Choice = Literal[tuple(ALGORITHMS)]
Correction = Literal[tuple(CORRECTIONS)]


def algorithm(config: Any, forward: Forward) -> rl.Algorithm:
    """Returns the credit and the objective of --algorithm."""
    build = functools.partial(
        policy_gradient,
        forward,
        temperature=config.temperature,
        kl_weight=config.kl_weight,
        entropy_weight=config.entropy_weight,
        correction=correction(config),
        top_entropy=config.policy.top_entropy_quantile,
        corrects_kl=config.policy.use_bias_correction_kl,
    )
    threshold = config.policy.off_policy_mask_threshold
    if threshold is not None:
        plain = build
        build = lambda loss, *rest, **settings: plain(
            off_policy_masked(loss, threshold), *rest, **settings
        )
    return ALGORITHMS[config.algorithm].make(build, config)
