"""The choices of --algorithm and --correction of reinforce.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from jaxft import rl
from jaxft.losses import dpo_loss
from jaxft.models import Forward
from jaxft.objectives import policy_gradient
from jaxft.objectives.policy import sequence_correction, token_correction
from jaxft.rl.algorithms import Build

CORRECTIONS = {
    "none": lambda: None,
    "tokens": token_correction,
    "sequences": sequence_correction,
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


IN_REWARD = ("reward_kl", "kl_target", "kl_horizon")
AT_SAMPLER = "computes its gradient at the sampling policy, without an importance ratio"
ONLY_SAMPLER = {name: AT_SAMPLER for name in ("updates", "epochs", "max_staleness")}
VERDICTS = {"reward_model": "needs correct or wrong, which a reward model does not give"}
ONLINE = ONLY_SAMPLER | {"sampler_url": AT_SAMPLER}
HALF = "samples half of each group from the initial model"


def _pair_loss(config):
    return functools.partial(dpo_loss, beta=config.beta)


ALGORITHMS = {
    "reinforce": Entry(lambda build, _: rl.reinforce_with_baseline(build), least_group=1),
    "rloo": Entry(lambda build, c: rl.rloo(build, c.group_size, c.reward_kl), IN_REWARD),
    "grpo": Entry(lambda build, c: rl.grpo(build, c.group_size)),
    "dr_grpo": Entry(lambda build, c: rl.dr_grpo(build, c.group_size, c.max_new_tokens * c.turns)),
    "dapo": Entry(lambda build, c: rl.dapo(build, c.group_size)),
    "gspo": Entry(lambda build, c: rl.gspo(build, c.group_size)),
    "cispo": Entry(lambda build, c: rl.cispo(build, c.group_size)),
    "reinforce_plus_plus": Entry(
        lambda build, c: rl.reinforce_plus_plus(build, c.reward_kl), IN_REWARD, least_group=1
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
        ),
        (*IN_REWARD, "gamma", "lam", "value_clip", "value_weight"),
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
        correction=CORRECTIONS[config.correction](),
    )
    return ALGORITHMS[config.algorithm].make(build, config)
