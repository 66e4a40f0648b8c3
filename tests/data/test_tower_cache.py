"""Batches with the outputs of a frozen tower, against the tower inside of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import data
from jaxft.adapters import adapt, lora, partition
from jaxft.checkpoints.tiny import byte_tokenizer
from jaxft.data.grid_images import GridImages
from jaxft.data.images import Pixels
from jaxft.models import Decoder, config_of, family_of
from jaxft.objectives import supervised
from tests import vision_models
from tests.parallel.training import MEDIA
from tests.small_models import large, start

SIZES = [(16, 8), (8, 8), (24, 16)]


def model_and_records(name):
    """(model, params with LoRA in the text part, rendered records with images or clips)."""
    tokenizer = vision_models.tokenizer("qwen2_5_vl")
    reader, kind = GridImages(4, 2, 2, 1, 1 << 20, Pixels(3)), "image"
    shown = [vision_models.image(i, *size) for i, size in enumerate(SIZES)]
    if name != "qwen2_5_vl":
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|AUDIO|>"]})
        features = data.LogMel(mel=4, rate=3200, hop=100, window=200, seconds=1)
        reader, kind = (
            data.ClipReader(
                features,
                "audio",
                placeholder="<|AUDIO|>",
                token="<|AUDIO|>",
                lengths="audio_frames",
            ),
            "audio",
        )
        tone = lambda n: np.sin(np.arange(n, dtype=np.float32))
        shown = [{"array": tone(n), "sampling_rate": 3200} for n in (3200, 1300, 2100)]
    token = tokenizer.convert_tokens_to_ids(reader.placeholder)
    file = MEDIA[name] | {key: token for key in MEDIA[name] if "_token_" in key}
    file["text_config"] = file["text_config"] | {"vocab_size": 300}
    model = Decoder(config_of(file))
    params = jax.jit(large)(start(model))
    pattern = family_of(model.config).targets.pattern("language")
    params = adapt(jax.random.key(0), params, {pattern: lora(2)})
    marker = f"<{kind}>"
    rows = [
        {"prompt": marker, "completion": "a", f"{kind}s": [shown[0]]},
        {"prompt": f"{marker}b{marker}", "completion": "c", f"{kind}s": shown[1:]},
        {"prompt": marker, "completion": "d", f"{kind}s": [shown[0]]},
        {"prompt": "e", "completion": "f"},
    ]
    records = [data.place_media(row) for row in rows]
    return model, params, data.render(records, data.Renderer(tokenizer, media=[reader]), 64)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_audio, pairs"])
def test_losses_and_gradients_are_those_of_the_model_with_its_tower(name, tmp_path):
    model, params, records = model_and_records(name)
    loss = lambda params, batch: supervised(model.forward)(params, batch, None)[0]
    run = jax.jit(jax.value_and_grad(loss, allow_int=True))
    (tower,) = model.config.towers
    batch_of = lambda parts: data.finite_batches(parts, batch_size=4, max_length=64)[0]
    plain = batch_of(records)
    wanted, gradients = run(params, plain)
    for folder in (None, tmp_path / "cache"):
        (parts,) = data.cache_tower(model, params, [records], folder)
        batch = batch_of(parts)
        assert f"{tower.name}_embeddings" in batch and tower.columns[0] not in batch
        found, given = run(params, batch)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        ours, theirs = partition(given)[0], partition(gradients)[0]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6), ours, theirs
        )
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 3
    data.cache_tower(model, params, [records], tmp_path / "cache")
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    moved = params | {tower.name: jax.tree.map(lambda x: x * 1.5, params[tower.name])}
    (parts,) = data.cache_tower(model, moved, [records], tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 6
    assert jnp.abs(run(moved, batch_of(parts))[0] - run(moved, plain)[0]) < 1e-5


def test_a_tower_that_changes_is_refused():
    model, params, records = model_and_records("qwen2_5_vl")
    plain = jax.tree.map(jnp.asarray, start(model))
    pattern = family_of(model.config).targets.pattern("vision")
    for wrong in (plain, adapt(jax.random.key(0), plain, {pattern: lora(2)})):
        with pytest.raises(ValueError, match="vision/.* trains, so that its outputs change"):
            data.cache_tower(model, wrong, [records])
