"""Progress of the episodes of a long answer: splitting, regret over tokens, and credit per episode.

Meta reinforcement fine-tuning (MRT): Qu et al., 2025, arxiv.org/abs/2503.07572. An answer's reasoning is a
sequence of episodes z_0 ... z_(k-1); c_j is the prompt with the first j of them; J(c_j) is the chance of a
right answer if the model is made to answer there (jaxft.rl.forced). Episode j makes the progress
p_j = J(c_(j+1)) - J(c_j).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.objectives.policy import spread, token_mean
from jaxft.rl.advantages import baseline_advantages, grpo_advantages
from jaxft.rl.algorithms import Advantage, Algorithm, Build
from jaxft.rl.rollouts import Batch
from jaxft.rl.token_losses import clipped

# Beginnings of a paragraph that starts another attempt, as in the authors' analysis.
MARKERS = (
    "Wait",
    "But wait",
    "Alternatively",
    "Is there another way to think about this?",
    "But let me double-check",
    "But hold on",
)
BREAK = "\n\n"  # between paragraphs


def split_episodes(
    text: str, markers: Sequence[str] = MARKERS, min_gap: int = 2, merge: int = 1
) -> list[str]:
    """Splits a text into episodes, which joined are the text; an empty text has none.

    An episode begins at a paragraph that starts with a marker and lies more than `min_gap` paragraphs behind
    the beginning of the episode before it. So do the authors' notebooks (break_into_meta_steps.ipynb).

    Args:
        text: the reasoning; paragraphs are separated by blank lines.
        markers: beginnings of such paragraphs.
        min_gap: paragraphs after a beginning that cannot begin another.
        merge: number of episodes that are joined to one; the authors' analyses have 3, 5 and 10.

    Raises:
        ValueError: for a negative min_gap, or if merge is below 1.
    """
    if min_gap < 0 or merge < 1:
        raise ValueError(
            f"split_episodes: min_gap must be at least 0 and merge at least 1; got {min_gap} and {merge}."
        )
    if not text:
        return []
    paragraphs, starts = text.split(BREAK), [0]
    for i, paragraph in enumerate(paragraphs):
        if paragraph.startswith(tuple(markers)) and i - starts[-1] > min_gap:
            starts.append(i)
    starts = starts[::merge]
    pieces = [paragraph + BREAK for paragraph in paragraphs[:-1]] + paragraphs[-1:]
    ends = [*starts[1:], len(pieces)]
    return ["".join(pieces[a:b]) for a, b in zip(starts, ends, strict=True)]


def separator_ends(batch: Batch, separator: int, most: int) -> np.ndarray:
    """Ends of the prefixes c_0, c_1 ... of each response, [B, most + 1]: 0, then one per separator.

    The number of the response's tokens in the prefix, a separator included; -1 where a response has fewer
    episodes. Tokens behind the last separator, such as the answer itself, belong to no episode.

    Args:
        batch: experience, see jaxft.objectives.policy.
        separator: the token at which an episode ends.
        most: the largest number of episodes; later ones are left out.
    """
    tokens, mask = _responses(batch)
    places = [np.flatnonzero(row) + 1 for row in mask & (tokens == separator)]
    return _padded(places, most)


def text_ends(
    batch: Batch,
    decode: Callable[[Sequence[int]], str],
    most: int,
    *,
    split: Callable[[str], list[str]] = split_episodes,
    close: str = "</think>",
) -> np.ndarray:
    """`separator_ends` of text: an episode ends with the token that completes its last character.

    Args:
        batch, most: as for `separator_ends`.
        decode: function from ids to text, with special tokens.
        split: function from a text to its episodes.
        close: end of the reasoning; text from there on belongs to no episode.
    """
    places = []
    for ids, seen in zip(*_responses(batch), strict=True):
        ids = ids[seen].tolist()
        lengths = np.cumsum([len(part) for part in split(decode(ids).partition(close)[0])])[:most]
        reached = lambda count, ids=ids: len(decode(ids[:count]))
        places.append([bisect.bisect_left(range(len(ids)), n, key=reached) for n in lengths])
    return _padded(places, most)


def shortened(batch: Batch) -> list[list[int]]:
    """Responses without the episodes behind the first prefix at which J is largest, with their answer.

    The traces that the form for supervised fine-tuning (STaR) trains on, if they are right: progress is
    largest up to that prefix. What follows the last episode, the answer, is kept. The batch has the columns
    of `jaxft.rl.forced.add_chances`.
    """
    ends, kept = batch["episode_ends"], []
    best = np.nanargmax(batch["answer_chances"], axis=1)
    for ids, seen, row, j in zip(*_responses(batch), ends, best, strict=True):
        ids = ids[seen].tolist()
        kept.append(ids[: row[j]] + ids[row.max() :])
    return kept


def _responses(batch):
    """(tokens, mask) [B, N] of the responses."""
    mask = np.asarray(batch["completion_mask"], bool)
    return np.asarray(batch["tokens"])[:, -mask.shape[1] :], mask


def _padded(places, most):
    ends = np.full((len(places), most + 1), -1, np.int32)
    ends[:, 0] = 0
    for row, found in zip(ends, places, strict=True):
        row[1 : 1 + len(found[:most])] = found[:most]
    return ends


def progress(chances: Any) -> jax.Array:
    """p_j = J_(j+1) - J_j, [..., K] of chances [..., K + 1]; NaN for episodes that do not exist (NaN)."""
    return jnp.diff(jnp.asarray(chances), axis=-1)


def normalised_regret(tokens: Sequence[float], values: Sequence[float], budget: float) -> float:
    """1 - area / C under the chance of a right answer over the tokens spent, up to the budget C.

    The curve is linear from (0, 0) through the points and keeps the last value; 0 is an oracle that is right
    without a token, 1 is never right. So does the authors' regret.ipynb, whose tokens are those of the
    prefix and of the forced answer.

    Args:
        tokens: [K] above 0, increasing: the tokens spent until each answer.
        values: [K] in [0, 1]: the chance that it is right.
        budget: C, in tokens.

    Raises:
        ValueError: for points out of order, at or before 0 tokens, or a budget that is not positive.
    """
    x, y = (np.asarray(given, float) for given in (tokens, values))
    if x.shape != y.shape or x.ndim != 1 or budget <= 0:
        raise ValueError(
            f"normalised_regret: expected as many tokens as values and a positive budget; got shapes "
            f"{x.shape} and {y.shape} and budget {budget}."
        )
    x, y = np.append(0.0, x), np.append(0.0, y)
    if (np.diff(x) < 0).any() or (x[1:] <= 0).any() and y[x <= 0].any():
        raise ValueError(
            f"normalised_regret: tokens must increase from above 0; got {x[1:].tolist()}. An answer takes "
            "at least one token."
        )
    last = np.interp(budget, x, y)
    x, y = np.append(x[x < budget], budget), np.append(y[x < budget], last)
    return float(1.0 - np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / budget)


def episode_of(ends: Any, size: int) -> jax.Array:
    """The episode [B, N] of each token of a response; the number of episodes for those behind the last."""
    ends = jnp.asarray(ends)[:, 1:, None]
    return jnp.sum((ends >= 0) & (ends <= jnp.arange(size)[None, None]), axis=1)


def episode_advantages(
    outcome: Any, chances: Any, ends: Any, size: int, group_size: int, alpha: float
) -> jax.Array:
    """A_(i,t) = A_i + α (p_(i,j(t)) - mean) / (std + ε) [B, N]: the outcome's, and its episode's progress.

    Mean and standard deviation are those of all episodes of the group. An episode's progress is credited only
    to its own tokens: as a return, the sum of later progress, it would telescope to J at the end minus J now,
    and episodes without use would cost nothing. Tokens behind the last episode have A_i; with α = 0 all have.

    The online form of the authors' version 0.1 (github.com/CMU-AIRe/MRT); the paper's own form for
    reinforcement learning is `termination_advantages`.

    Args:
        outcome: A [B] of the outcome, such as `grpo_advantages` of the rewards.
        chances: J [B, K + 1], NaN for prefixes that do not exist.
        ends: [B, K + 1], see `separator_ends`.
        size: N, the columns of a response.
        group_size: adjacent responses to one prompt.
        alpha: α.
    """
    made = progress(chances)
    episodes = made.shape[1]
    scaled = grpo_advantages(made.reshape(-1), group_size * episodes).reshape(made.shape)
    # The last column is for tokens that belong to no episode.
    scaled = jnp.pad(scaled, ((0, 0), (0, 1)))
    number = episode_of(ends, size)
    own = jnp.where(
        number < jnp.sum(jnp.asarray(ends)[:, 1:] >= 0, axis=1, keepdims=True), number, episodes
    )
    return spread(outcome, number) + alpha * jnp.take_along_axis(scaled, own, axis=1)


def termination_advantages(rewards: Any, terminated: Any, group_size: int) -> jax.Array:
    """r minus the mean reward of the group's rollouts that had to answer at once, [B].

    The "termination reward baseline" of the authors' train/rl/README.md: a rollout that continues to reason
    is credited with what it gains over stopping. Without terminated rollouts the baseline is 0.

    Args:
        rewards: [B]; NaN: no verdict.
        terminated: [B] bool, see `jaxft.rl.forced.with_terminations`.
        group_size: adjacent rollouts from one prefix, of both kinds.
    """
    stopped = jnp.where(jnp.asarray(terminated), jnp.asarray(rewards), jnp.nan)
    stopped = stopped.reshape(-1, group_size)
    known = ~jnp.isnan(stopped)
    total = jnp.sum(jnp.where(known, stopped, 0.0), axis=1)
    means = total / jnp.maximum(jnp.sum(known, axis=1), 1)
    return baseline_advantages(jnp.asarray(rewards, jnp.float32), jnp.repeat(means, group_size))


def mrt_online(
    build: Build, group_size: int, alpha: float = 1.0, advantage: Advantage = grpo_advantages
) -> Algorithm:
    """MRT on the policy's own answers: `episode_advantages`, a clipped ratio, the mean over all tokens.

    The batch has `answer_chances` and `episode_ends` of `jaxft.rl.forced.add_chances`. Logged: `progress`,
    the sum over an answer's episodes, and `episodes`, their number. With α = 0 it is GRPO.

    Raises:
        ValueError: when called, if the batch has no chances.
    """

    def credit(rewards, batch):
        if "answer_chances" not in batch:
            raise ValueError(
                "mrt_online: the batch has no answer_chances; pass rl.add_chances to collect."
            )
        ends, chances = batch["episode_ends"], batch["answer_chances"]
        size = batch["completion_mask"].shape[1]
        outcome = advantage(rewards, group_size)
        stats = {
            "progress": jnp.nansum(progress(chances), axis=1),
            "episodes": jnp.sum(jnp.asarray(ends)[:, 1:] >= 0, axis=1).astype(jnp.float32),
        }
        given = episode_advantages(outcome, chances, ends, size, group_size, alpha)
        return {"advantages": given, "stats": batch.get("stats", {}) | stats}

    return Algorithm(credit, build(clipped(), token_mean))


def mrt_stale(build: Build, group_size: int) -> Algorithm:
    """MRT from a stale prefix: `termination_advantages`, a clipped ratio, the mean over all tokens.

    Prompts are questions with a prefix of an earlier answer; `jaxft.rl.forced.with_terminations` samples
    both kinds of rollouts. The advantage (r - mean) / std of the group of both kinds, the other form of the
    paper, is `dapo`'s or `grpo`'s.
    """

    def credit(rewards, batch):
        return {"advantages": termination_advantages(rewards, batch["terminated"], group_size)}

    return Algorithm(credit, build(clipped(), token_mean))
