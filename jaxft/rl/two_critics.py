"""PPO on responses of two writers, the policy and a guide, with a critic for each: see `jaxft.rl.guided`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxft import losses
from jaxft.metrics import Mean, Terms, terms_of
from jaxft.models import Forward
from jaxft.objectives import (
    Objective,
    mean_of,
    supervised,
    token_values,
    with_value_head,
    without_value_head,
)
from jaxft.objectives.policy import completion_forward, row_mean, token_mean
from jaxft.parallel import in_turn, to_host
from jaxft.rl.advantages import generalised_advantages, placed_rewards
from jaxft.rl.algorithms import Algorithm, kl_penalties, reads_kl_weight
from jaxft.rl.rollouts import Batch, model_inputs
from jaxft.rl.transforms import Transform
from jaxft.rl.turns import GUIDE, POLICY

GUIDE_HEAD = "guide_value_head"  # the entry of the params: V^g, a head like `value_head`


def with_critics(model: Any, params: Any) -> Any:
    """The params with two value heads of zeros: V of the policy, and V^g of the guide.

    Both read the policy's hidden states; the authors have a separate model for each critic.
    """
    params = with_value_head(model, params)
    return params | {GUIDE_HEAD: jax.tree.map(jnp.zeros_like, params["value_head"])}


def without_critics(params: Any) -> Any:
    """The params of the model itself, to save and use."""
    return {n: node for n, node in without_value_head(params).items() if n != GUIDE_HEAD}


def critic_values(
    params: Any, hidden: Float[Array, "B N D"], guide_critic: Bool[Array, " B"]
) -> Float[Array, "B N"]:
    """V^g of each state in the rows where the guide ends, V in the others.

    Raises:
        ValueError: without a value head for the guide in the params.
    """
    if GUIDE_HEAD not in params:
        raise ValueError(
            f"guided: the params have no {GUIDE_HEAD}, the critic of its roll-outs; see with_critics."
        )
    own = token_values(params, hidden)
    of_guide = token_values({"value_head": params[GUIDE_HEAD]}, hidden)
    return jnp.where(jnp.asarray(guide_critic)[:, None], of_guide, own)


def add_guided_policy(forward: Forward, temperature: float) -> Transform:
    """Adds `old_log_probs` [B, N] of the policy, of all tokens, and `old_values` of each row's critic.

    Args:
        forward: the model's model.forward.
        temperature: the policy's sampling temperature.

    Raises:
        ValueError: when called, without a value head for the guide in the params.
    """

    def add(batch, params, key):
        given = model_inputs(batch)
        found = _scores(forward, params, given, batch["guide_critic"], temperature)
        log_probs, values = to_host(in_turn(found))
        return batch | {"old_log_probs": log_probs, "old_values": values}

    return add


def written_masks(batch: Batch) -> tuple[Bool[Array, "B N"], Bool[Array, "B N"]]:
    """(the policy's tokens, the roll-out's tokens): where the policy and the critic are trained."""
    mask, author = jnp.asarray(batch["completion_mask"]), jnp.asarray(batch["author"])
    last = jnp.where(jnp.asarray(batch["guide_critic"])[:, None], GUIDE, POLICY)
    return mask & (author == POLICY), mask & (author == last)


def guided_ppo(
    forward: Forward,
    reward_kl: float = 0.0,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 0.5,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Algorithm:
    """PPO on the policy's tokens, and its critic on those of the roll-out: see `written_masks`.

    GAE runs over the whole response, without whitening; each loss is a mean over its own tokens. Responses
    without a verdict are excluded. The authors' code never adds the KL to the rewards of its buffer, although
    it computes it; here `reward_kl` has the effect that the paper describes.

    Metrics are Means over the policy's tokens: policy_loss, entropy (-log π of them), kl_old, clipped_low,
    clipped_high; over the critic's: value_loss, value.

    Args:
        forward: the model's model.forward; the params need `with_critics`.
        reward_kl: β of the KL to the reference (k1) in each token's reward, the guide's tokens included;
            needs `add_reference`.
        gamma, lam: see `generalised_advantages`; the authors use γ = 0.99 or 1, λ = 0.95.
        clip, value_clip: ε of the ratio and of the values.
        value_weight: weight of the critic's loss; the authors use 0.5, 30 and 0.1.
        temperature: the policy's sampling temperature.
        chunk: see `linear_log_probs`.
    """

    @reads_kl_weight
    def credit(rewards, batch):
        mask = jnp.asarray(batch["completion_mask"]) & ~jnp.isnan(rewards)[:, None]
        placed = placed_rewards(jnp.nan_to_num(rewards), mask, kl_penalties(batch, reward_kl))
        values = jnp.asarray(batch["old_values"])
        advantages, returns = generalised_advantages(placed, values, mask, gamma, lam)
        return {"advantages": advantages, "returns": returns, "completion_mask": mask}

    def objective(params, batch, key):
        found, log_probs = completion_forward(forward, params, batch, key, temperature, chunk)
        own, fitted = written_masks(batch)
        old, advantages = batch["old_log_probs"], batch["advantages"]
        ratio = losses.log_ratio(log_probs, old)
        loss = losses.clipped_surrogate(ratio, advantages, clip_low=clip, clip_high=clip)
        values = critic_values(params, found.hidden, batch["guide_critic"])
        errors = losses.clipped_value_loss(
            values, batch["old_values"], batch["returns"], clip=value_clip
        )
        policy_loss, value_loss = token_mean(loss, own), token_mean(errors, fitted)
        terms = Terms((policy_loss, value_loss._replace(total=value_weight * value_loss.total)))
        low, high = losses.clipped_tokens(ratio, advantages, clip, clip)
        of_policy = {
            "entropy": -log_probs,
            "kl_old": losses.kl_k3(log_probs, old),
            "clipped_low": low,
            "clipped_high": high,
        }
        metrics = {name: token_mean(x, own) for name, x in of_policy.items()}
        metrics |= {"policy_loss": policy_loss, "value_loss": value_loss}
        metrics |= {"value": token_mean(values, fitted)}
        metrics |= {name: row_mean(x) for name, x in batch.get("stats", {}).items()}
        return terms.value, jax.lax.stop_gradient(metrics) | {"loss": terms}

    return Algorithm(credit, objective)


def with_references(objective: Objective, forward: Forward, weight: float = 0.1) -> Objective:
    """objective + weight x token-mean cross-entropy of batch["references"], rows of `supervised`.

    The authors' target regularisation, on the data's own completions of the same prompts, which keeps texts
    fluent. Logs `reference_loss` in nats per token.

    Args:
        objective: an objective of the rest of the batch, such as that of `guided_ppo`.
        weight: at least 0; the authors use 0.1.

    Raises:
        ValueError: for a negative weight.
    """
    if weight < 0:
        raise ValueError(f"with_references: weight must be at least 0, got {weight}.")
    reference_loss = mean_of(supervised(forward))

    def both(params, batch, key):
        rest = {name: x for name, x in batch.items() if name != "references"}
        loss, metrics = objective(params, rest, key)
        found = reference_loss(params, batch["references"], key)
        parts = terms_of(loss, metrics["loss"])
        terms = Terms((*parts, Mean(weight * found.total, found.weight)))
        shown = {"reference_loss": jax.lax.stop_gradient(found)}
        return terms.value, metrics | shown | {"loss": terms}

    return both


@functools.partial(jax.jit, static_argnames=("forward", "temperature"))
def _scores(forward, params, given, guide_critic, temperature):
    """(log π, value of each row's critic) of all tokens, [B, N] each and 0 off the mask."""
    found, log_probs = completion_forward(forward, params, given, None, temperature)
    values = critic_values(params, found.hidden, guide_critic)
    return log_probs, jnp.where(given["completion_mask"], values, 0.0)
