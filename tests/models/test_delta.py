"""Gated DeltaNet layers: the convolution, their part of a cache, and what they refuse."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.generation import SamplingConfig
from jaxft.generation.turns import can_continue, first_turn, next_turn
from jaxft.kernels.branches import Branches
from jaxft.models import DecoderConfig, Delta, take_rows
from jaxft.models.delta import convolved, convolved_after
from jaxft.parallel import make_mesh, mesh_context
from jaxft.rl import exact_chances
from tests.small_models import LLAMA, base, jitted, large

KEY = jax.random.key(0)
CONFIG: DecoderConfig = dataclasses.replace(
    LLAMA,
    gated_attention=True,
    delta=Delta(layers=(1,), key_heads=2, value_heads=4, key_size=6, value_size=5, taps=3),
)


@pytest.fixture(scope="module")
def model_and_params():
    model, params = base(CONFIG)
    return model, large(params)


def test_the_convolution_sees_the_last_tokens_of_its_text():
    x = np.asarray(jax.random.normal(KEY, (2, 7, 3)))
    taps = np.asarray(jax.random.normal(jax.random.key(1), (4, 3)))
    texts = np.array([[0, 0, 1, 1, 1, 1, 1], [0, 1, 2, 2, 2, 3, 3]])
    wanted = np.zeros_like(x)
    for row, t, i in np.ndindex(2, 7, 4):
        if t - i >= 0 and texts[row, t - i] == texts[row, t]:
            wanted[row, t] += taps[3 - i] * x[row, t - i]
    found = convolved(jnp.asarray(x), jnp.asarray(taps), jnp.asarray(texts))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_calls_in_turn_with_padding_anywhere_are_one_convolution(count):
    taps = jax.random.normal(jax.random.key(1), (count, 3))
    x = jax.random.normal(KEY, (2, 9, 3))
    valid = np.array([[0, 1, 1, 0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    window, parts = jnp.zeros((2, count - 1, 3)), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        cut = slice(start, end)
        y, window = convolved_after(window, x[:, cut], taps, jnp.asarray(valid[:, cut]))
        parts.append(y)
    found = jnp.concatenate(parts, axis=1)
    for row in range(2):
        own = x[row, valid[row]][None]
        np.testing.assert_allclose(found[row, valid[row]], convolved(own, taps)[0], atol=1e-5)
        np.testing.assert_array_equal(window[row], own[0, own.shape[1] - count + 1 :])


def tokens_of(rows, width):
    """Tokens and validity of rows that are padded on both sides and within."""
    rng, tokens = np.random.default_rng(0), np.zeros((len(rows), width), np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        places = np.sort(rng.permutation(width)[: len(row)])
        tokens[i, places], valid[i, places] = row, True
    return jnp.asarray(tokens), jnp.asarray(valid)


def test_a_cache_holds_the_tokens_that_count_wherever_padding_is(model_and_params):
    """Two calls with padding anywhere, and then one token of one row: the logits of whole rows."""
    model, params = model_and_params
    rows = [[5, 9, 4, 28, 1, 2, 7], [11, 3, 3, 8, 20]]
    run = lambda *inputs, cache=None: jitted(model)({"params": params}, *inputs, cache=cache)
    cache, at = model.init_cache(2, 24), np.zeros((2, 1), np.int32)
    for part in ([row[:3] for row in rows], [row[3:-1] for row in rows]):
        tokens, valid = tokens_of(part, 8)
        positions = at + jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        cache = run(tokens, positions, valid.astype(jnp.int32), cache=cache).cache
        at = at + np.asarray(valid).sum(axis=1, keepdims=True)
    for row in range(2):  # the other row waits
        valid = jnp.arange(2)[:, None] == row
        output = run(
            jnp.asarray([r[-1:] for r in rows]), jnp.asarray(at), valid.astype(int), cache=cache
        )
        cache = output.cache
        whole = run(jnp.asarray([rows[row]])).logits[0, -1]
        np.testing.assert_allclose(output.logits[row, 0], whole, rtol=1e-4, atol=1e-4)
    order = jnp.asarray([1, 1])
    taken = take_rows(cache, order, 8)
    swap = lambda x: x[order]
    chex.assert_trees_all_equal(taken.memories, jax.tree.map(swap, cache.memories))
    assert taken.memories[0].state.dtype == jnp.float32 and not cache.rewinds
    assert (len(cache.keys), len(cache.memories)) == (1, 1)


def test_what_a_state_cannot_do_is_refused(model_and_params):
    model, params = model_and_params
    tokens = jnp.ones((1, 8), jnp.int32)
    shape = lambda params, **options: jax.eval_shape(
        lambda params: model.apply({"params": params}, tokens, **options).logits, params
    )
    for name in ("prompt", "prefix"):
        width = {"prompt": 16, "prefix": 2 * 2 * 2 * 6}[name]
        with pytest.raises(ValueError, match="a prompt or prefix is shared by all texts of a row"):
            shape(params | {name: jnp.zeros((3, width))})
    with pytest.raises(
        ValueError, match="cannot share a prompt: layers of Gated DeltaNet have one"
    ):
        shape(params, branches=Branches(2, 3))
    with pytest.raises(ValueError, match="use a mesh without 'context'"):
        with mesh_context(make_mesh(context=8)):
            shape(params)
    with pytest.raises(ValueError, match="value_heads .3. must be a multiple of key_heads .2."):
        Delta(layers=(), key_heads=2, value_heads=3, key_size=4, value_size=4)
    with pytest.raises(ValueError, match="use sampled_chances"):
        exact_chances(model, [1])
    assert not can_continue(model)
    config = SamplingConfig(2)
    _, turn = first_turn(model, params, [[1, 2]], KEY, config)
    with pytest.raises(ValueError, match="use generate for each turn"):
        next_turn(model, params, turn, [0], turn.contexts, KEY, config, row_ids=[0])
