"""Turns: answers that go on in the cache are those of a new prefill of the whole context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.generation import SamplingConfig, generate, left_pad, sampler
from jaxft.generation.turns import first_turn, next_turn
from tests.generation.test_continuous import KEY, MODELS, Letters, made, same


def test_turns_are_those_of_a_new_prefill(monkeypatch):
    """Rows pause while others go on, end by tokens, strings or length, and leave; some add nothing."""
    model, params = made(MODELS["shared"])
    prompts = [
        [5, 9, 4, 28, 1, 2],
        [11],
        [3, 8, 8, 14, 6, 3, 8, 20, 21, 22, 23, 1, 2, 3, 4, 5, 6, 7],
    ]
    config = SamplingConfig(
        9, 0.8, repetition_penalty=1.2, stop_ids=(4, 6, 9, 12), stop_strings=("A", "D", "H", "P")
    )
    prefill, prefills = sampler.prefill, []
    monkeypatch.setattr(sampler, "prefill", lambda *x: prefills.append(x) or prefill(*x))
    out, turn = first_turn(model, params, prompts, KEY, config, samples=2, tokenizer=Letters())
    same(out, generate(model, params, prompts, KEY, config, samples=2, tokenizer=Letters()))
    assert len({len(ids) for ids in out.completions}) > 2
    more = {5: [7] * 20, 0: [], 3: [1, 2]}, {2: [15], 1: [8] * 5}
    for number, added in enumerate(more):
        rows, key = list(added), jax.random.fold_in(KEY, number)
        contexts = [turn.contexts[row] + ids for row, ids in added.items()]
        options = dict(row_ids=rows, tokenizer=Letters())
        given = rows, contexts, key, config
        out, turn = next_turn(model, params, turn, *given, **options)
        before = len(prefills)
        same(out, generate(model, params, contexts, key, config, **options))
        assert before == 2 + number  # those of `generate` so far, and the first turn's
    with pytest.raises(ValueError, match="does not begin with the .* tokens of row 0"):
        next_turn(model, params, turn, [0], [[1, 2, 3]], KEY, config, **options)
    for rows, contexts in ([2], [[1]]), ([-1], [[1]]), ([0], [[1], [2]]):
        with pytest.raises(ValueError, match=r"must be numbers of the turn's 2 rows, from 0 on"):
            next_turn(model, params, turn, rows, contexts, KEY, config, **options)


def test_a_row_that_ended_early_goes_on_where_it_ended():
    model, params = made(MODELS["window"])
    pad = lambda rows: map(jnp.asarray, left_pad(rows, model.config))
    prompts, more = [[5, 9, 4], [11], [3, 8, 8]], [[7, 8]] * 3
    keys = jax.random.split(KEY, 3)
    state = sampler.prefill(model, params, *pad(prompts), keys, 16 + 64)
    config = SamplingConfig(40, stop_ids=(4, 6, 9, 12, 20))
    state, part = sampler.decode(model, params, state, config)
    lengths = part.mask.sum(axis=1)
    assert lengths.min() + 2 < lengths.max()
    state = sampler.append(model, params, state, jnp.asarray(more), jnp.ones((3, 2), bool))
    answers = [row[seen].tolist() for row, seen in zip(*map(np.asarray, part[:2]), strict=True)]
    contexts = [a + b + c for a, b, c in zip(prompts, answers, more, strict=True)]
    whole = sampler.prefill(model, params, *pad(contexts), keys, 16 + 64)
    np.testing.assert_array_equal(state.position, whole.position)
    np.testing.assert_allclose(state.logits, whole.logits, rtol=1e-3, atol=1e-3)
