"""Collecting experience: responses sampled from the policy, rewarded, scored and credited."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.generation import SamplingConfig, generate
from jaxft.losses import kl_k1
from jaxft.models import Decoder
from jaxft.objectives import completion_values
from jaxft.parallel import in_turn, mesh_context, to_host
from jaxft.rewards.pool import RewardFn
from jaxft.rl.advantages import has_contrast
from jaxft.rl.experience import Experience, KlControl
from jaxft.rl.rollouts import (
    Batch,
    Credit,
    check_policy,
    prompts_of,
    sample_groups,
    sampling_key,
    score,
)

# (params, prompts, records, key) -> a batch with rewards, prompt-major
Sample = Callable[[Any, Sequence[Sequence[int]], Sequence[Mapping[str, Any]], jax.Array], Batch]

_score_and_values = jax.jit(completion_values, static_argnames=("forward", "temperature", "chunk"))


def collect(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    rewards: RewardFn,
    credit: Credit,
    config: SamplingConfig,
    *,
    prompts_per_step: int,
    group_size: int,
    updates: int = 1,
    epochs: int = 1,
    ref_params: Any = None,
    kl_control: KlControl | None = None,
    penalty: Callable[[np.ndarray], Any] | None = None,
    mask_truncated: bool = False,
    max_tries: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Experience:
    """`collect_from` of `answers`: one response a row, judged by `rewards`.

    Args:
        rewards: (completions, records) -> a number each, NaN for no verdict: a VerifierPool, or `in_process`
            of a verifier. Completions are decoded without special tokens and outer space.
        config: how to sample; others: see `collect_from`.
    """
    check_policy(config)
    return collect_from(
        answers(model, tokenizer, rewards, config, group_size),
        model,
        prompts,
        records,
        credit,
        temperature=config.temperature,
        prompts_per_step=prompts_per_step,
        group_size=group_size,
        updates=updates,
        epochs=epochs,
        ref_params=ref_params,
        kl_control=kl_control,
        penalty=penalty,
        mask_truncated=mask_truncated,
        max_tries=max_tries,
        seed=seed,
        mesh=mesh,
    )


def answers(
    model: Decoder,
    tokenizer: Any,
    rewards: RewardFn,
    config: SamplingConfig,
    group_size: int,
    *,
    sampler: Callable[..., Any] = generate,
) -> Sample:
    """`group_size` responses to each prompt, judged by `rewards`.

    Args:
        sampler: a function with the signature of `generate`.
    """

    def sample(params, prompts, records, key):
        batch, completions = sample_groups(
            model, params, prompts, key, config, group_size, tokenizer=tokenizer, sampler=sampler
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
        asked = [record for record in records for _ in range(group_size)]
        return batch | {"rewards": rewards(texts, asked)}

    return sample


def collect_from(
    sample: Sample,
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    records: Sequence[Mapping[str, Any]],
    credit: Credit,
    *,
    temperature: float,
    prompts_per_step: int,
    group_size: int,
    updates: int = 1,
    epochs: int = 1,
    ref_params: Any = None,
    kl_control: KlControl | None = None,
    penalty: Callable[[np.ndarray], Any] | None = None,
    mask_truncated: bool = False,
    max_tries: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Experience:
    """batches(state): what `fit` takes as its batches, sampled with the state's params.

    Each rollout is trained on for `updates` x `epochs` steps. Which prompts it has, and what is drawn,
    follow from the state's step and key alone, so a resumed run goes on with the same experience; a
    rollout of several steps is in the data position of checkpoints until its last.

    Params with a value head (`with_value_head`) give the batch `old_values`.

    Args:
        sample: `answers` or `episodes`: (params, prompts, records, key) -> a batch of `group_size` rows for
            each prompt, with `rewards` and `truncated`.
        prompts: ids, one for each record.
        credit: see jaxft.rl.algorithms.
        temperature: at which `sample` draws.
        updates: parts into which a rollout's rows are split, one optimizer step each; old_log_probs are
            computed before the first of several.
        epochs: passes over a rollout, in each but the first its rows shuffled.
        ref_params: gives ref_log_probs.
        kl_control: gives the batch `kl_weight`, which the credit of rloo, reinforce_plus_plus and ppo uses
            in place of their `reward_kl`. It is in the data position of checkpoints.
        penalty: of lengths [B], added to rewards, such as `overlong_penalty`.
        mask_truncated: takes responses that reached the limit out of the loss; they stay in baselines.
        max_tries: samples anew for the prompts of groups without contrast, up to so many times in all
            (dynamic sampling); what is missing then is filled with such groups.
        seed: of the order of prompts, a new permutation each epoch.
        mesh: as for `fit`; rows are sampled and scored over its data and fsdp axes. On several hosts all form
            the whole rollout and keep their rows; `rewards` must be the same for all: see `on_first_host`.

    Raises:
        ValueError: for sizes that do not fit each other, or rewards of a wrong length.
    """
    _check_sizes(prompts_per_step, group_size, updates, epochs, max_tries)
    if len(prompts) != len(records) or not records:
        raise ValueError(f"collect: {len(prompts)} prompts for {len(records)} records.")
    if kl_control is not None and ref_params is None:
        raise ValueError("collect: kl_control needs ref_params, from which the KL is measured.")
    old = updates * epochs > 1
    read = functools.partial(read_scores, model, ref_params, temperature, old=old)

    def attempt(state, draw):
        """One round of groups, rewarded."""
        chosen = prompts_of(draw, prompts_per_step, len(prompts), seed)
        key = sampling_key(state, "rollout", draw)
        pick = lambda table: [table[i] for i in chosen]
        batch = sample(state.params, pick(prompts), pick(records), key)
        return batch | {"rewards": _with_penalty(batch, penalty)}

    def rollout(state, number, kl_weight):
        draws = range(number * max_tries, (number + 1) * max_tries)
        with mesh_context(mesh):
            rounds = (attempt(state, draw) for draw in draws)
            batch = _with_contrast(rounds, prompts_per_step, group_size)
            if mask_truncated:
                mask = batch["completion_mask"] & ~batch["truncated"][:, None]
                batch["completion_mask"] = mask
            batch |= to_host(read(state.params, batch))
            return _credited(credit, batch, kl_weight)

    return Experience(rollout, updates, epochs, kl_control, seed)


def read_scores(
    model: Decoder, ref_params: Any, temperature: float, params: Any, batch: Batch, *, old: bool
) -> Batch:
    """What is computed once a rollout: log-probs of the policy (if `old`) and the reference, values."""
    fields = ("tokens", "positions", "segment_ids", "completion_mask")
    batch = {name: batch[name] for name in fields}
    found = {}
    if "value_head" in params:
        both = _awaited(_score_and_values(model.forward, params, batch, temperature))
        log_probs, found["old_values"] = both
        found |= {"old_log_probs": log_probs} if old else {}
    elif old:
        found["old_log_probs"] = _awaited(score(model.forward, params, batch, temperature))
    if ref_params is not None:
        found["ref_log_probs"] = _awaited(score(model.forward, ref_params, batch, temperature))
    return found


def _awaited(result):
    """`in_turn`, but for what is only being traced."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(result))
    return result if traced else in_turn(result)


