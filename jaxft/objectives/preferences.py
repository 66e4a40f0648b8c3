"""Preference optimisation: pairs, labelled completions, and pairs together with policy samples.

A batch comes from `jaxft.data.group_batches`: `tokens`, `loss_mask`, `segment_ids`, `positions` [B,
G, T], with G = 2 sequences per record, and columns [B, ...]: `ref_log_probs` [B, G] from
`jaxft.train.reference_log_probs`, `label` [B], bool or integer; above 0 is desirable. A sequence's
log-prob is the *sum* over its completion. All means are over records, excluding groups without
tokens, so that microbatches add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.losses import (
    Pairs,
    bco_loss,
    compares_pairs,
    kl_estimates,
    kto_kl,
    kto_loss,
    leave_one_out,
    length_desensitised,
    linear_log_probs,
    reverse_kl_surrogate,
    wpo_weights,
)
from jaxft.losses.supervised import scan_logits
from jaxft.metrics import Mean, Terms, Undivided, WholeMean, terms_of, with_mean
from jaxft.models import Forward, Prediction, as_rows, of_group, predict
from jaxft.models.checks import check_column, check_group, check_labels
from jaxft.objectives.next_token import Objective, shift

PairLoss = Callable[[Pairs], jax.Array]  # one of jaxft.losses with its hyperparameters
Reference = Callable[[Any], Any]  # params -> the reference's params, such as adapters.base_params


class Sequences(NamedTuple):
    """Log-probs of a batch's sequences."""

    sums: jax.Array  # [B, G] log π(completion | prompt) in nats
    lengths: jax.Array  # [B, G] tokens of the completion, float32; 0 where there is none
    weights: jax.Array | None = None  # [B, G] WPO's
    prompts: jax.Array | None = (
        None  # [B, G] log π of the tokens before the completion, except the first
    )
    prompt_lengths: jax.Array | None = None  # [B, G]


def sequence_log_probs(
    forward: Forward,
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
    *,
    wpo: bool = False,
    ld_alpha: float = 1.0,
) -> Sequences:
    """Runs all sequences of a batch of groups at once; tokens count where `loss_mask` is above 0.

    Args:
        forward: see `supervised`.
        params: the forward's params.
        batch: leaves [B, G, T]; columns of records are repeated for the sequences of their group.
        key: for random numbers in `forward`, such as dropout.
        wpo: also compute `wpo_weights`, which need the distribution at each token.
        ld_alpha: weight of tokens beyond the length of the group's shortest: see `length_desensitised`.
    """
    tokens = jnp.asarray(batch["tokens"])
    if tokens.ndim != 3:
        raise ValueError(
            f"sequence_log_probs: tokens must be [B, G, T], got {tokens.shape}; see group_batches."
        )
    flat = as_rows(batch)
    targets, weights = shift(flat)
    output = predict(forward, params, flat, key)
    log_probs = linear_log_probs(output.hidden, output.head, targets, softcap=output.softcap)
    counted, shape = weights > 0, tokens.shape[:2]
    lengths = jnp.sum(counted, axis=1, dtype=jnp.float32).reshape(shape)
    if ld_alpha == 1:
        sums = jnp.sum(jnp.where(counted, log_probs, 0.0), axis=1)
    else:
        public = jnp.broadcast_to(jnp.min(lengths, axis=1, keepdims=True), shape).reshape(-1)
        sums = length_desensitised(log_probs, counted.astype(jnp.float32), public, ld_alpha)
    before = (shift(flat | {"loss_mask": jnp.ones_like(weights)})[1] > 0) & ~counted
    prompts = jnp.sum(jnp.where(before, log_probs, 0.0), axis=1).reshape(shape)
    prompt_lengths = jnp.sum(before, axis=1, dtype=jnp.float32).reshape(shape)
    found = Sequences(sums.reshape(shape), lengths, None, prompts, prompt_lengths)
    if not wpo:
        return found
    collision = _log_collision_probs(jax.lax.stop_gradient(output))
    mask = counted.astype(jnp.float32)
    return found._replace(weights=wpo_weights(log_probs, collision, mask).reshape(shape))


