"""Policy-gradient objectives: a forward, a loss of its sampled tokens and a reduction.

A batch of experience, B responses of at most N tokens that follow prompts (see jaxft.rl.collect), holds

    tokens, segment_ids, positions   [B, T]: prompt and response; the response is in the last N columns
    completion_mask                  [B, N]: the policy's own tokens, stop token included
    sampler_log_probs                [B, N]: of the response's tokens, as the sampler computed them
    old_log_probs, ref_log_probs     [B, N], optional: under the old policy and the reference
    advantages                       [B] or [B, N]
    old_values, returns              [B, N], with a critic (jaxft.objectives.critic)
    stats                            name -> [B], optional: logged as means over rows, skipping NaN
    absent_mask                      [B, R, N], optional: completion_mask of rows that were left out because
                                     they add 0 to the loss; stats are then [B, 1 + R] (jaxft.rl.idle)

The same columns in groups, [Q, G, ...] for G responses to each of Q prompts, are B = Q G rows whose prompts
are computed once a group (jaxft.objectives.sharing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import losses
from jaxft.metrics import Mean, Undivided
from jaxft.models import Forward, Prediction, predict
from jaxft.models.checks import check_column, check_completion
from jaxft.objectives.next_token import Objective
from jaxft.objectives.sharing import is_grouped, of_rows, predict_completions

Batch = dict[str, Any]
# (log_probs, old_log_probs, batch) -> (loss, metrics), all [B, N]
TokenLoss = Callable[[jax.Array, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
Reduction = Callable[[jax.Array, jax.Array], Mean]  # (values, mask) [B, N] -> Mean
# (params, hidden [B, N, D], batch) -> (loss, metrics), all [B, N]
Auxiliary = Callable[[Any, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
# (old_log_probs, sampler_log_probs, mask) [B, N] -> weights [B, N]
Correction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def policy_gradient(
    forward: Forward,
    token_loss: TokenLoss,
    reduction: Reduction,
    *,
    temperature: float = 1.0,
    kl_weight: float = 0.0,
    kl: Callable[[jax.Array, jax.Array], jax.Array] = losses.kl_k3,
    entropy_weight: float = 0.0,
    correction: Correction | None = None,
    auxiliary: Auxiliary | None = None,
    top_entropy: float = 1.0,
    corrects_kl: bool = False,
    chunk: int | None = None,
) -> Objective:
    """objective(params, batch, key) = reduction of w L_t + β KL_t - c H_t over the policy's tokens.

    π_old is batch["old_log_probs"], or without it the policy itself, with no gradient: correct for
    one update per rollout, where the ratio is exactly 1.

    Metrics are Means over tokens: the loss's own, `entropy` (exact with an entropy bonus, else -log π of
    the sampled tokens, unbiased on-policy), `kl` (k3 to the reference), `kl_old` (k3 to π_old) and `gap`,
    the mean |log π_old - log π_sampler|: the numerical difference of trainer and sampler. `length`
    is a mean over rows, like all of batch["stats"]. With `absent_mask`, the loss, `length` and the stats are
    means over all rows, the other metrics over the rows of the batch.

    Args:
        forward: see `supervised`.
        token_loss: L, such as `jaxft.rl.token_losses.clipped()`.
        reduction: `token_mean`, `sequence_mean`, `sequence_sum` or `constant_length(n)`.
        temperature: the sampler's; logits are divided by it for log-probs and entropy.
        kl_weight: β; needs ref_log_probs in the batch.
        kl: an estimator that is correct as a loss: k2 or k3, not k1.
        entropy_weight: c; costs another projection to the vocabulary. A scalar column `entropy_weight` of
            the batch (`jaxft.train.adaptive_entropy`) takes its place.
        correction: (old_log_probs, sampler_log_probs, mask) -> w, such as `token_correction()`.
        auxiliary: an additional loss of the hidden states that predict the tokens, such as
            `value_loss()`.
        top_entropy: share of the tokens, those of the highest entropy, that L and H are summed over; the
            reduction still divides by all tokens (`most_uncertain`). Below 1, the cost is entropy_weight's,
            and microbatches are refused: the logged `entropy_threshold` is a value of the whole batch.
        corrects_kl: multiplies KL_t by π / π_old, so that a rollout's later updates have the gradient of the
            current policy's KL: DeepSeek-V3.2, 2025, arxiv.org/abs/2512.02556.
        chunk: see `linear_log_probs`.
    """
    if temperature <= 0:
        raise ValueError(
            f"policy_gradient: temperature must be positive, got {temperature}; greedy has no gradient."
        )
    if kl_weight < 0:
        raise ValueError(f"policy_gradient: kl_weight must be at least 0, got {kl_weight}.")

    if not 0 < top_entropy <= 1:
        raise ValueError(f"policy_gradient: top_entropy must lie in (0, 1], got {top_entropy}.")

    on_all_rows = {
        f"kl_weight {kl_weight}": kl_weight,
        f"entropy_weight {entropy_weight}": entropy_weight,
        f"top_entropy {top_entropy}": top_entropy < 1,
        "an auxiliary loss": auxiliary is not None,
    }

    def objective(params, batch, key):
        found, log_probs = completion_forward(forward, params, batch, key, temperature, chunk)
        batch = of_rows(batch)
        mask, sampled = batch["completion_mask"], batch["sampler_log_probs"]
        adapted = "entropy_weight" in batch
        if "absent_mask" in batch:
            _check_absent(on_all_rows | {"an adapted entropy_weight": adapted})
        for name in ("sampler_log_probs", "old_log_probs", "ref_log_probs"):
            if name in batch:
                check_column(batch, name, mask.shape, "policy_gradient")
        still = jax.lax.stop_gradient(log_probs)
        old = batch.get("old_log_probs", still)
        loss, shown = token_loss(log_probs, old, batch)
        if correction is not None:
            loss = loss * correction(old, sampled, mask)
        shown |= {"entropy": -still, "gap": jnp.abs(old - sampled)}
        if "old_log_probs" in batch:
            shown["kl_old"] = losses.kl_k3(still, old)
        if "ref_log_probs" in batch:
            shown["kl"] = losses.kl_k3(still, batch["ref_log_probs"])
        if entropy_weight or adapted or top_entropy < 1:
            shown["entropy"] = entropy = losses.linear_entropy(
                found.hidden,
                found.head,
                temperature=temperature,
                softcap=found.softcap,
                chunk=losses.CHUNK if chunk is None else chunk,
            )
            bonus = batch["entropy_weight"] if adapted else entropy_weight
            loss = loss - bonus * entropy
        if top_entropy < 1:
            threshold = losses.entropy_threshold(entropy, mask, top_entropy)
            loss = jnp.where(entropy >= threshold, loss, 0.0)
        if kl_weight:
            penalty = kl(log_probs, _reference(batch))
            ratio = jnp.exp(losses.log_ratio(log_probs, old)) if corrects_kl else 1.0
            loss = loss + kl_weight * ratio * penalty
        if auxiliary is not None:
            more, metrics = auxiliary(params, found.hidden, batch)
            loss, shown = loss + more, shown | metrics
        total = _reduced(reduction, loss, mask, batch)
        metrics = {"loss": total} | {k: token_mean(v, mask) for k, v in shown.items()}
        if adapted:
            metrics["entropy_weight"] = jnp.asarray(bonus, jnp.float32)
        if top_entropy < 1:
            metrics["entropy_threshold"] = Undivided(threshold, jnp.ones(()))
        metrics["length"] = row_mean(jnp.sum(mask, axis=1, dtype=jnp.float32))
        metrics |= {name: row_mean(values) for name, values in batch.get("stats", {}).items()}
        return total.value, jax.lax.stop_gradient(metrics)

    return objective


def completion_log_probs(
    forward: Forward,
    params: Any,
    batch: Batch,
    temperature: float = 1.0,
    chunk: int | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """log π of the response's tokens [B, N] at the temperature, under the full vocabulary; 0 off the mask."""
    return completion_forward(forward, params, batch, key, temperature, chunk)[1]


