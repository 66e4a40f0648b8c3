"""Sampling over meshes gives the tokens of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxft.generation import SamplingConfig, generate, prefill
from jaxft.models import Decoder, tiny_config
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
