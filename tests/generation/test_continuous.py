"""Continuous batching: every answer is that of a padded batch, wherever and whenever it is decoded."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxft.generation import SamplingConfig, continuous, generate, generate_continuously
from jaxft.models import DecoderConfig, Delta, Latent
from jaxft.models.cache import empty_cache
from jaxft.models.encoder_decoder import SourceCache
from tests.small_models import GEMMA4, LLAMA, base, large

KEY = jax.random.key(5)
LIMITS = [3, 40, 1, 37, 40, 9, 40]
LATENT = Latent(rank=6, query_rank=8, plain=6, turned=4, value=6)
DELTA = Delta(layers=(0,), key_heads=2, value_heads=4, key_size=6, value_size=5, taps=3)
MODELS = {
    "delta": dataclasses.replace(LLAMA, gated_attention=True, delta=DELTA, max_length=96),
    "window": dataclasses.replace(LLAMA, windows=(5, None), max_length=96),
    "latent": dataclasses.replace(LLAMA, head_dim=4, latent=LATENT, max_length=96),
    "shared": dataclasses.replace(GEMMA4, per_layer=None, max_length=96),
}


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids):
        """The ids as letters, from A on."""
        return "".join(chr(ord("A") + i) for i in ids)


def made(config: DecoderConfig):
    """A model and params, with virtual tokens in front of each row if it takes them."""
    model, params = base(config)
    params = large(params)
    if config.delta is not None:
        return model, params
    return model, params | {"prompt": params["embed"]["embedding"][:3]}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 29, n).tolist() for n in (2, 30, 5, 1, 17, 9, 24)]


@pytest.fixture(scope="module")
def model_and_params():
    return made(MODELS["window"])


def same(got, wanted):
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.mask, wanted.mask)
    assert got.finish == wanted.finish
    for name in ("log_probs", "sampler_log_probs"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), atol=1e-4)


@pytest.mark.parametrize("variant", MODELS)
def test_answers_are_those_of_a_padded_batch(variant, prompts):
    """With every rule that counts tokens or looks back; the ring's slots are written more than once."""
    model, params = made(MODELS[variant])
    config = SamplingConfig(
        40, 0.8, top_k=12, repetition_penalty=1.2, min_new_tokens=12, stop_ids=(4,), forced_end=7
    )
    shared = dict(limits=LIMITS, samples=2)
    give = lambda f, **settings: f(model, params, prompts, KEY, config, **shared, **settings)
    wanted = give(generate)
    assert 1 < wanted.finish.count("stop") < 12
    looks = []
    got = give(generate_continuously, places=2, chunk=7, progress=lambda *at: looks.append(at))
    same(got, wanted)
    assert looks[-1] == (14, 14)
    assert got.mask.sum() > 2 * 64  # slots for new tokens, in two places


def test_neither_order_nor_places_change_an_answer(model_and_params, prompts):
    """Samples of a prompt share its prefill; places are fewer than samples, or more than answers."""
    model, params = model_and_params
    config = SamplingConfig(24, stop_ids=(4,))
    run = functools.partial(generate_continuously, model, params)
    wanted = generate(model, params, prompts[:3], KEY, config, samples=3)
    assert len({len(ids) for ids in wanted.completions}) > 3
    prefills = []
    count = lambda *given: prefills.append(given) or prefill(*given)
    prefill, continuous.prefill = continuous.prefill, count
    try:
        same(run(prompts[:3], KEY, config, samples=3, places=2), wanted)
    finally:
        continuous.prefill = prefill
    assert len(prefills) == 3
    back = run(prompts[2::-1], KEY, config, samples=3, places=16, row_ids=[2, 1, 0], chunk=5)
    order = [6, 7, 8, 3, 4, 5, 0, 1, 2]
    assert back.completions == [wanted.completions[i] for i in order]


def test_stop_strings_end_an_answer_and_free_its_place(model_and_params, prompts):
    model, params = model_and_params
    free = generate(model, params, prompts, KEY, SamplingConfig(24))
    strings = tuple(
        Letters().decode(ids)[i : i + 2]
        for ids, i in zip(free.completions[::2], (3, 6, 9, 12), strict=True)
    )
    config = SamplingConfig(24, stop_strings=strings)
    wanted = generate(model, params, prompts, KEY, config, tokenizer=Letters())
    assert wanted.finish.count("stop") >= 4
    run = functools.partial(generate_continuously, model, params, prompts, KEY, config)
    same(run(tokenizer=Letters(), places=2, chunk=4), wanted)


def test_bad_requests_are_explained(model_and_params):
    model, params = model_and_params
    run = functools.partial(generate_continuously, model, params)
    config = SamplingConfig(8)
    for settings, message in (
        (dict(places=0), "places must be a whole number of at least 1, got 0"),
        (dict(places=2.5), "places must be a whole number of at least 1, got 2.5"),
        (dict(chunk=0), "chunk must be a whole number of at least 1, got 0"),
        (dict(row_ids=[3, 4]), r"row_ids must be one id for each of 1 rows, got \(2,\)"),
        (dict(limits=[0]), "limits must lie in 1..max_new_tokens=8, got 0..0; leave out prompts"),
        (dict(samples=0), "samples must be at least 1"),
        (dict(limits=[9]), r"limits must lie in 1..max_new_tokens=8, got 9..9"),
        (dict(limits=[4, 4]), "one number of tokens for each of 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            run([[1, 2]], KEY, config, **settings)
    with pytest.raises(ValueError, match="at least one token"):
        run([[1], []], KEY, config)
    with pytest.raises(ValueError, match="exceed the model's 96"):
        run([[1], [2] * 90], KEY, config)
    with pytest.raises(
        ValueError, match="Sentences has a SourceCache, whose rows cannot begin one"
    ):
        generate_continuously(Sentences(), params, [[1]], KEY, config)


class Sentences:
    """An encoder-decoder, as far as it is asked."""

    config = LLAMA

    def init_cache(self, rows, length, dtype=None):
        return SourceCache(empty_cache([(1, 2)], rows, length))
