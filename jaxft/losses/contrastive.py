"""Losses of embeddings for retrieval."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def info_nce(
    queries: jax.Array,
    candidates: jax.Array,
    *,
    temperature: float = 0.05,
    margin: float = 0.0,
    symmetric: bool = False,
    left_out: jax.Array | None = None,
) -> jax.Array:
    """-log softmax of each query's similarity to its own candidate among all candidates, [N] in nats.

    InfoNCE (van den Oord et al., 2018, arxiv.org/abs/1807.03748) with in-batch negatives: the loss of
    sentence-transformers' MultipleNegativesRankingLoss, whose scale is 1 / temperature.

    Args:
        queries: [N, D].
        candidates: [M, D], M >= N: candidate i < N belongs to query i; all others are negatives.
        temperature: of the cosine similarities; for embeddings of other lengths these are inner products of
            the embeddings as given.
        margin: subtracted from the similarity to the own candidate (additive margin softmax: Yang et al.,
            2019, arxiv.org/abs/1902.08564).
        symmetric: the mean with the loss of each own candidate among all queries.
        left_out: [N, M] bool, pairs that are not negatives, such as repeated texts or padding; the own
            candidate always counts.

    Raises:
        ValueError: for shapes that do not fit, a temperature that is not positive and finite, or a margin
            that is not finite.
    """
    n, m = len(queries), len(candidates)
    if (
        queries.ndim != 2
        or candidates.ndim != 2
        or queries.shape[1] != candidates.shape[1]
        or m < n
    ):
        raise ValueError(
            f"info_nce: queries {queries.shape} and candidates {candidates.shape}, expected [N, D] and "
            "[M, D] with M >= N."
        )
    if left_out is not None and left_out.shape != (n, m):
        raise ValueError(f"info_nce: left_out {left_out.shape}, expected {(n, m)}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"info_nce: temperature must be positive and finite, got {temperature}.")
    if not abs(margin) < float("inf"):
        raise ValueError(f"info_nce: margin must be finite, got {margin}.")
    own = jnp.eye(n, m, dtype=bool)
    scores = jnp.einsum(
        "nd,md->nm", queries, candidates, preferred_element_type=jnp.float32
    ).astype(jnp.float32)
    scores = (scores - margin * own) / temperature
    if left_out is not None:
        scores = jnp.where(left_out & ~own, -jnp.inf, scores)
    right = jnp.diagonal(scores)
    losses = jax.nn.logsumexp(scores, axis=1) - right
    if symmetric:
        losses = (losses + jax.nn.logsumexp(scores[:, :n], axis=0) - right) / 2
    return losses


def margin_mse(positive: jax.Array, negative: jax.Array, teacher_margin: jax.Array) -> jax.Array:
    """(positive - negative - teacher_margin)^2, elementwise, of a student's scores of two candidates.

    Hofstätter et al., 2020, arxiv.org/abs/2010.02666: distils a cross-encoder's margins into a bi-encoder,
    whose scores are inner products.
    """
    return (positive - negative - teacher_margin) ** 2