def preference(
    forward: Forward,
    loss: PairLoss,
    *,
    beta: float = 0.1,
    reference: Reference | None = None,
    use_weighting: bool = False,
    ld_alpha: float = 1.0,
) -> Objective:
    """objective(params, batch, key) -> (mean of a pairwise loss, metrics).

    Metrics, all `Mean`s over pairs: rewards/{chosen,rejected,margin,accuracy} (β times log-ratios,
    or times log-probs without a reference; a tie counts 1/2), log_probs/{chosen,rejected} and
    lengths/{chosen,rejected}.

    Args:
        forward: see `supervised`.
        loss: `functools.partial(dpo_loss, beta=0.1)` or any function of `Pairs`; one that compares pairs with
            each other (`losses.compares_pairs`, such as `aot_loss`) does not allow microbatches.
        beta: scale of the rewards in the metrics only; set the loss's beta separately.
        reference: params -> params of the reference, for batches without `ref_log_probs`.
        use_weighting: multiply each pair's loss by both `wpo_weights`.
        ld_alpha: see `sequence_log_probs`; `ref_log_probs` must have been computed with the same
            value.
    """
    compares = compares_pairs(loss)

    def objective(params, batch, key):
        check_group(batch, 2, "preference")
        policy = sequence_log_probs(
            forward, params, batch, key, wpo=use_weighting, ld_alpha=ld_alpha
        )
        ref = _reference_sums(forward, params, batch, key, reference, ld_alpha)
        pairs, counted = _pairs(policy, ref)
        values = loss(pairs)
        if use_weighting:
            values = values * policy.weights[:, 0] * policy.weights[:, 1]
        kind = Undivided if compares else Mean
        total = kind.of(jnp.where(counted > 0, values, 0.0), counted)
        metrics = _pair_metrics(pairs, counted, beta) | {
            "loss": total,
            "num_tokens": all_tokens(batch, total),
        }
        return total.value, jax.lax.stop_gradient(metrics)

    return objective


def hypo(
    forward: Forward,
    loss: PairLoss,
    *,
    beta: float = 0.1,
    kl_weight: float = 0.1,
    reference: Reference | None = None,
) -> Objective:
    """A pairwise loss on given pairs, and λ times the KL from the reference on the policy's own samples.

    HyPO: Song et al., 2024, arxiv.org/abs/2406.01462: pairs constrain the policy only near their
    texts; the KL constrains it elsewhere. batch["online"] is a batch of groups, leaves [N, K, T]: K
    fresh samples at temperature 1 of each of N prompts, with `ref_log_probs` [N, K]. With K > 1
    each sample's baseline is the mean of the others.

    Metrics: those of `preference`, and kl (mean log-ratio of the samples) and kl_k3.

    Args:
        kl_weight: λ, on KL in nats per sequence; the paper's 1e-4 is for sums over long texts.
    """
    offline = preference(forward, loss, beta=beta, reference=reference)

    def objective(params, batch, key):
        pairs = {name: leaf for name, leaf in batch.items() if name != "online"}
        value, metrics = offline(params, pairs, key)
        if kl_weight == 0:
            return value, metrics
        if "online" not in batch:
            raise ValueError("hypo: the batch has no 'online' samples; set kl_weight=0 for none.")
        samples = sequence_log_probs(forward, params, batch["online"], key)
        ref = _need(_reference_sums(forward, params, batch["online"], key, reference), "hypo")
        size = samples.sums.shape[1]
        sums, ref_sums = samples.sums.reshape(-1), jax.lax.stop_gradient(ref.reshape(-1))
        counted = (samples.lengths > 0).astype(jnp.float32).reshape(-1)
        ratios = jax.lax.stop_gradient(sums - ref_sums)
        baseline = leave_one_out(ratios, size) if size > 1 else None
        surrogate = Mean.of(reverse_kl_surrogate(sums, ref_sums, baseline), counted)
        kl = kl_estimates(jax.lax.stop_gradient(sums), ref_sums)
        own = {"kl": Mean.of(kl.k1, counted), "kl_k3": Mean.of(kl.k3, counted)}
        pull = Mean(kl_weight * surrogate.total, surrogate.weight)
        terms = Terms((*terms_of(value, metrics["loss"]), pull))
        return terms.value, metrics | own | {"loss": terms}

    return objective


