"""Turns: answers that go on in the cache are those of a new prefill of the whole context."""

import jax
import pytest

from jaxft.generation import SamplingConfig, generate, sampler
from jaxft.generation.turns import first_turn, next_turn
from tests.generation.test_continuous import KEY, MODELS, Letters, made, same


def test_turns_are_those_of_a_new_prefill(monkeypatch):
    """Rows pause while others go on, end by tokens, strings or length, and leave; some add nothing."""
    model, params = made(MODELS["window"])
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
