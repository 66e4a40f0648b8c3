"""Training of cross-encoders, which score a query and a text together.

A batch comes from `jaxft.data.group_batches`: `tokens`, `segment_ids` and `loss_mask` [B, G, T], G rows for a
query: with the text that answers it, and with texts that do not. Rows without tokens do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxft.losses import correctness_loss
from jaxft.metrics import Mean
from jaxft.models import as_rows
from jaxft.models.checks import check_tokens
from jaxft.objectives.next_token import Objective


def reranking(
    score: Callable[..., jax.Array], loss: Literal["softmax", "bce"] = "softmax"
) -> Objective:
    """objective(params, batch, key) -> (mean loss, metrics) of a cross-encoder.

    Args:
        score: (params, batch, key) -> [B], such as `jaxft.rewards.pair_scores`.
        loss: "softmax": -log softmax of the answer's score among the group's, a mean over queries (LCE: Gao
            et al., 2021, arxiv.org/abs/2101.08751); "bce": binary cross-entropy of each pair, a mean over
            pairs (sentence-transformers' BinaryCrossEntropyLoss).

    Metrics: accuracy, the fraction of queries whose answer has the highest score.
    """
    if loss not in ("softmax", "bce"):
        raise ValueError(f"reranking: unknown loss {loss!r}; known: softmax, bce.")

    def objective(params, batch, key):
        size, texts, _ = check_tokens(batch, "B G T")
        if texts < 2:
            raise ValueError(
                f"reranking: tokens {batch['tokens'].shape} are groups of {texts} rows, expected at least 2: "
                "a query with its answer and with another text."
            )
        scores = score(params, as_rows(batch), key).reshape(size, texts)
        there = jnp.any(jnp.asarray(batch["segment_ids"]) > 0, axis=2)
        others = jnp.where(there[:, 1:], scores[:, 1:], -jnp.inf)
        counted = there[:, 0] & there[:, 1:].any(axis=1)
        if loss == "bce":
            labels = jnp.arange(texts) == 0
            losses = correctness_loss(scores, jnp.broadcast_to(labels, scores.shape))
            total = Mean.of(losses, there * 1.0)
        else:
            candidates = jnp.concatenate([scores[:, :1], others], axis=1)
            values = jax.nn.logsumexp(candidates, axis=1) - scores[:, 0]
            total = Mean.of(values, counted * 1.0)
        best = scores[:, 0] > jnp.max(others, axis=1)
        metrics = {"accuracy": Mean.of(best * 1.0, counted * 1.0), "loss": total}
        return total.value, jax.lax.stop_gradient(metrics)

    return objective
