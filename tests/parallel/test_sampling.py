"""Sampling over meshes gives the tokens of one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxft.generation import SamplingConfig, generate
from jaxft.models import Decoder, tiny_config
from jaxft.parallel import make_mesh, mesh_context, shard_params

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]


@functools.cache
def model_and_params():
    config = dataclasses.replace(tiny_config(vocab_size=32, max_length=128), windows=(6, None))
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), model.example_input())["params"]
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
