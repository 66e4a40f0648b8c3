"""Contrastive training of embeddings, with negatives of the batch and mined ones.

A batch comes from `jaxft.data.group_batches`: `tokens` and `segment_ids` [B, G, T], with G = 2 + negatives
texts a record: a query, a text that answers it, and texts that do not. A record with fewer negatives has
empty texts in their place. `text_ids` [B, G], if present, are equal for equal texts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.losses.contrastive import info_nce, margin_mse
from jaxft.metrics import Mean, Undivided
from jaxft.models import as_rows
from jaxft.models.checks import check_column, check_tokens
from jaxft.models.sentences import Embedding, unit
from jaxft.objectives.next_token import Objective
from jaxft.objectives.preferences import all_tokens


def contrastive(
    embed: Embedding,
    *,
    temperature: float = 0.05,
    margin: float = 0.0,
    symmetric: bool = False,
    cosine: bool = True,
    dims: Sequence[int] = (),
    chunk: int | None = None,
) -> Objective:
    """objective(params, batch, key) -> (mean `info_nce` over the batch's queries, metrics).

    The negatives of a query are the answers and negatives of all records of the batch, over all devices of a
    mesh, except texts equal to itself or to an answer that a record of the batch gives to the same query. The
    loss is not a sum over rows, so it cannot be computed in microbatches; `chunk` saves the memory instead.

    Args:
        embed: see jaxft.models.sentences.
        temperature: see `info_nce`.
        margin: see `info_nce`.
        symmetric: see `info_nce`.
        cosine: whether similarities are cosines, or else inner products.
        dims: also the losses of the first d features, for each d, with equal weight; the embeddings can then
            be cut (Matryoshka representations: Kusupati et al., 2022, arxiv.org/abs/2205.13147).
        chunk: texts that are embedded at a time, in the backward pass too, where they are embedded again
            (GradCache: Gao et al., 2021, arxiv.org/abs/2101.06983). It must divide B x G. None: all.

    Metrics: accuracy, the fraction of queries whose own answer is the most similar candidate, and the
    similarity to it.

    Raises:
        ValueError: for a temperature or margin that `info_nce` refuses; and by the objective, while tracing,
            for groups, dims or chunks that do not fit, or a batch in which no answer has another candidate.
    """
    pair = [jax.ShapeDtypeStruct((1, 1), jnp.float32)] * 2
    jax.eval_shape(functools.partial(info_nce, temperature=temperature, margin=margin), *pair)

    def objective(params, batch, key):
        size, texts, _ = check_tokens(batch, "B G T")
        if texts < 2:
            raise ValueError(
                f"contrastive: tokens {batch['tokens'].shape} are groups of {texts} texts, expected at "
                "least 2: a query and a text that answers it."
            )
        if size * (texts - 1) < 2:
            raise ValueError(
                "contrastive: a batch of one record without negatives has nothing to compare its answer "
                "with, so its loss is 0 for any params; use more records (--batch-size), or negatives."
            )
        rows = embed_in_chunks(embed, params, as_rows(batch), key, chunk)
        found = rows.reshape(size, texts, -1)
        if dims and not all(0 < d <= found.shape[-1] for d in dims):
            raise ValueError(
                f"contrastive: dims {tuple(dims)} must lie between 1 and the {found.shape[-1]} features."
            )
        left_out, counted = _pairs(batch)
        parts = [found, *[found[..., :d] for d in dims if d < found.shape[-1]]]
        options = dict(
            temperature=temperature, margin=margin, symmetric=symmetric, left_out=left_out
        )
        scaled = unit if cosine else lambda x: x
        losses = [info_nce(*_columns(scaled(part)), **options) for part in parts]
        values = sum(losses) / len(losses)
        counted_sum = jnp.sum(counted)
        # Not a sum over rows: every row's loss depends on the others.
        total = Undivided(jnp.sum(jnp.where(counted, values, 0.0)), counted_sum.astype(jnp.float32))
        queries, candidates = _columns(scaled(found))
        scores = jnp.where(
            left_out & ~jnp.eye(*left_out.shape, dtype=bool), -jnp.inf, queries @ candidates.T
        )
        own = jnp.diagonal(scores)
        best = own >= jnp.max(scores, axis=1)
        metrics = {
            "accuracy": Mean.of(best * 1.0, counted * 1.0),
            "similarity": Mean.of(own, counted * 1.0),
            "loss": total,
            "num_tokens": all_tokens(batch, total),
        }
        return total.value, jax.lax.stop_gradient(metrics)

    return objective


def distilled_margins(embed: Embedding, *, chunk: int | None = None) -> Objective:
    """objective(params, batch, key) -> (mean `margin_mse`, metrics).

    The column `margins` [B, G - 2] has a teacher's score of the answer less that of each negative. Negatives
    without a text do not count.
    """

    def objective(params, batch, key):
        size, texts, _ = check_tokens(batch, "B G T")
        if texts < 3:
            raise ValueError(
                f"distilled_margins: tokens {batch['tokens'].shape} are groups of {texts} texts, expected at "
                "least 3: a query, a text that answers it, and one that does not."
            )
        margins = check_column(batch, "margins", (size, texts - 2), "distilled_margins")
        rows = embed_in_chunks(embed, params, as_rows(batch), key, chunk)
        found = rows.reshape(size, texts, -1)
        scores = jnp.einsum("bd,bgd->bg", found[:, 0], found[:, 1:])
        losses = margin_mse(scores[:, :1], scores[:, 1:], margins)
        total = Mean.of(losses, _present(batch)[:, 2:] * 1.0)
        return total.value, jax.lax.stop_gradient({"loss": total})

    return objective


def embed_in_chunks(
    embed: Embedding,
    params: Any,
    rows: Mapping[str, Any],
    key: jax.Array | None,
    chunk: int | None = None,
) -> jax.Array:
    """The embeddings [B, D] of rows, `chunk` at a time; a backward pass embeds each chunk again.

    Each chunk takes rows of all devices.

    Raises:
        ValueError: if `chunk` does not divide the number of rows.
    """
    count = len(rows["tokens"])
    if chunk is None or chunk >= count:
        return embed(params, rows, key)
    if chunk < 1 or count % chunk:
        raise ValueError(
            f"contrastive: chunk is {chunk}, expected a divisor of the batch's {count} texts."
        )
    cut = lambda leaf: jnp.swapaxes(
        jnp.asarray(leaf).reshape(chunk, count // chunk, *leaf.shape[1:]), 0, 1
    )
    part = jax.checkpoint(lambda rows: embed(params, rows, key), prevent_cse=False)
    found = jax.lax.map(part, jax.tree.map(cut, dict(rows)))
    return jnp.swapaxes(found, 0, 1).reshape(count, -1)


def _columns(found):
    """(queries [B, D], candidates [B (G - 1), D]: all answers, then all negatives)."""
    answers, negatives = found[:, 1], found[:, 2:]
    return found[:, 0], jnp.concatenate([answers, negatives.reshape(-1, found.shape[-1])])


def _present(batch):
    """Texts with a token, [B, G]."""
    if "segment_ids" not in batch:
        return jnp.ones(jnp.shape(batch["tokens"])[:2], bool)
    return jnp.any(jnp.asarray(batch["segment_ids"]) > 0, axis=2)


def _pairs(batch):
    """(pairs of query and candidate that are not negatives [B, B (G - 1)], queries that count [B])."""
    there = _present(batch)
    flat = lambda x: jnp.concatenate([x[:, 1], x[:, 2:].reshape(-1)])
    left_out = ~(there[:, :1] & flat(there)[None])
    if "text_ids" in batch:
        ids = check_column(batch, "text_ids", there.shape, "contrastive")
        candidates = flat(ids)[None]
        same = (ids[:, :1] == ids[:, 0][None]).astype(jnp.float32)
        answers = (ids[:, 1:2] == candidates).astype(jnp.float32)
        known = same @ answers > 0  # of all records with this query
        left_out = left_out | (candidates == ids[:, :1]) | known
    return left_out, there[:, 0] & there[:, 1]
