"""A tiny model of each family, and three steps of training it over a mesh or on one device."""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import combine, partition
from jaxft.data.grid_images import GridImages
from jaxft.data.images import Pixels
from jaxft.data.media import Media
from jaxft.data.media_rows import Shown, media_columns
from jaxft.losses import dpo_loss, nll_loss
from jaxft.metrics import Mean
from jaxft.models import Decoder, Encoder, config_of, mean_pool
from jaxft.models.sound import embeddings_of
from jaxft.objectives import preference, supervised
from jaxft.parallel import mesh_context, shard_params
from jaxft.train import accumulate, commit
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

_TEXT = _SIZES | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8)
_TEXT |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
_IMAGES = dict(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, window_size=16, out_hidden_size=32, fullatt_block_indexes=[1],
)  # fmt: skip
_SQUARES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
    patch_size=4,
)  # fmt: skip
_SOUND = dict(
    d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=4,
    max_source_positions=16,
)  # fmt: skip
MEDIA = {
    "qwen2_5_vl": dict(
        model_type="qwen2_5_vl", text_config=_TEXT, vision_config=_IMAGES, image_token_id=3
    ),
    "smolvlm, pairs": dict(
        model_type="smolvlm", text_config=_TEXT | dict(model_type="llama", rope_parameters=None),
        vision_config=_SQUARES, image_token_id=3, scale_factor=2,
    ),
    "qwen2_audio, pairs": dict(
        model_type="qwen2_audio", audio_config=_SOUND, audio_token_index=3,
        text_config=_TEXT | dict(model_type="qwen2", rope_parameters=None),
    ),
}  # fmt: skip


class Steps(NamedTuple):
    """Results of three steps of gradient descent."""

    losses: np.ndarray  # [3]
    gradients: dict[str, np.ndarray]  # [3, ...] by path


def three_steps(model, params, objective, batch, mesh=None, microbatches=1) -> Steps:
    """Runs one program, with the mesh in context as in `fit`."""
    placed = params if mesh is None else shard_params(params, mesh)

    def run(params, batch):
        trainable, frozen = partition(params)
        loss = lambda t, batch, key: objective(commit(combine(t, frozen)), batch, key)
        gradient = accumulate(jax.value_and_grad, microbatches)(loss, has_aux=True)

        def body(t, _):
            (value, _), gradients = gradient(t, batch, jax.random.key(0))
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
    if name in MEDIA:
        model = Decoder(config_of(MEDIA[name]), scan_layers=True)
        pairs = name.endswith("pairs")
        # Each holds a likelihood, the second a preference too.
        loss = lambda pairs: dpo_loss(pairs, beta=0.3) + nll_loss(pairs)
        objective = preference(model.forward, loss) if pairs else supervised(model.forward)
        return model, _params(model), objective, media_batch(model.config, pairs)
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


def media_batch(config, pairs, rows=ROWS, length=LENGTH):
    """Rows with images of unlike sizes, or clips of unlike lengths, none to two; or pairs of them."""
    rng, (tower,) = np.random.default_rng(0), config.towers
    shown = [[Shown(i, _reader(tower, rng)) for i in range(n % 3)] for n in range(rows)]
    columns = media_columns(shown, shown[2])
    counts = np.array([sum(one.reader.embeddings for one in row) for row in shown])
    place = np.arange(length)
    seen = place < rng.integers(counts + 5, length + 1)[:, None]
    token = (place >= 1) & (place <= counts[:, None])
    answer = seen & (place > counts[:, None] + 2)
    tokens = rng.integers(tower.token + 1, VOCABULARY, (rows, length))
    batch = {
        "tokens": np.where(token, tower.token, tokens).astype(np.int32),
        "loss_mask": answer.astype(np.float32),
        "segment_ids": seen.astype(np.int32),
    }
    if pairs:
        other = np.where(answer, np.roll(batch["tokens"], 1, axis=0) | 4, batch["tokens"])
        batch = {name: np.stack([x, x], axis=1) for name, x in batch.items()}
        batch["tokens"][:, 1] = other
        batch["ref_log_probs"] = rng.normal(-12, 1, (rows, 2)).astype(np.float32)
    return batch | columns


def _reader(tower, rng):
    """A random image or clip of a tower, as its own reader."""
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    if tower.columns == ("images",):
        side, count = tower.encoder.image_size, tower.tokens
        shapes, arrays = {"images": (side, side, 3)}, {"images": draw(1, side, side, 3)}
    elif tower.columns == ("audio", "audio_frames"):
        frames = int(rng.integers(8, 2 * tower.places + 1))
        count, shapes = embeddings_of(frames), {"audio": (32, tower.mel), "audio_frames": ()}
        arrays = {"audio": draw(1, 32, tower.mel), "audio_frames": np.array([frames], np.int32)}
    else:
        reader = GridImages(tower.patch_size, tower.merge, 2, 1, 1 << 20, Pixels(3))
        picture = rng.integers(0, 256, (8 * rng.integers(1, 4), 8 * rng.integers(1, 4), 3))
        arrays, shapes = reader.arrays(Media("image", picture)), reader.shapes
        count = len(arrays["patches"])
    return types.SimpleNamespace(shapes=shapes, arrays=lambda _: arrays, embeddings=count)


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