def kto(
    forward: Forward,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference: Reference | None = None,
) -> Objective:
    """objective(params, batch, key) -> (mean `kto_loss`, metrics) of completions with a `label`.

    The second sequence of each group, a completion of another prompt, is used only for the KL and
    has a separate forward pass without gradient. The KL is the mean over the whole batch, also with
    microbatches (`WholeMean`). Metrics: rewards/{chosen,rejected} (means over completions with
    label True and False), lengths, log_probs, kl, rewards/accuracy.
    """

    def objective(params, batch, key):
        labels = check_labels(batch, "kto")
        first = _side(batch, 0)
        policy = sequence_log_probs(forward, params, first, key)
        other = _side(batch, 1)
        still = jax.lax.stop_gradient(params)
        mismatched = sequence_log_probs(forward, still, other, key)
        counted = (policy.lengths[:, 0] > 0).astype(jnp.float32)
        ratios = policy.sums[:, 0] - _reference_of(forward, params, first, key, reference)
        other_ratios = mismatched.sums[:, 0] - _reference_of(forward, params, other, key, reference)
        mismatched_kl = WholeMean.of(other_ratios, counted)
        kl = kto_kl(mismatched_kl.over(batch, "kl").value[None])
        weights = dict(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        values = kto_loss(ratios, labels, kl, beta=beta, **weights)
        total = Mean.of(jnp.where(counted > 0, values, 0.0), counted)
        metrics = _label_metrics(policy, beta * ratios, beta * kl, labels, counted)
        metrics |= {"kl": mismatched_kl, "loss": total}
        metrics["num_tokens"] = all_tokens(first, total)
        return total.value, jax.lax.stop_gradient(metrics)

    return objective


def bco(forward: Forward, *, beta: float = 0.1, reference: Reference | None = None) -> Objective:
    """objective(params, batch, key) -> (mean `bco_loss`, metrics) of completions with a `label`.

    δ is the mean reward of all batches so far if the batch has `running` (`train.running_mean`),
    otherwise of the whole batch, also with microbatches (`WholeMean`). A column `density_ratio` [B]
    weights undesirable completions: see `density_ratios`. Metrics: `kto`'s, with rewards/mean and
    delta instead of kl.
    """

    def objective(params, batch, key):
        labels = check_labels(batch, "bco")
        first = _side(batch, 0)
        policy = sequence_log_probs(forward, params, first, key)
        counted = (policy.lengths[:, 0] > 0).astype(jnp.float32)
        ratios = policy.sums[:, 0] - _reference_of(forward, params, first, key, reference)
        rewards = WholeMean.of(beta * ratios, counted)
        running = batch.get("running", (0.0, 0.0))
        delta = jax.lax.stop_gradient(with_mean(*running, rewards.over(batch, "rewards/mean"))[0])
        values = bco_loss(ratios, labels, delta, beta=beta, ratios=batch.get("density_ratio"))
        total = Mean.of(jnp.where(counted > 0, values, 0.0), counted)
        metrics = _label_metrics(policy, beta * ratios, delta, labels, counted)
        metrics |= {"loss": total, "num_tokens": all_tokens(first, total)}
        metrics |= {"rewards/mean": rewards, "delta": Mean(delta * total.weight, total.weight)}
        return total.value, jax.lax.stop_gradient(metrics)

    return objective


def _pairs(policy: Sequences, ref) -> tuple[Pairs, jax.Array]:
    """(pairs, 1 where both have a completion)."""
    counted = jnp.all(policy.lengths > 0, axis=1).astype(jnp.float32)
    # Empty groups fill the last batch: their lengths must not cause a division by 0, in the value
    # or in the gradient.
    lengths = jnp.maximum(policy.lengths, 1.0)
    columns = lambda x: (None, None) if x is None else (x[:, 0], x[:, 1])
    prompt = policy.prompts[:, 0], policy.prompt_lengths[:, 0]
    sums = *columns(policy.sums), *columns(ref)
    return Pairs(*sums, *columns(lengths), *prompt, counted), counted


def _reference_sums(forward, params, batch, key, reference, ld_alpha=1.0):
    """[B, G], or None if there is no reference."""
    if "ref_log_probs" in batch:
        return check_column(batch, "ref_log_probs", batch["tokens"].shape[:2], "preferences")
    if reference is None:
        return None
    still = jax.lax.stop_gradient(reference(params))
    found = sequence_log_probs(forward, still, batch, key, ld_alpha=ld_alpha)
    return jax.lax.stop_gradient(found.sums)


def _need(ref, name):
    if ref is None:
        raise ValueError(
            f"{name}: no log-probs of a reference; add them to the data (jaxft.train.reference_log_probs) or "
            "pass reference=, such as jaxft.adapters.base_params."
        )
    return ref


def _reference_of(forward, params, batch, key, reference):
    sums = _reference_sums(forward, params, batch, key, reference)
    return _need(sums, "unpaired objective")[:, 0]


def _side(batch, i):
    """Sequence i of each group with its own reference, as groups of one."""
    side = of_group(batch, i)
    if "ref_log_probs" in batch:
        shape = batch["tokens"].shape[:2]
        ref = check_column(batch, "ref_log_probs", shape, "preferences")
        side["ref_log_probs"] = ref[:, i : i + 1]
    return side


def _pair_metrics(pairs: Pairs, counted, beta):
    has_ref = pairs.ref_chosen is not None
    chosen = pairs.chosen - pairs.ref_chosen if has_ref else pairs.chosen
    rejected = pairs.rejected - pairs.ref_rejected if has_ref else pairs.rejected
    margin = chosen - rejected
    columns = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margin": beta * margin,
        "rewards/accuracy": 0.5 * (1 + jnp.sign(margin)),
        "log_probs/chosen": pairs.chosen,
        "log_probs/rejected": pairs.rejected,
        "lengths/chosen": pairs.chosen_lengths,
        "lengths/rejected": pairs.rejected_lengths,
    }
    return {name: Mean.of(column, counted) for name, column in columns.items()}


