"""Groups of responses to prompts, laid out as a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.checkpoints import check_tokenizer
from jaxft.generation import SamplingConfig, bucket, generate, left_pad, without_media
from jaxft.models import Decoder
from jaxft.rewards.checked import checked_rewards
from jaxft.rewards.pool import RewardFn
from jaxft.rewards.several import SeveralRewards, weighted_sums
from jaxft.rl.prompts import MIN_BUCKET, Asked

Batch = dict[str, Any]
# (params, asked, key) -> a batch, prompt-major, with `rewards` and `truncated`
Sample = Callable[[Any, Asked, Any], Batch]

WHOLE = ("tokens", "segment_ids", "positions")  # [B, T] of a batch: prompt and response
RESPONSE = ("completion_mask", "sampler_log_probs", "behaviour_log_probs", "author")  # [B, N]


def answers(
    model: Decoder,
    tokenizer: Any,
    rewards: RewardFn,
    config: SamplingConfig,
    group_size: int,
    *,
    sampler: Callable[..., Any] = generate,
) -> Sample:
    """Returns sample(params, asked, key): `group_size` responses to each prompt, judged by `rewards`.

    Args:
        rewards: (completions, records) -> one number each, NaN for no verdict: a VerifierPool, or
            `in_process` of a verifier. Completions are decoded without special tokens and stripped. Of
            `SeveralRewards` the batch also has each one, `reward_parts` [B, K], and stats of them.
        config: the sampling config.
        sampler: a function with the signature of `generate`.

    Raises:
        ValueError: for greedy sampling, or if the tokenizer has ids that the model lacks.
        RewardError: when called, if the rewards are invalid; see `jaxft.rewards.checked_rewards`.
    """
    check_policy(config)
    check_tokenizer(tokenizer, model.config)

    def sample(params, asked, key):
        batch, completions = sample_groups(
            model, params, asked.ids, key, config, group_size, tokenizer=tokenizer,
            sampler=sampler, columns=asked.columns,
        )  # fmt: skip
        if asked.width is not None:
            batch = padded(batch, asked.width, config.max_new_tokens)
        records = [record for record in asked.records for _ in range(group_size)]
        texts = texts_of(tokenizer, completions)
        if isinstance(rewards, SeveralRewards):
            parts = rewards.parts(texts, records)
            stats = {f"reward_{k + 1}": parts[:, k] for k in range(parts.shape[1])}
            sums = weighted_sums(parts, rewards.weights)
            return batch | {"rewards": sums, "reward_parts": parts, "stats": stats}
        return batch | {"rewards": checked_rewards(rewards(texts, records), len(texts))}

    return sample


def judged(tokenizer: Any, rewards: RewardFn) -> Callable[..., np.ndarray]:
    """Returns judge(completions, records): `rewards` of the texts of token ids, as `answers` has them."""

    def judge(completions, records):
        texts = texts_of(tokenizer, completions)
        return checked_rewards(rewards(texts, records), len(texts))

    return judge


def texts_of(tokenizer: Any, completions: Sequence[Sequence[int]]) -> list[str]:
    """The completions as text, without special tokens and stripped."""
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions]


def sample_groups(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: Any,
    config: SamplingConfig,
    group_size: int,
    *,
    tokenizer: Any = None,
    sampler: Callable[..., Any] = generate,
    columns: Mapping[str, np.ndarray] | None = None,
) -> tuple[Batch, list[list[int]]]:
    """Samples (batch, completions): `group_size` adjacent responses to each prompt, from one prefill.

    The batch is that of jaxft.objectives.policy, as numpy arrays: `sampler_log_probs` under the
    full vocabulary at the temperature; `behaviour_log_probs` under the distribution sampled from (with
    truncation, log π - log of the mass kept); `truncated` [B], True if a response reached the limit.
    Its widths are bucketed: those of the longest prompt and of the longest response.

    Args:
        tokenizer: needed for stop strings.
        sampler: a function with the signature of `generate`.
        columns: name -> [P, ...], also passed to the sampler; the batch repeats each prompt's row for each of
            its responses.

    Raises:
        ValueError: for greedy sampling, which has no policy gradient.
    """
    check_policy(config)
    # Other samplers than `generate` must not write the tokens of images either.
    config = without_media(model, config) if columns else config
    out = sampler(
        model, params, prompts, key, config, samples=group_size, tokenizer=tokenizer,
        **columns_of(columns),
    )  # fmt: skip
    tokens, valid = left_pad(prompts, model.config)
    repeat = lambda x: np.repeat(x[: len(prompts)], group_size, axis=0)
    longest = int(out.mask.sum(axis=1).max())
    size = min(bucket(longest, MIN_BUCKET), config.max_new_tokens)
    cut = lambda x: x[:, :size]
    batch = side_by_side(
        np,
        repeat(tokens),
        repeat(valid),
        *map(cut, (out.tokens, out.mask, out.log_probs, out.sampler_log_probs)),
    )
    batch |= {"truncated": np.array(out.finish) == "length"}
    return with_columns(batch, columns, group_size), out.completions


def side_by_side(xp, prompts, valid, tokens, mask, log_probs, sampler_log_probs):
    """Joins prompts [B, P] and responses [B, N] to a batch, with padding at both ends of a row."""
    seen = xp.concatenate([valid, mask], axis=1)
    return {
        "tokens": xp.concatenate([prompts, xp.where(mask, tokens, 0)], axis=1),
        "segment_ids": seen.astype(xp.int32),
        "positions": xp.maximum(xp.cumsum(seen, axis=1) - 1, 0).astype(xp.int32),
        "completion_mask": mask,
        "sampler_log_probs": log_probs,
        "behaviour_log_probs": sampler_log_probs,
    }


def check_no_columns(columns: Collection[str], who: str) -> None:
    """Raises ValueError if prompts have columns, such as images, that `who` would not show to a model."""
    if columns:
        raise ValueError(
            f"{who}: the prompts have the columns {sorted(columns)}, but it reads token ids only; use "
            "prompts of text, or rl.answers or rl.episodes."
        )


def columns_of(columns: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """Returns the keyword argument `columns` of a sampler, if there are columns."""
    return {"columns": columns} if columns else {}


def with_columns(batch: Batch, columns: Mapping[str, np.ndarray] | None, group_size: int) -> Batch:
    """Adds the columns to the batch, repeating each prompt's row for all of its responses.

    Raises:
        ValueError: if the batch already has an entry of the same name.
    """
    columns = columns or {}
    if taken := sorted(columns.keys() & (batch.keys() | MADE)):
        raise ValueError(f"collect: columns may not be named {taken}: batches have these anyway.")
    return batch | {name: x.repeat(group_size, axis=0) for name, x in columns.items()}


def padded(batch: Batch, width: int, size: int) -> Batch:
    """Pads prompts to `width` columns at the left, and responses to `size` columns at the right."""
    own_size = batch["completion_mask"].shape[1]
    before, after = width - (batch["tokens"].shape[1] - own_size), size - own_size
    pads = {name: ((0, 0), (before, after)) for name in WHOLE}
    pads |= {name: ((0, 0), (0, after)) for name in RESPONSE}
    return {name: np.pad(x, pads[name]) if name in pads else x for name, x in batch.items()}


def concatenated(batches: Sequence[Batch], columns: Collection[str] = ()) -> Batch:
    """Concatenates batches whose prompts and responses may be in different buckets.

    Entries [B, N, ...] are zero-padded like completion_mask, [B, T, ...] like tokens, also in nested dicts.
    Entries without axes are taken from the first batch.

    Args:
        columns: names of entries that belong to prompts; their shapes do not change.
    """
    totals = [batch["tokens"].shape[1] for batch in batches]
    sizes = [batch["completion_mask"].shape[1] for batch in batches]
    widths = [total - size for total, size in zip(totals, sizes, strict=True)]
    after = [max(sizes) - size for size in sizes]
    around = [(max(widths) - width, n) for width, n in zip(widths, after, strict=True)]
    pads = {tuple(totals): around, tuple(sizes): [(0, n) for n in after]}

    def join(path, *parts):
        if np.ndim(parts[0]) == 0:
            return parts[0]
        name, lengths = path[0].key, tuple(np.shape(x)[1] for x in parts if np.ndim(x) > 1)
        if lengths in pads and name not in columns:
            rest = [(0, 0)] * (np.ndim(parts[0]) - 2)
            pairs = zip(parts, pads[lengths], strict=True)
            parts = [np.pad(x, [(0, 0), pad, *rest]) for x, pad in pairs]
        return np.concatenate(parts)

    return jax.tree_util.tree_map_with_path(join, *batches)


def interleaved(
    first: Batch, second: Batch, count: int, columns: Collection[str] = ()
) -> tuple[Batch, np.ndarray]:
    """Joins two batches of the same `count` prompts: (batch, [B] bool, True for rows of the second).

    Prompt-major: each prompt's rows of both are adjacent. `columns` are those of `concatenated`.
    """
    whole, size = concatenated([first, second], columns), len(first["tokens"]) // count
    order = np.arange(2 * len(first["tokens"])).reshape(2, count, size)
    order = order.transpose(1, 0, 2).reshape(-1)
    return rows_of(whole, order), order >= len(first["tokens"])


def rows_of(batch: Batch, rows: Any) -> Batch:
    """Selects rows of the batch by number; entries without axes are unchanged."""
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, batch)


def model_inputs(batch: Batch) -> Batch:
    """Selects the inputs of a forward pass: tokens, positions, segments, mask and user columns."""
    given = {*WHOLE, "completion_mask"}
    return {name: x for name, x in batch.items() if name in given or name not in MADE}


def checked(batch: Any) -> Batch:
    """Checks a sampler's batch and converts lists to arrays, the mask to bool, missing verdicts to NaN.

    Raises:
        ValueError: if entries are missing, or padding lies between a prompt and its response.
        RewardError: if the rewards are invalid.
    """
    needed = {"tokens", "completion_mask", "sampler_log_probs", "rewards", "truncated"}
    if not isinstance(batch, Mapping) or (missing := sorted(needed - batch.keys())):
        raise ValueError(
            f"collect: a sampler returns a batch (docs/contracts.md) with {sorted(needed)}; this one gave "
            + (f"none of {missing}." if isinstance(batch, Mapping) else f"{type(batch).__name__}.")
        )
    listed = lambda x: isinstance(x, (list, tuple))
    rewards = checked_rewards(batch["rewards"], len(batch["tokens"]))
    arrays = jax.tree.map(lambda x: np.asarray(x) if listed(x) else x, dict(batch), is_leaf=listed)
    arrays = with_bool_masks(arrays | {"rewards": rewards})
    _check_padding(arrays)
    return arrays


def _check_padding(batch):
    """Raises ValueError if the first token of a response would be predicted from padding."""
    mask, segments = batch["completion_mask"], batch.get("segment_ids")
    if not isinstance(segments, np.ndarray) or mask.shape[1] >= segments.shape[1]:
        return
    apart = (segments[:, -mask.shape[1] - 1] == 0) & np.asarray(mask).any(axis=1)
    if apart.any():
        raise ValueError(
            f"collect: row {int(np.argmax(apart))} has padding (segment_ids 0) between its prompt and its "
            "response, whose first token would be predicted from it; a sampler pads prompts at the left."
        )


def with_bool_masks(batch: Batch) -> Batch:
    """Converts completion_mask and truncated to bool from any numeric dtype."""
    return batch | {name: batch[name].astype(bool) for name in ("completion_mask", "truncated")}


def check_policy(config: SamplingConfig) -> None:
    """Raises ValueError for a config that is greedy, not a policy."""
    if config.temperature == 0:
        raise ValueError("collect: temperature=0 is greedy, which has no policy gradient; use 1.0.")


# Entries from sampling, transforms and credit, which no model reads.
MADE = frozenset(
    (
        *WHOLE,
        *RESPONSE,
        "truncated",
        "rewards",
        "reward_parts",
        "turns",
        "from_reference",
        "draws",
        "policy_version",
        "stats",
        "kl_weight",
    )
    + (
        "old_log_probs",
        "ref_log_probs",
        "old_values",
        "advantages",
        "returns",
        "correct",
        "success_rates",
        "absent_mask",
        "guide_critic",
        "references",
    )
    + ("terminated", "episode_ends", "answer_chances")
)
