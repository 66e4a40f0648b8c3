"""What "lean" keeps: nothing that is cheap to compute again, in decoders and encoders."""

import collections
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax._src.ad_checkpoint import saved_residuals

from jaxft.models import Decoder, Encoder, EncoderConfig, tiny_config
from tests.small_models import start

KEY = jax.random.key(0)
RULES = ("none", "lean")
TOKENS = jax.random.randint(KEY, (2, 20), 0, 50)
DECODER = dataclasses.replace(tiny_config(50), qk_norm=True, post_norms=True)
BERT = EncoderConfig(96, 256, 2, 4, num_positions=20, vocab_size=50)
VIT = EncoderConfig(
    96, 256, 2, 4, num_positions=17, pre_norm=True, image_size=16, patch_size=4, family="vit"
)
IMAGES = jax.random.normal(KEY, (2, 16, 16, 3))
MODELS = {
    "decoder": (Decoder, DECODER, TOKENS),
    "windows": (Decoder, dataclasses.replace(DECODER, windows=(8, 8)), TOKENS),
    "bert": (Encoder, BERT, TOKENS),
    "vit": (Encoder, VIT, IMAGES),
}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]


@functools.cache
def initial(module, config, scan_layers):
    made = module(config, scan_layers=scan_layers)
    return start(made)


def build(model, remat, scan_layers=False):
    module, config, inputs = model
    made = module(config, remat=remat, scan_layers=scan_layers)
    params = initial(module, config, scan_layers)
    return params, lambda p: jnp.mean(jnp.sin(made.apply({"params": p}, inputs).hidden))


@pytest.mark.parametrize("name", ["bert", "vit"])  # decoders: tests/models/test_decoder.py
def test_lean_changes_no_gradient(name):
    grads = [jax.jit(jax.grad(f))(p) for p, f in (build(MODELS[name], r, True) for r in RULES)]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-6)


def test_lean_keeps_no_scores_and_only_the_inputs_of_activations(model):
    kept = {}
    for remat in RULES:
        params, loss = build(model, remat)
        kept[remat] = collections.Counter(
            tuple(aval.shape)
            for aval, where in saved_residuals(loss, params)
            if "from the argument" not in where
        )
    _, config, inputs = model
    tokens = 17 if inputs.ndim == 4 else 20
    scores = lambda shapes: [s for s in shapes if s[-2:] == (tokens, tokens)]
    assert scores(kept["none"]) and not scores(kept["lean"])
    # The inputs of the activation, gate and up or up alone; its result is kept for `down`.
    wide = lambda counts: sum(n for s, n in counts.items() if s[-1:] == (config.intermediate_size,))
    inputs_of_activation = 2 if model[0] is Decoder else 1
    assert wide(kept["none"]) > wide(kept["lean"]) == (inputs_of_activation + 1) * config.num_layers
