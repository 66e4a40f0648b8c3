"""Small models of several families, every leaf away from its start, for tests of what is added to them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import adapt, combine, partition
from jaxft.models import Decoder, DecoderConfig, Encoder, EncoderConfig, Heads, PerLayer

KEY = jax.random.key(0)
_SIZES = dict(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_length=48,
)
LLAMA = DecoderConfig(**_SIZES)
GEMMA = DecoderConfig(
    **_SIZES, windows=(4, None), post_norms=True, embedding_scale=4.0, attention_softcap=3.0
)
# Gemma 4's parts: heads that differ, layers that read the keys and values of others, per-layer inputs.
GEMMA4 = DecoderConfig(
    **_SIZES | dict(num_layers=4),
    windows=(5, None) * 2,
    full_heads=Heads(12, 1, tied=True),
    shared_layers=2,
    shared_width=40,
    value_norm=True,
    qk_norm=True,
    per_layer=PerLayer(_SIZES["vocab_size"], 6),
    layer_scales=True,
)
GPT2 = DecoderConfig(
    **_SIZES | dict(num_kv_heads=4),
    norm="layer",
    gated_mlp=False,
    activation="gelu_tanh",
    rope=None,
    learned_positions=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
)
BERT = EncoderConfig(16, 24, 2, 4, num_positions=32, vocab_size=29, token_types=2)
VIT = EncoderConfig(
    16, 24, 2, 4, num_positions=5, pre_norm=True, pooler=False, image_size=4, patch_size=2
)


def start(model):
    """Params distributed as `model.init` draws them. NumPy draws them: `init` takes seconds to compile."""
    shapes = jax.eval_shape(model.init, KEY, model.example_input())["params"]
    rng = np.random.default_rng(0)

    def draw(path, x):
        constant = {
            "scale": 1.0 - getattr(model.config, "norm_offset", 0.0),
            "bias": 0.0,
            "layer_scale": 1.0,
        }
        middle = constant.get(path[-1].key, 0.0)
        deviation = 0.0 if path[-1].key in constant else 0.02
        return jnp.asarray(rng.normal(middle, deviation, x.shape).astype(x.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def base(config):
    """A model and its params, the caller's to change."""
    model, params = _initial(config)
    return model, jax.tree.map(lambda x: x, params)


@jax.jit
def large(params):
    """Every leaf moved, so that each part of a model shows in what it gives."""
    leaves, tree = jax.tree.flatten(params)
    ends = list(itertools.accumulate(x.size for x in leaves))
    # One draw for all: the compiler writes each out at length.
    parts = jnp.split(0.3 * jax.random.normal(jax.random.key(7), (ends[-1],)), ends[:-1])
    return tree.unflatten([x + n.reshape(x.shape) for x, n in zip(leaves, parts, strict=True)])


def trained(adapted):
    """Moves all trainable leaves, as training does. NumPy draws: each structure would be one more program."""
    trainable, frozen = partition(adapted)
    rng = np.random.default_rng(7)
    move = lambda x: jnp.asarray(np.asarray(x) + (0.3 * rng.normal(size=x.shape)).astype(x.dtype))
    return combine(jax.tree.map(move, trainable), frozen)


def adapted(params, rules, **options):
    """`adapt` as one program: its operations one by one take longer to compile."""
    return jax.jit(lambda params: adapt(KEY, params, rules, **options))(params)


def hidden(model, params, *args, **options):
    return jitted(model)({"params": params}, *args, **options).hidden


@functools.cache
def jitted(model):
    """`model.apply`, compiled once for all tests of a process."""
    return jax.jit(model.apply)


@functools.cache
def forward_of(model, read=None):
    """`model.forward` of tokens and params (or `read(params)`), traced once for all calls of the same shapes.

    Objectives and estimators call it up to twenty times: tracing it each time takes most of a test's time.
    """

    @jax.jit
    def run(params, batch, key, offset):
        noise = None if offset is None else lambda x: x + offset
        params = params if read is None else read(params)
        return model.forward(params, batch, key, noise=noise)

    def forward(params, batch, key=None, noise=None):
        batch = {name: batch.get(name) for name in ("tokens", "positions", "segment_ids")}
        # What is added to embeddings, whatever they are: a function cannot go into a jit.
        zeros = jnp.zeros((*batch["tokens"].shape, model.config.hidden_size))
        return run(params, batch, key, noise and noise(zeros))

    return forward


@functools.cache
def _initial(config):
    model = (Encoder if isinstance(config, EncoderConfig) else Decoder)(config)
    rng = np.random.default_rng(1)
    move = lambda x: x + rng.normal(0, 0.3, x.shape).astype(x.dtype)
    return model, jax.tree.map(lambda x: jnp.asarray(move(np.asarray(x))), start(model))
