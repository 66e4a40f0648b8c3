"""Algorithms of the taxonomy, and the other ways to train that the script compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxft import rl
from jaxft.objectives.policy import token_mean
from jaxft.rl.token_losses import reinforce


class Method(NamedTuple):
    """An algorithm of the taxonomy."""

    make: Callable[[Any, int, int], rl.Algorithm]  # (build, group size, longest answer)
    updates: int = 2  # for each rollout; 1: the algorithm has no ratio
    critic: bool = False


def _gpg(build, group, length):
    credit = lambda rewards, batch: {"advantages": rl.gpg_advantages(rewards, group)}
    return rl.Algorithm(credit, build(reinforce(), token_mean))


METHODS = {
    "PPO": Method(lambda build, group, length: rl.ppo(build), critic=True),
    "REINFORCE": Method(lambda build, group, length: rl.reinforce_with_baseline(build)),
    "REINFORCE++": Method(lambda build, group, length: rl.reinforce_plus_plus(build)),
    "RLOO": Method(lambda build, group, length: rl.rloo(build, group)),
    "GRPO": Method(lambda build, group, length: rl.grpo(build, group)),
    "Dr. GRPO": Method(lambda build, group, length: rl.dr_grpo(build, group, length)),
    "DAPO": Method(lambda build, group, length: rl.dapo(build, group)),
    "GSPO": Method(lambda build, group, length: rl.gspo(build, group)),
    "CISPO": Method(lambda build, group, length: rl.cispo(build, group)),
    "NFT": Method(lambda build, group, length: rl.nft(build, group)),
    "CPPO": Method(
        lambda build, group, length: rl.grpo(
            build, group, advantage=rl.largest_advantages(max(group // 2, 1))
        )
    ),
    "GPG": Method(_gpg, updates=1),
    "pass@k": Method(
        lambda build, group, length: rl.grpo(build, group, advantage=rl.pass_at_k_advantages)
    ),
    "expert iteration": Method(lambda build, group, length: rl.expert_iteration(build), updates=1),
}
SFT, RANDOM, NOISY = "SFT", "random reward", "noisy pictures"
PART, SFT_PART = "GRPO, two skills", "SFT, two skills"
EXTRA = (RANDOM, PART, SFT_PART)
TRAINED = ("count", "choose")  # the skills of PART; the others are left out
NOISE = 0.3  # standard deviation of the noise of NOISY; pixels are from -1 to 1