def completion_forward(
    forward: Forward,
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Prediction, jax.Array]:
    """(the Prediction of the response's tokens, hidden [B, N, D]; their log π [B, N], 0 off the mask)."""
    if is_grouped(batch):
        found = predict_completions(forward, params, batch, key)
        batch = of_rows(batch)
    else:
        found = None
    tokens, mask = jnp.asarray(batch["tokens"]), check_completion(batch, "policy_gradient")
    size = mask.shape[1]
    if found is None:
        found = predict(forward, params, batch, key).at(slice(None), slice(-size - 1, -1))
    log_probs = losses.linear_log_probs(
        found.hidden,
        found.head,
        tokens[:, -size:],
        temperature=temperature,
        softcap=found.softcap,
        chunk=chunk,
    )
    return found, jnp.where(mask, log_probs, 0.0)


def token_correction(cap: float = 2.0) -> Correction:
    """`truncated_weights` of each token."""
    return lambda old, sampled, mask: losses.truncated_weights(old, sampled, cap=cap)


def sequence_correction(cap: float = 2.0) -> Correction:
    """`truncated_sequence_weights` of each row, for all of its tokens."""

    def weights(old, sampled, mask):
        return spread(losses.truncated_sequence_weights(old, sampled, mask, cap=cap), old)

    return weights


