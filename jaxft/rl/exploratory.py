"""Exploratory preference optimisation: online DPO that also lowers the reference's answers' likelihood.

Xie et al., 2024, arxiv.org/abs/2405.21046, algorithm 1. `answers_of_both` samples, `xpo` trains.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxft.keys import stream
from jaxft.models import Decoder
from jaxft.objectives.preferences import PairLoss
from jaxft.parallel import in_turn, to_host
from jaxft.rl.algorithms import Algorithm, Build
from jaxft.rl.online import online_preference
from jaxft.rl.rollouts import Sample, checked, interleaved, model_inputs
from jaxft.rl.transforms import policy_log_probs


def answers_of_both(sample: Sample, model: Decoder, ref_params, temperature: float) -> Sample:
    """Samples groups: the first half from the policy, the second half from the reference.

    The batch has `from_reference` [B]; in those rows `sampler_log_probs` are the policy's, as in all rows,
    and `behaviour_log_probs` the reference's. The same rewards judge both halves.

    Args:
        sample: `answers` with half the group size.
        model: a Decoder.
        ref_params: params of the reference.
        temperature: the temperature of `sample`.
    """

    def both(params, asked, key):
        own = checked(sample(params, asked, key))
        other = checked(sample(ref_params, asked, stream(key, "reference")))
        whole, given = interleaved(own, other, len(asked.ids), asked.columns)
        found = policy_log_probs(model.forward, params, model_inputs(whole), temperature)
        scored = to_host(in_turn(found))
        sampled = np.where(given[:, None], scored, whole["sampler_log_probs"])
        return whole | {"sampler_log_probs": sampled, "from_reference": given}

    return both


def xpo(build: Build, loss: PairLoss, group_size: int, alpha: float = 1e-5) -> Algorithm:
    """A pairwise loss on each group's best and worst answer, plus α log π of the reference's answers.

    The mean over groups that have a pair of loss + α mean log π(y_ref | x): the second term moves likelihood
    from the reference's answers to unexplored ones. Its credit is the constant -α for each of these rows. For
    the rest, and the limit of one update per rollout, see `online_preference`. An additional metric is
    `reference_log_prob`, of the reference's answers under the policy, which should fall.

    Args:
        build: a partial of `policy_gradient`.
        loss: `functools.partial(dpo_loss, beta=0.1)` or any function of `Pairs`.
        group_size: answers to each prompt, half of them from the reference; must be even.
        alpha: α, in nats per nat; TRL uses 1e-5; 0 gives online DPO.
    """
    if group_size % 2 or alpha < 0:
        raise ValueError(
            "xpo: group_size must be even (half is the reference's), and alpha at least 0; got "
            f"{group_size} and {alpha}."
        )
    pairwise = online_preference(build, loss, group_size)

    def credit(rewards, batch):
        given = pairwise.credit(rewards, batch)
        mask = jnp.asarray(batch["completion_mask"])
        counted, paired = jnp.any(mask, axis=1), given["stats"]["paired"]
        chosen = jnp.asarray(batch["from_reference"]) & counted
        share = chosen / jnp.maximum(_of_group(chosen, group_size), 1)
        # As in online_preference: the objective divides by rows with tokens, but the mean is over pairs.
        scale = jnp.sum(counted) / jnp.maximum(jnp.sum(paired) / group_size, 1)
        sums = jnp.sum(jnp.where(mask, jnp.asarray(batch["sampler_log_probs"]), 0.0), axis=1)
        stats = {"reference_log_prob": jnp.where(chosen, sums, jnp.nan)}
        return {
            "advantages": given["advantages"] - alpha * scale * share * paired,
            "stats": {**given["stats"], **stats},
        }

    return Algorithm(credit, pairwise.objective)


def _of_group(rows, size):
    return jnp.repeat(jnp.sum(rows.reshape(-1, size), axis=1), size)
