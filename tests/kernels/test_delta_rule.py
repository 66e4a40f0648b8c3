"""The gated delta rule in chunks against its formula, and the formula against numpy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.delta_rule import gated_delta_rule, gated_delta_rule_reference

ROWS, LENGTH, HEADS, SIZE, FEATURES = 2, 21, 3, 4, 5


def arrays(length=LENGTH):
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda i, *shape: jax.random.normal(keys[i], (ROWS, length, HEADS, *shape))
    query, key = normal(0, SIZE), normal(1, SIZE)
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    log_decay, beta = -jax.nn.softplus(normal(3)), jax.nn.sigmoid(normal(4))
    state = jax.random.normal(keys[5], (ROWS, HEADS, SIZE, FEATURES))
    return query, key, normal(2, FEATURES), log_decay, beta, state


# Texts that begin within chunks of 4, at their ends, and of one token; the first row's continues the state.
STARTS = [[7, 8, 16, 17], [4, 12, 20]]
TEXTS = np.stack([np.isin(np.arange(LENGTH), starts).cumsum() for starts in STARTS])


def by_hand(query, key, value, log_decay, beta, state):
    """One row and head, as the formula stands: [T, F] and the last state."""
    found = []
    for q, k, v, g, b in zip(query, key, value, log_decay, beta, strict=True):
        state = np.exp(g) * state
        state = state + b * np.outer(k, v - state.T @ k)
        found.append(state.T @ q)
    return np.stack(found), state


def test_the_reference_is_the_formula_and_begins_anew_at_each_text():
    *tokens, state = (np.asarray(x, np.float64) for x in arrays())
    y, last = gated_delta_rule_reference(*arrays(), texts=jnp.asarray(TEXTS))
    for row in range(ROWS):
        for head in range(HEADS):
            parts, now = [], state[row, head]
            for text in range(TEXTS[row].max() + 1):
                own = TEXTS[row] == text
                now = now if text == 0 else np.zeros_like(now)
                part, now = by_hand(*(x[row, own, head] for x in tokens), now)
                parts.append(part)
            np.testing.assert_allclose(y[row, :, head], np.concatenate(parts), atol=1e-5)
            np.testing.assert_allclose(last[row, head], now, atol=1e-5)


@pytest.mark.parametrize("chunk, texts", [(4, TEXTS), (64, TEXTS), (8, None)])
def test_chunks_and_their_gradients_are_those_of_the_reference(chunk, texts):
    texts = None if texts is None else jnp.asarray(texts)
    weights = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, HEADS, FEATURES))

    def loss(function, *inputs, **options):
        y, state = function(*inputs, texts=texts, **options)
        return jnp.sum(weights * y) + jnp.sum(jnp.sin(state)), (y, state)

    run = lambda function, **options: jax.jit(
        jax.grad(lambda *inputs: loss(function, *inputs, **options), argnums=range(6), has_aux=True)
    )(*arrays())
    wanted = run(gated_delta_rule_reference)
    chex.assert_trees_all_close(run(gated_delta_rule, chunk=chunk), wanted, atol=3e-5, rtol=3e-5)


def test_calls_in_turn_padding_and_equal_keys():
    """A text in three calls; tokens with β = g = 0 change nothing; keys that repeat are solved exactly."""
    query, key, value, log_decay, beta, state = arrays()
    key, beta = jnp.broadcast_to(key[:, :1], key.shape), jnp.full_like(beta, 0.999)
    log_decay = 0.0 * log_decay
    tokens = query, key, value, log_decay, beta
    wanted, last = gated_delta_rule_reference(*tokens, state)
    parts, now = [], state
    for start, end in ((0, 1), (1, 12), (12, LENGTH)):
        y, now = gated_delta_rule(*(x[:, start:end] for x in tokens), now, chunk=8)
        parts.append(y)
    chex.assert_trees_all_close((jnp.concatenate(parts, 1), now), (wanted, last), atol=1e-4)
    blank = [0.0 * x if i > 2 else x for i, x in enumerate(tokens)]
    chex.assert_trees_all_close(gated_delta_rule(*blank, state, chunk=8)[1], state, atol=1e-6)


def test_it_computes_in_float32_and_returns_the_values_type():
    halves = [x.astype(jnp.bfloat16) for x in arrays()[:5]]
    y, state = gated_delta_rule(*halves)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = gated_delta_rule(*(x.astype(jnp.float32) for x in halves))
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))