def token_mask(low: float = 0.0, high: float = 2.0) -> Correction:
    """`banded_weights` of each token."""
    return lambda old, sampled, mask: losses.banded_weights(old, sampled, low=low, high=high)


def sequence_mask(low: float = 0.0, high: float = 2.0) -> Correction:
    """`banded_sequence_weights` of each row, for all of its tokens."""

    def weights(old, sampled, mask):
        found = losses.banded_sequence_weights(old, sampled, mask, low=low, high=high)
        return spread(found, old)

    return weights


def token_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over all tokens: long responses count more (DAPO)."""
    return Mean.of(jnp.where(mask, values, 0.0), mask)


def sequence_mean(values: jax.Array, mask: jax.Array) -> Mean:
    """Mean over each response's tokens, then over responses that have any (GRPO)."""
    counts = jnp.sum(mask, axis=1)
    means = jnp.sum(jnp.where(mask, values, 0.0), axis=1) / jnp.maximum(counts, 1)
    return Mean.of(means, counts > 0)


def sequence_sum(values: jax.Array, mask: jax.Array) -> Mean:
    """Sum over each response's tokens, then mean over responses that have any (REINFORCE, RLOO)."""
    return Mean.of(jnp.sum(jnp.where(mask, values, 0.0), axis=1), jnp.any(mask, axis=1))


def constant_length(length: int) -> Reduction:
    """Sum over tokens / (`length` x responses that have any); `length` is the token budget (Dr. GRPO)."""
    if length < 1:
        raise ValueError(f"constant_length: length must be at least 1, got {length}.")

    def reduction(values, mask):
        total, rows = sequence_sum(values, mask)
        return Mean(total / length, rows)

    return reduction


def spread(values: jax.Array, like: jax.Array) -> jax.Array:
    """Returns [B] as [B, N], the same for all tokens, and [B, N] unchanged."""
    values = jnp.asarray(values)
    return jnp.broadcast_to(values[:, None], like.shape) if values.ndim == 1 else values


def _check_absent(on_all_rows):
    if there := [name for name, there in on_all_rows.items() if there]:
        raise ValueError(
            f"policy_gradient: rows without an advantage were left out of the batch, but {there[0]} has a "
            "gradient in them too; keep them: collect(..., drop_idle=False)."
        )


def _reduced(reduction, loss, mask, batch):
    """The reduction over the rows and those left out, whose values are 0 but which it counts."""
    if "absent_mask" not in batch:
        return reduction(loss, mask)
    absent = jnp.asarray(batch["absent_mask"]).reshape(-1, mask.shape[1])
    loss = jnp.concatenate([loss, jnp.zeros(absent.shape, loss.dtype)])
    return reduction(loss, jnp.concatenate([mask, absent.astype(mask.dtype)]))


def _reference(batch):
    if "ref_log_probs" not in batch:
        raise ValueError(
            "policy_gradient: kl_weight needs ref_log_probs in the batch: rl.add_reference."
        )
    return batch["ref_log_probs"]


def row_mean(values: jax.Array) -> Mean:
    """Mean of one number per row [B], without those that are NaN."""
    values = jnp.asarray(values, jnp.float32)
    known = ~jnp.isnan(values)
    return Mean.of(jnp.where(known, values, 0.0), known)
