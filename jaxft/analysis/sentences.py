"""Embeddings of texts: pooled hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxft.checkpoints import check_tokenizer
from jaxft.models.sentences import MEAN, Pooling, embedding_of

_MULTIPLE = 32  # lengths are padded to multiples of it: few programs, little padding


def text_embeddings(
    model: Any,
    params: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: Pooling = MEAN,
    max_length: int = 256,
    batch_size: int = 32,
) -> Float[np.ndarray, "N D"]:
    """The pooled hidden states of each text's first `max_length` tokens.

    Args:
        model: an Encoder of sentences, such as "minilm"; or a Decoder.
        params: the model's params.
        tokenizer: the model's tokenizer.
        texts: each must have at least one token.
        pooling: of the hidden states; by default their mean, scaled to unit length.
        max_length: in tokens, including special ones.
        batch_size: texts at a time, grouped by length.
    """

    embed = embedding_of(model, pooling)
    run = jax.jit(
        lambda params, tokens, valid: embed(params, {"tokens": tokens, "segment_ids": valid})
    )
    check_tokenizer(tokenizer, model.config)
    # Cut by the tokenizer, which keeps the special token at the end, as sentence-transformers does.
    cut = dict(truncation=True, max_length=max_length)
    ids = [tokenizer(text, **cut)["input_ids"] for text in texts]
    if empty := [i for i, row in enumerate(ids) if not row]:
        raise ValueError(f"text_embeddings: texts {empty[:5]} have no token.")
    order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = min(-(-max(len(ids[i]) for i in rows) // _MULTIPLE) * _MULTIPLE, max_length)
        tokens = np.zeros((batch_size, width), np.int32)
        valid = np.zeros_like(tokens)
        for place, i in enumerate(rows):
            tokens[place, : len(ids[i])], valid[place, : len(ids[i])] = ids[i], 1
        found |= dict(zip(rows, np.asarray(run(params, tokens, valid)), strict=False))
    return np.stack([found[i] for i in range(len(ids))])