def _credited(credit, batch, kl_weight):
    """The batch with its credit, and what is shown of it."""
    value, stats = batch.pop("rewards"), batch["stats"]
    if "ref_log_probs" in batch:
        old = batch.get("old_log_probs", batch["sampler_log_probs"])
        kl = np.asarray(kl_k1(jnp.asarray(old), jnp.asarray(batch["ref_log_probs"])))
        stats["response_kl"] = np.sum(kl, axis=1, where=batch["completion_mask"])
    if kl_weight is not None:
        batch["kl_weight"] = np.full(len(value), kl_weight, np.float32)
        stats["kl_weight"] = batch["kl_weight"]
    given = credit(jnp.asarray(value), batch)
    return batch | jax.tree.map(np.asarray, dict(given))


def _with_contrast(rounds: Iterable[Batch], count: int, group_size: int) -> Batch:
    """`count` groups of rounds, those that teach something first; no more rounds than that takes."""
    taken, kept = [], []
    for batch in rounds:
        taken.append(batch)
        kept.append(np.asarray(has_contrast(jnp.asarray(batch["rewards"]), group_size)))
        if np.concatenate(kept).sum() >= count:
            break
    contrast = np.concatenate(kept)
    groups = np.argsort(~contrast, kind="stable")[:count]  # Stable: in the order of sampling.
    take = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    batch = {name: x[take] for name, x in concatenated(taken).items()}
    value = batch["rewards"]
    batch["stats"] = {
        "reward": value,
        "truncated": batch["truncated"].astype(np.float32),
        "no_contrast": np.repeat(~contrast[groups], group_size).astype(np.float32),
        "unscored": np.isnan(value).astype(np.float32),
        "tries": np.full(len(value), float(len(taken)), np.float32),
    }
    batch["stats"] |= {"turns": batch.pop("turns")} if "turns" in batch else {}
    return batch


def concatenated(rounds: Sequence[Batch]) -> Batch:
    """One batch of several, whose prompts and responses may lie in different buckets."""
    sizes = [batch["completion_mask"].shape[1] for batch in rounds]
    leads = [b["tokens"].shape[1] - n for b, n in zip(rounds, sizes, strict=True)]
    response, lead = max(sizes), max(leads)

    def fit(x, own_lead, own_size):
        if x.ndim == 1:
            return x
        before = lead - own_lead if x.shape[1] > own_size else 0
        return np.pad(x, ((0, 0), (before, response - own_size)))

    parts = [
        {name: fit(x, *size) for name, x in batch.items()}
        for batch, size in zip(rounds, zip(leads, sizes, strict=True), strict=True)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def checked_rewards(rewards, count):
    """An array [count], NaN where there is no verdict."""
    rewards = np.asarray([np.nan if r is None else r for r in rewards], np.float32)
    if rewards.shape != (count,):
        raise ValueError(
            f"collect: the reward function gave {rewards.shape} rewards for {count} completions; it must "
            "give one each, in their order."
        )
    if np.isinf(rewards).any():
        raise ValueError("collect: the reward function gave an infinite reward; NaN is no verdict.")
    return rewards


def _with_penalty(batch, penalty):
    rewards = checked_rewards(batch["rewards"], len(batch["tokens"]))
    if penalty is None:
        return rewards
    lengths = jnp.sum(batch["completion_mask"], axis=1).astype(jnp.float32)
    return rewards + np.asarray(penalty(lengths))


def _check_sizes(prompts_per_step, group_size, updates, epochs, max_tries):
    rows = prompts_per_step * group_size
    if min(prompts_per_step, group_size, updates, epochs, max_tries) < 1 or rows % updates:
        raise ValueError(
            f"collect: {prompts_per_step} prompts x {group_size} responses cannot be split over {updates} "
            f"updates, {epochs} epochs, {max_tries} tries; all must be positive, and updates divide the rows."
        )
