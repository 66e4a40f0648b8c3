"""Self-training: fine-tuning on the model's own correct answers, collected beforehand or at each step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from jaxft.metrics import Mean, Terms
from jaxft.models import Forward
from jaxft.objectives import Objective, completion_log_probs, mean_of, supervised
from jaxft.objectives.sharing import of_rows


def offline_collect(
    completions: Sequence[Sequence[Hashable]],
    correct: Sequence[Sequence[bool]],
    gold: Sequence[Hashable] = (),
) -> list[tuple[int, Hashable]]:
    """Returns (question, answer) pairs to fine-tune on: gold and correct sampled answers, deduplicated.

    Rejection sampling: Yuan et al., 2023, arxiv.org/abs/2308.01825; the offline self-training of Luong et
    al., 2024, arxiv.org/abs/2401.08967, which keeps the gold answers.

    Args:
        completions: the samples of each question, as text or tuples of ids.
        correct: the verdict on each sample.
        gold: one answer per question; None: no gold answers.

    Raises:
        ValueError: if questions, samples and verdicts differ in number.
    """
    if gold and len(gold) != len(completions):
        raise ValueError(
            f"offline_collect: {len(gold)} gold answers for {len(completions)} questions; one each, or none."
        )
    sizes = [[len(row) for row in rows] for rows in (completions, correct)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"offline_collect: samples and verdicts differ in number: {sizes}.")
    kept = {(number, answer): None for number, answer in enumerate(gold)}
    for number, (answers, verdicts) in enumerate(zip(completions, correct, strict=True)):
        right = (a for a, good in zip(answers, verdicts, strict=True) if good)
        kept |= {(number, answer): None for answer in right}
    return list(kept)


def online_self_training(forward: Forward) -> Objective:
    """½ cross-entropy of the policy's correct samples + ½ cross-entropy of gold answers.

    Online self-training: Luong et al., 2024, arxiv.org/abs/2401.08967; means over tokens, in nats. A step
    without a correct sample has only the second term. The batch has `samples`, experience with `correct` [B]
    (the credit of `right_samples`), and `gold`, rows of `supervised`. Metrics: own and gold, the two means;
    right, the fraction of correct samples; num_tokens, tokens of both per sample.
    """
    gold = mean_of(supervised(forward))

    def objective(params, batch, key):
        log_probs = completion_log_probs(forward, params, batch["samples"], key=key)
        samples = of_rows(batch["samples"])
        right = jnp.asarray(samples["correct"])
        counted = samples["completion_mask"] & right[:, None]
        own = Mean.of(jnp.where(counted, -log_probs, 0.0), counted)
        given = gold(params, batch["gold"], key)
        terms = Terms(tuple(Mean(0.5 * mean.total, mean.weight) for mean in (own, given)))
        metrics = {
            "own": own,
            "gold": given,
            "right": Mean.of(right, jnp.ones(right.shape)),
            "num_tokens": Mean(own.weight + given.weight, float(right.size)),
        }
        return terms.value, jax.lax.stop_gradient(metrics) | {"loss": terms}

    return objective


def right_samples(rewards: jax.Array, batch: dict) -> dict[str, jax.Array]:
    """Credit of `online_self_training`: correct [B], reward at least 1; False without a verdict."""
    del batch
    return {"correct": jnp.nan_to_num(rewards) >= 1.0}
