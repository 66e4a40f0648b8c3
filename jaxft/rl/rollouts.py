"""Experience: groups of responses sampled from the policy, rewarded, as batches that `fit` trains on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.generation import SamplingConfig, bucket, decode, fork, generate, left_pad, prefill
from jaxft.models import Decoder
from jaxft.objectives import completion_log_probs
from jaxft.rl.advantages import has_contrast
from jaxft.rl.pool import RewardFn

MIN_BUCKET = 16  # of response lengths

Batch = dict[str, Any]
# (rewards [B], batch) -> what the objective needs besides, such as {"advantages": [B]}
Credit = Callable[[Any, Batch], Batch]

_SAMPLING = 0x5A  # purpose of the derived key

score = jax.jit(completion_log_probs, static_argnames=("model", "temperature", "chunk"))


def sample_groups(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    group_size: int,
    *,
    tokenizer: Any = None,
) -> tuple[Batch, list[list[int]]]:
    """(batch, completions): `group_size` responses to each prompt, side by side, from one prefill.

    The batch is that of jaxft.objectives.policy_gradient, as numpy arrays: `sampler_log_probs` under the
    full vocabulary at the temperature; `behaviour_log_probs` under what was sampled from (with top-k,
    top-p or min-p, log π - log of the mass kept); `truncated` [B], True where a response reached the
    limit. Its columns are buckets, of the longest prompt and the longest response.

    Raises:
        ValueError: for greedy sampling, of which no policy gradient can be taken.
    """
    _check_policy(config)
    out = generate(model, params, prompts, key, config, samples=group_size, tokenizer=tokenizer)
    tokens, valid = left_pad(prompts, model.config)
    repeat = lambda x: np.repeat(x[: len(prompts)], group_size, axis=0)
    longest = int(out.mask.sum(axis=1).max())
    size = min(bucket(longest, MIN_BUCKET), config.max_new_tokens)
    cut = lambda x: x[:, :size]
    batch = _lay_out(
        np,
        repeat(tokens),
        repeat(valid),
        *map(cut, (out.tokens, out.mask, out.log_probs, out.sampler_log_probs)),
    )
    return batch | {"truncated": np.array(out.finish) == "length"}, out.completions


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
    ref_params: Any = None,
    penalty: Callable[[np.ndarray], Any] | None = None,
    mask_truncated: bool = False,
    max_tries: int = 1,
    seed: int = 0,
) -> Callable[[Any], Batch]:
    """batches(state): what `fit` takes as its batches, sampled from the state's params.

    Step s trains on part s mod `updates` of rollout s // `updates`. Which prompts that has, and what is
    drawn, follow from the state's step and key alone, so a resumed run goes on with the same experience
    (with several updates, if it was saved at a multiple of them: else it samples anew).

    Args:
        prompts: ids, one for each record.
        rewards: (completions, records) -> a number each, NaN for no verdict: a VerifierPool, or `in_process`
            of a verifier. Completions are decoded without special tokens and outer space.
        credit: see jaxft.rl.algorithms.
        updates: parts into which a rollout's rows are split, one optimizer step each; old_log_probs are
            computed before the first of several.
        ref_params: gives ref_log_probs.
        penalty: of lengths [B], added to rewards, such as `overlong_penalty`.
        mask_truncated: takes responses that reached the limit out of the loss; they stay in baselines.
        max_tries: samples anew for the prompts of groups without contrast, up to so many times in all
            (dynamic sampling); what is missing then is filled with such groups.
        seed: of the order of prompts, a new permutation each epoch.

    Raises:
        ValueError: for sizes that do not fit each other, or rewards of a wrong length.
    """
    rows = prompts_per_step * group_size
    if min(prompts_per_step, group_size, updates, max_tries) < 1 or rows % updates:
        raise ValueError(
            f"collect: {prompts_per_step} prompts x {group_size} responses cannot be split over {updates} "
            f"updates, {max_tries} tries; all must be positive, and updates divide the rows."
        )
    if len(prompts) != len(records) or not records:
        raise ValueError(f"collect: {len(prompts)} prompts for {len(records)} records.")
    _check_policy(config)
    held = {}

    def attempt(state, number, attempt_number):
        """One round of groups, rewarded."""
        draw = number * max_tries + attempt_number
        chosen = _prompts_of(draw, prompts_per_step, len(prompts), seed)
        key = jax.random.fold_in(jax.random.fold_in(state.key, _SAMPLING), draw)
        batch, completions = sample_groups(
            model, state.params, [prompts[i] for i in chosen], key, config, group_size,
            tokenizer=tokenizer,
        )  # fmt: skip
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]
        asked = [records[i] for i in chosen for _ in range(group_size)]
        batch["rewards"] = _checked(rewards(texts, asked), len(asked))
        if penalty is not None:
            lengths = jnp.sum(batch["completion_mask"], axis=1).astype(jnp.float32)
            batch["rewards"] = batch["rewards"] + np.asarray(penalty(lengths))
        return batch

    def rollout(state, number):
        rounds, kept = [], []
        for t in range(max_tries):
            rounds.append(attempt(state, number, t))
            kept.append(np.asarray(has_contrast(jnp.asarray(rounds[-1]["rewards"]), group_size)))
            if np.concatenate(kept).sum() >= prompts_per_step:
                break
        contrast = np.concatenate(kept)
        # Groups that teach something first, in the order of sampling.
        groups = np.argsort(~contrast, kind="stable")[:prompts_per_step]
        take = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        batch = {name: x[take] for name, x in _concatenate(rounds).items()}
        value = batch.pop("rewards")
        batch["stats"] = {
            "reward": value,
            "truncated": batch["truncated"].astype(np.float32),
            "no_contrast": np.repeat(~contrast[groups], group_size).astype(np.float32),
            "unscored": np.isnan(value).astype(np.float32),
            "tries": np.full(len(value), float(len(rounds)), np.float32),
        }
        if mask_truncated:
            mask = batch["completion_mask"] & ~batch["truncated"][:, None]
            batch["completion_mask"] = mask
        read = functools.partial(score, model, batch=batch, temperature=config.temperature)
        if updates > 1:
            batch["old_log_probs"] = np.asarray(read(state.params))
        if ref_params is not None:
            batch["ref_log_probs"] = np.asarray(read(ref_params))
        given = credit(jnp.asarray(value), batch)
        return batch | {name: np.asarray(x) for name, x in given.items()}

    def batches(state):
        number, part = divmod(int(state.step), updates)
        if held.get("number") != number:
            held.update(number=number, batch=rollout(state, number))
        return jax.tree.map(lambda x: x[part::updates], held["batch"])

    return batches


def collect_on_device(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    credit: Credit,
    config: SamplingConfig,
    *,
    prompts_per_step: int,
    group_size: int,
    seed: int = 0,
) -> Callable[[Any], Batch]:
    """As `collect`, with the reward 1 for a response that is its target token by token, else 0.

    Sampling, rewards and advantages are one compiled program, from which nothing returns to the host. A
    target includes the stop token. All prompts share one bucket.

    Raises:
        ValueError: for a target longer than max_new_tokens, which could never be met.
    """
    _check_policy(config)
    size = config.max_new_tokens
    if len(prompts) != len(targets) or max(map(len, targets)) > size:
        raise ValueError(
            f"collect_on_device: needs one target a prompt, of at most max_new_tokens = {size}; got "
            f"{len(targets)} for {len(prompts)}, the longest {max(map(len, targets))}."
        )
    tokens, valid = map(jnp.asarray, left_pad(prompts, model.config))
    wanted = jnp.asarray(_right_pad(targets, size))

    @jax.jit
    def run(params, key, chosen):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(chosen)))
        slots = tokens.shape[1] + size
        state = prefill(model, params, tokens[chosen], valid[chosen], keys, slots)
        state, part = decode(model, params, fork(state, group_size), config, steps=size)
        repeat = lambda x: jnp.repeat(x[chosen], group_size, axis=0)
        batch = _lay_out(jnp, repeat(tokens), repeat(valid), *part)
        value = same_tokens(part.tokens, part.mask, repeat(wanted)).astype(jnp.float32)
        flat = ~jnp.repeat(has_contrast(value, group_size), group_size)
        truncated = (~state.done).astype(jnp.float32)
        batch["stats"] = {"reward": value, "truncated": truncated, "no_contrast": flat * 1.0}
        return batch | credit(value, batch)

    def batches(state):
        draw = int(state.step)
        chosen = _prompts_of(draw, prompts_per_step, len(prompts), seed)
        key = jax.random.fold_in(jax.random.fold_in(state.key, _SAMPLING), draw)
        return run(state.params, key, jnp.asarray(chosen))

    return batches


def same_tokens(tokens: jax.Array, mask: jax.Array, targets: jax.Array) -> jax.Array:
    """[B]: whether the tokens that the mask counts are those of the target [B, N], padded with -1."""
    given = jnp.where(mask, tokens, -1)
    return jnp.all(given == targets, axis=1)


def _lay_out(xp, prompts, valid, tokens, mask, log_probs, sampler_log_probs):
    """Prompts [B, P] and responses [B, N] side by side, padding at either end of a row."""
    seen = xp.concatenate([valid, mask], axis=1)
    return {
        "tokens": xp.concatenate([prompts, xp.where(mask, tokens, 0)], axis=1),
        "segment_ids": seen.astype(xp.int32),
        "positions": xp.maximum(xp.cumsum(seen, axis=1) - 1, 0).astype(xp.int32),
        "completion_mask": mask,
        "sampler_log_probs": log_probs,
        "behaviour_log_probs": sampler_log_probs,
    }


def _concatenate(rounds):
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


def _prompts_of(draw: int, count: int, size: int, seed: int) -> list[int]:
    """The draw-th `count` prompts of `size` in an order that is new each epoch."""
    places = np.arange(draw * count, (draw + 1) * count)
    order = {
        epoch: np.random.default_rng((seed, epoch)).permutation(size)
        for epoch in set((places // size).tolist())
    }
    return [int(order[place // size][place % size]) for place in places.tolist()]


def _right_pad(targets, size):
    table = np.full((len(targets), size), -1, np.int32)
    for row, target in zip(table, targets, strict=True):
        row[: len(target)] = target
    return table


def _checked(rewards, count):
    rewards = np.asarray([np.nan if r is None else r for r in rewards], np.float32)
    if rewards.shape != (count,):
        raise ValueError(
            f"collect: the reward function gave {rewards.shape} rewards for {count} completions; it must "
            "give one each, in their order."
        )
    if np.isinf(rewards).any():
        raise ValueError("collect: the reward function gave an infinite reward; NaN is no verdict.")
    return rewards


def _check_policy(config):
    if config.temperature == 0:
        raise ValueError(
            "collect: temperature=0 is greedy, and no policy to take a gradient of; use 1.0."
        )
