"""Rotary positions whose frequencies depend on the length of the text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.checkpoints import CheckpointError
from jaxft.models import Decoder, config_of
from jaxft.models.config import tiny_config
from jaxft.models.gguf import write_gguf_decoder
from jaxft.models.rope import rope_frequencies, rope_table, text_lengths

SIZES = dict(
    vocab_size=37, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
SHORT, LONG = [1.0, 1.2, 1.5], [2.0, 4.0, 8.0]
FILES = {
    "dynamic": dict(
        model_type="llama", max_position_embeddings=16, rope_scaling=dict(rope_type="dynamic", factor=3.0)
    ),
    "longrope": dict(
        model_type="phi3", max_position_embeddings=64, original_max_position_embeddings=16,
        partial_rotary_factor=0.75,
        rope_scaling=dict(rope_type="longrope", short_factor=SHORT, long_factor=LONG),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_tables_are_those_of_transformers_on_both_sides_of_the_original_length(name):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file = SIZES | FILES[name]
    config = config_of(file)
    kind = "LlamaRotaryEmbedding" if name == "dynamic" else "Phi3RotaryEmbedding"
    module = getattr(getattr(hf.models, file["model_type"]), f"modeling_{file['model_type']}")
    for length in (9, 16, 17, 40):
        rotary = getattr(module, kind)(
            hf.CONFIG_MAPPING[file["model_type"]].from_dict(json.loads(json.dumps(file)))
        )
        expected = rotary(torch.zeros(1), torch.arange(length)[None])
        positions = jnp.arange(length)[None]
        found = rope_table(config.rope, 8, positions, text_lengths(positions, None))
        of_all = rope_table(config.rope, 8, positions, length)  # as in a cache of that many slots
        for ours, same, theirs in zip(found, of_all, expected, strict=True):
            theirs = theirs[0, :, : ours.shape[-1]].numpy()
            np.testing.assert_allclose(ours[0, :, 0], theirs, rtol=0, atol=1e-5)
            np.testing.assert_allclose(ours, same, rtol=0, atol=1e-5)
    assert config.max_length == (48 if name == "dynamic" else 64)


def test_a_text_has_the_length_of_its_segment():
    ids = jnp.array([[7, 7, 7, 2, 2, 0, 0, 0], [0, 0, 3, 3, 3, 3, 0, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 0, 1, 2, 3, 0, 0]])
    lengths = [[3, 3, 3, 2, 2, 1, 1, 1], [1, 1, 4, 4, 4, 4, 1, 1]]
    np.testing.assert_array_equal(text_lengths(positions, ids), lengths)
    np.testing.assert_array_equal(text_lengths(positions, None)[:, 0], [3, 4])


@pytest.mark.parametrize("name", FILES)
def test_packed_texts_and_a_cache_are_as_one_text(name):
    rope = dataclasses.replace(config_of(SIZES | FILES[name]).rope, original_max_length=6)
    config = dataclasses.replace(tiny_config(37), num_layers=1, head_dim=8, rope=rope)
    model = Decoder(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, params)
    run = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    long, short = np.arange(11) % 7 + 3, np.arange(5) % 3 + 9
    alone = [run(text[None]).logits[0] for text in (long, short)]
    tokens, ids = np.concatenate([long, short]), np.repeat([1, 2], [len(long), len(short)])
    positions = np.concatenate([np.arange(len(long)), np.arange(len(short))])
    packed = run(tokens[None], positions[None], ids[None]).logits[0]
    np.testing.assert_allclose(packed, np.concatenate(alone), rtol=0, atol=1e-4)
    rope = dataclasses.replace(rope, original_max_length=99)
    plain = Decoder(dataclasses.replace(config, rope=rope))
    other = jax.jit(lambda tokens: plain.apply({"params": params}, tokens).logits[0])(long[None])
    assert np.abs(other - alone[0]).max() > 0.01  # the frequencies matter
    cache, parts = model.init_cache(1, len(long)), []
    for at in np.split(np.arange(len(long)), [4]):  # the first already have the last's frequencies
        output = run(long[None, at], at[None], None, cache)
        cache, parts = output.cache, [*parts, output.logits[0]]
    np.testing.assert_allclose(np.concatenate(parts), alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("longrope", {"short_factor": [1.0, 2.0]}, "short_factor has 2 numbers, expected 3"),
        (
            "longrope",
            {"long_factor": None},
            "long_factor: None, expected a list of positive numbers",
        ),
        ("longrope", {"rope_type": "linear", "factor": 2.0}, "'linear' is not one of phi3's"),
        ("dynamic", {"factor": 0.5}, "factor: 0.5, expected 1 or more"),
    ],
)
def test_scalings_that_cannot_be_computed_are_refused(name, change, message):
    file = SIZES | FILES[name]
    with pytest.raises(CheckpointError, match=message):
        config_of(file | {"rope_scaling": file["rope_scaling"] | change})


@pytest.mark.parametrize("name", FILES)
def test_gguf_files_do_not_hold_them(name):
    with pytest.raises(CheckpointError, match="GGUF files with rotary scaling .* are not written"):
        write_gguf_decoder(config_of(SIZES | FILES[name]))


def test_a_part_of_a_head_turns():
    rope = config_of(SIZES | FILES["longrope"]).rope
    assert len(rope_frequencies(rope, 8)) == 3


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_phi3_knows_older_names_of_longrope(old):
    file = SIZES | FILES["longrope"]
    scaling = {k: v for k, v in file["rope_scaling"].items() if k != "rope_type"} | {"type": old}
    assert config_of(file | {"rope_scaling": scaling}) == config_of(file)
