"""Sampling over meshes gives the tokens of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxft.generation import Beams, SamplingConfig, beam_search, generate, prefill
from jaxft.models import (
    Decoder,
    EncoderDecoder,
    EncoderDecoderConfig,
    Experts,
    StackConfig,
    family_of,
    tiny_config,
)
from jaxft.parallel import make_mesh, mesh_context, shard_params
from tests.small_models import start

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]


@functools.cache
def model_and_params():
    config = dataclasses.replace(tiny_config(vocab_size=32, max_length=128), windows=(6, None))
    model = Decoder(config)
    params = start(model)
    # Confident: rounding must not turn the order of two tokens.
    return model, jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)


def run(sizes, temperature):
    model, params = model_and_params()
    mesh = None if sizes is None else make_mesh(**sizes)
    params = params if mesh is None else shard_params(params, mesh)
    config = SamplingConfig(max_new_tokens=12, temperature=temperature)
    with mesh_context(mesh):
        return generate(model, params, PROMPTS, jax.random.key(1), config, samples=2)


@pytest.mark.parametrize(
    "sizes, temperature",
    [(dict(fsdp=8), 0.0), (dict(fsdp=4, tensor=2), 0.0), (dict(tensor=4, context=2), 0.8)],
    ids=["fsdp", "fsdp+tensor", "tensor+context, drawn"],
)
def test_tokens_are_those_of_one_device(sizes, temperature):
    """Greedy, and drawn: a draw depends on its row's key, not on the devices."""
    found, wanted = run(sizes, temperature), run(None, temperature)
    assert found.completions == wanted.completions
    assert len({tuple(row) for row in wanted.completions}) > 2
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-4)


MIXTURE = dataclasses.replace(
    tiny_config(vocab_size=32, max_length=128), experts=Experts(4, 2, 24), head_dim=8
)
ANSWERS = EncoderDecoderConfig(
    32, *[StackConfig(16, 24, 1, 4, 8, relative_buckets=8, relative_distance=12)] * 2,
    positions="relative", final_norm=True, start=0,
)  # fmt: skip


@pytest.mark.parametrize(
    "model, sizes",
    [
        (Decoder(MIXTURE), dict(expert=4, fsdp=2)),
        (EncoderDecoder(ANSWERS), dict(fsdp=4, tensor=2)),
    ],
    ids=["experts", "encoder-decoder"],
)
def test_one_prompt_on_many_devices(model, sizes):
    """The beams of one prompt, fewer than devices, with experts and with a source: those of one device."""
    family = family_of(model.config)
    params = jax.tree.map(lambda leaf: leaf * 9 if leaf.ndim > 1 else leaf, start(model))
    config = SamplingConfig(6, 0.0, no_repeat_ngram_size=2, stop_ids=(5,))
    search = lambda params: beam_search(
        model, params, PROMPTS[2:3], Beams(3, 0.7, num_return_sequences=2), config
    )
    wanted, mesh = search(params), make_mesh(**sizes)
    with mesh_context(mesh):
        found = search(shard_params(params, mesh, family.rules, family.layers))
    assert found.completions == wanted.completions and found.finish == wanted.finish
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)


def test_a_prompt_of_several_tiles_is_filled_in_as_on_one_device():
    config = dataclasses.replace(tiny_config(vocab_size=32), windows=(6, None))
    model, params = Decoder(config), model_and_params()[1]
    tokens = jax.random.randint(jax.random.key(2), (4, 200), 0, 32)
    valid = jax.numpy.arange(200)[None] >= jax.numpy.array([0, 3, 60, 150])[:, None]
    keys = jax.random.split(jax.random.key(0), 4)
    fill = lambda params: np.asarray(prefill(model, params, tokens, valid, keys, 210).logits)
    wanted, mesh = fill(params), make_mesh(fsdp=4, tensor=2)
    with mesh_context(mesh):
        found = fill(shard_params(params, mesh))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
