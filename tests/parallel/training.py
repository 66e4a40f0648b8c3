"""A tiny model of each family, and three steps of training it over a mesh or on one device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import combine, partition
from jaxft.metrics import Mean
from jaxft.models import Decoder, Encoder, config_of, mean_pool
from jaxft.objectives import supervised
from jaxft.parallel import mesh_context, shard_params
from jaxft.train import commit
from jaxft.train.batches import place_batch

ROWS, LENGTH, VOCABULARY = 8, 24, 96
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
_GEMMA = dict(sliding_window=7, layer_types=["sliding_attention", "full_attention"])
DECODERS = {
    "llama": dict(rope_theta=5e5, tie_word_embeddings=False),
    "smollm2": dict(model_type="llama", rope_theta=1e5, tie_word_embeddings=True),
    "mistral": dict(sliding_window=5, tie_word_embeddings=False),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(tie_word_embeddings=False),
    "gemma": {},
    "gemma2": dict(
        query_pre_attn_scalar=9, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, **_GEMMA
    ),
    "gemma3": dict(model_type="gemma3_text", rope_theta=1e6, query_pre_attn_scalar=9, **_GEMMA),
    "qwen3_5": dict(
        model_type="qwen3_5_text", layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        rms_norm_eps=0.01,  # norms of short vectors would magnify rounding
    ),
    "gemma4": dict(
        model_type="gemma4_text", num_hidden_layers=3, num_kv_shared_layers=1, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "full_attention"], global_head_dim=32,
        attention_k_eq_v=True, num_global_key_value_heads=1, use_double_wide_mlp=True,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, rms_norm_eps=0.01,
    ),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip
_ENCODER = _SIZES | dict(type_vocab_size=2)
ENCODERS = {
    "bert": dict(model_type="bert"),
    "roberta": dict(model_type="roberta", pad_token_id=1),
    "minilm": dict(model_type="bert", num_attention_heads=8),  # its heads are narrow
    "vit": dict(model_type="vit", image_size=16, patch_size=4),
}


class Steps(NamedTuple):
    """Results of three steps of gradient descent."""

    losses: np.ndarray  # [3]
    gradients: dict[str, np.ndarray]  # [3, ...] by path


def three_steps(model, params, objective, batch, mesh=None) -> Steps:
    """Runs one program, with the mesh in context as in `fit`."""
    placed = params if mesh is None else shard_params(params, mesh)

    def run(params, batch):
        trainable, frozen = partition(params)
        loss = lambda t: objective(commit(combine(t, frozen)), batch, None)[0]

        def body(t, _):
            value, gradients = jax.value_and_grad(loss)(t)
            return jax.tree.map(lambda p, g: p - 0.1 * g, t, gradients), (value, gradients)

        return jax.lax.scan(body, trainable, length=3)[1]

    with mesh_context(mesh):
        # A third of the time to compile.
        run = jax.jit(run, compiler_options={"xla_cpu_use_fusion_emitters": False})
        losses, gradients = jax.device_get(run(placed, place_batch(batch, mesh)))
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return Steps(losses, {jax.tree_util.keystr(path): leaf for path, leaf in leaves})


def assert_equal(found: Steps, wanted: Steps) -> None:
    """Losses to rounding; gradients within 2e-5 of each leaf's, and 1e-6 of the largest, norm."""
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-6)
    assert wanted.losses[2] < wanted.losses[0]
    norm = lambda leaf: np.linalg.norm(leaf.reshape(3, -1), axis=1)
    largest = max(norm(leaf).max() for leaf in wanted.gradients.values())
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, leaf in wanted.gradients.items():
        bound = 2e-5 * norm(leaf) + 1e-6 * largest
        assert (norm(found.gradients[name] - leaf) <= bound).all(), name


@functools.cache
def family(name):
    """(model, params, objective, batch) of a family; layers stacked if alike, which compiles sooner."""
    if name in DECODERS:
        config = config_of(dict(model_type=name) | _SIZES | DECODERS[name])
        model = Decoder(config, scan_layers=config.stackable)
        params = _params(model)
        if (
            name == "gemma4"
        ):  # Scores are not scaled: with norms of 1, rounding grows tenfold each step.
            small = lambda path, x: 0.1 * x if path[-2].key in ("query_norm", "key_norm") else x
            params = jax.tree_util.tree_map_with_path(small, params)
        return model, params, supervised(model.forward, chunk=8), packed_batch()
    names = {"pooler.dense.weight"} if name in ("bert", "roberta") else set()
    model = Encoder(config_of(_ENCODER | ENCODERS[name], names), scan_layers=True)
    return model, _params(model), _encoder_objective(model), _encoder_batch(model)


def packed_batch(rows=ROWS, length=LENGTH):
    """Rows of segments of unlike lengths that end at unlike places, and some padding."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.permuted(np.tile(np.arange(1, length), (rows, 1)), axis=1)[:, :3], axis=1)
    column = np.arange(length)
    segments = (column[None, :, None] >= ends[:, None]).sum(-1)  # 0..3
    starts = np.pad(ends, ((0, 0), (1, 0)))
    positions = column[None] - np.take_along_axis(starts, segments, axis=1)
    segments = np.where((segments == 3) & (column >= length - 4)[None], 0, segments + 1)
    return {
        "tokens": rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32),
        "loss_mask": (rng.random((rows, length)) < 0.7).astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


def _params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]
    rng = np.random.default_rng(1)
    # Biases and scales too: at init many hide mistakes by being 0 or 1.
    offset = getattr(model.config, "norm_offset", 0)
    # Short queries and keys, which a Gated DeltaNet makes as long as others, would magnify rounding.
    middles = {"scale": 1 - offset, "convolution": 1.0}
    middle = lambda path: middles.get(path[-1].key, 0.0)
    draw = lambda path, x: rng.normal(middle(path), 0.15, x.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def _encoder_objective(model):
    def objective(params, batch, key):
        segments = batch.get("segment_ids")
        output = model.apply({"params": params}, batch["inputs"], segments)
        pooled = mean_pool(output.hidden, segments) if output.pooled is None else output.pooled
        errors = jnp.mean((pooled - batch["targets"]) ** 2, axis=1)
        loss = Mean(jnp.sum(errors), jnp.asarray(float(len(errors))))
        return loss.value, {"loss": jax.lax.stop_gradient(loss)}

    return objective


def _encoder_batch(model):
    rng, config = np.random.default_rng(0), model.config
    batch = {"targets": rng.normal(size=(ROWS, config.hidden_size)).astype(np.float32)}
    if config.patch_size:
        shape = (ROWS, config.image_size, config.image_size, config.channels)
        return batch | {"inputs": rng.normal(size=shape).astype(np.float32)}
    ends = rng.integers(3, LENGTH + 1, (ROWS, 1))
    segments = (np.arange(LENGTH)[None] < ends).astype(np.int32)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    return batch | {"inputs": tokens, "segment_ids": segments}