def _label_metrics(policy: Sequences, rewards, threshold, labels, counted):
    sums, lengths = policy.sums[:, 0], policy.lengths[:, 0]
    metrics = {}
    for name, side in (("chosen", labels), ("rejected", ~labels)):
        mask = counted * side
        columns = {"rewards": rewards, "log_probs": sums, "lengths": lengths}
        metrics |= {f"{kind}/{name}": Mean.of(x, mask) for kind, x in columns.items()}
    sign = jnp.sign(rewards - threshold)
    right = 0.5 * (1 + jnp.where(labels, sign, -sign))
    return metrics | {"rewards/accuracy": Mean.of(right, counted)}


def all_tokens(batch, total: Mean) -> Mean:
    """Tokens per record of a batch, prompts included."""
    real = batch.get("segment_ids", jnp.ones_like(batch["tokens"])) > 0
    return Mean(jnp.sum(real, dtype=jnp.float32), total.weight)


def _log_collision_probs(found: Prediction):
    """log Σ_v π(v)² [N, T] at each position, a few positions at a time."""
    lse = jax.nn.logsumexp
    of = lambda logits: lse(2 * logits, axis=-1) - 2 * lse(logits, axis=-1)
    return scan_logits(of, found.hidden, found.head, softcap=found.softcap)
