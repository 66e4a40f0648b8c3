"""The gated delta rule: linear attention whose state decays and is corrected by each token.

Yang et al., 2024, arxiv.org/abs/2412.06464 (Gated DeltaNet), eq. 10; the form in chunks is that of
arxiv.org/abs/2406.06484 (DeltaNet), section 3, with the decays of the former's section 3.3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 64  # tokens whose products are matrices [CHUNK, CHUNK]


def gated_delta_rule(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H F"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K F"] | None = None,
    *,
    texts: Int[Array, "B T"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B T H F"], Float[Array, "B H K F"]]:
    """y_t = S_t^T q_t with S_t = S' + β_t k_t (v_t - S'^T k_t)^T and S' = exp(g_t) S_{t-1}, and the last S.

    With T = 1 it is the formula, otherwise a scan over chunks: within a chunk of C tokens all corrections are
    the solution of one triangular system, and outputs are products of matrices. All is computed in
    float32; y has the values' data type. A token with β = 0 and g = 0, as padding has, changes no state.

    Args:
        query, key: usually of unit length; the caller scales the queries.
        value: the values.
        log_decay: g, at most 0.
        beta: β, the share of the error that is corrected, from 0 to 1.
        state: S before the first token; None: zeros.
        texts: number of each token's text, which never falls along a row. Text 0 continues `state`, and the
            first token of any other has S' = 0. None: all are text 0.
        chunk: C.
    """
    batch, length = value.shape[:2]
    if length == 1:
        return gated_delta_rule_reference(query, key, value, log_decay, beta, state, texts=texts)
    texts = jnp.zeros((batch, length), jnp.int32) if texts is None else texts
    chunk = min(chunk, length)
    fill = -length % chunk
    # The tokens that fill the last chunk belong to the last text; they have β = g = 0.
    texts = jnp.pad(texts, ((0, 0), (0, fill)), mode="edge")[..., None]
    arrays = (x.astype(jnp.float32) for x in (query, key, value, log_decay, beta))
    arrays = (jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)) for x in arrays)
    parts = _within_chunks(*(_chunks(x, chunk) for x in (*arrays, texts)))
    start = _blank(key, value) if state is None else state.astype(jnp.float32)

    def body(state, part):
        query, key, kept, scores, new, read = part
        values = new - read @ state  # what the keys add: β_t times the error of S'
        y = query @ state + scores @ values
        return kept[..., None, None] * state + jnp.swapaxes(key, -1, -2) @ values, y

    state, y = jax.lax.scan(body, start, parts)
    y = jnp.transpose(y, (1, 0, 3, 2, 4)).reshape(batch, length + fill, *value.shape[2:])
    return y[:, :length].astype(value.dtype), state


def gated_delta_rule_reference(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T H K"],
    value: Float[Array, "B T H F"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    state: Float[Array, "B H K F"] | None = None,
    *,
    texts: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H F"], Float[Array, "B H K F"]]:
    """`gated_delta_rule`, token by token."""
    texts = jnp.zeros(value.shape[:2], jnp.int32) if texts is None else texts
    start = _blank(key, value) if state is None else state.astype(jnp.float32)

    def body(carry, token):
        state, before = carry
        query, key, value, log_decay, beta, text = token
        decay = jnp.where((text == before)[:, None], jnp.exp(log_decay), 0.0)
        state = decay[..., None, None] * state
        error = value - jnp.einsum("bhkf,bhk->bhf", state, key)
        state = state + key[..., None] * (beta[..., None] * error)[..., None, :]
        return (state, text), jnp.einsum("bhkf,bhk->bhf", state, query)

    arrays = (x.astype(jnp.float32) for x in (query, key, value, log_decay, beta))
    tokens = tuple(jnp.swapaxes(x, 0, 1) for x in (*arrays, texts))
    (state, _), y = jax.lax.scan(body, (start, jnp.zeros_like(texts[:, 0])), tokens)
    return jnp.swapaxes(y, 0, 1).astype(value.dtype), state


def _within_chunks(query, key, value, log_decay, beta, texts):
    """All that does not depend on the state before a chunk; arrays [N, B, H, C, ...], texts [N, B, 1, C].

    Returns (queries and keys scaled for the product with the state, the state's decay over a chunk, scores
    [C, C], values that the keys add to a state of zeros, and the keys with which they read the state).
    """
    total = jnp.cumsum(log_decay, axis=-1)
    last = texts[..., -1]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])  # the text of the state
    seen = jnp.tril(texts[..., :, None] == texts[..., None, :])
    # exp(g_j+1 + ... + g_i) for j <= i of one text. Masked before exp, which could overflow above.
    gaps = total[..., :, None] - total[..., None, :]
    decays = jnp.exp(jnp.where(seen, gaps, -jnp.inf))
    since = jnp.where(texts == before[..., None], jnp.exp(total), 0.0)[..., None]
    until = jnp.where(texts == last[..., None], jnp.exp(total[..., -1:] - total), 0.0)
    kept = jnp.where(last == before, jnp.exp(total[..., -1]), 0.0)
    turned = jnp.swapaxes(key, -1, -2)
    weighted = beta[..., None] * key
    # (I + L) X = β (V - K' S), L the part below the diagonal: each token's error follows from those before.
    system = (weighted @ turned) * decays
    sides = jnp.concatenate([beta[..., None] * value, weighted * since], axis=-1)
    solved = jax.lax.linalg.triangular_solve(
        system, sides, left_side=True, lower=True, unit_diagonal=True
    )
    new, read = jnp.split(solved, [value.shape[-1]], axis=-1)
    scores = (query @ turned) * decays
    return query * since, key * until[..., None], kept, scores, new, read


def _chunks(x, size):
    """[B, T, H, ...] as [N, B, H, C, ...]."""
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.transpose(x, (1, 0, 3, 2, *range(4, x.ndim)))


def _blank(key, value):
    batch, _, heads, size = key.shape
    return jnp.zeros((batch, heads, size, value.shape[-1]), jnp.float32)
