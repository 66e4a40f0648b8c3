"""No sampler writes the token that stands for an image; episodes of prompts with images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.generation import Beams, SamplingConfig, beam_search, generate, generate_continuously
from jaxft.models import Decoder, config_of
from jaxft.objectives import completion_log_probs
from tests.rl.rl_task import Digits
from tests.small_models import large, start

IMAGE = 5
FILE = dict(
    model_type="smolvlm", image_token_id=IMAGE, scale_factor=1,
    text_config=dict(
        model_type="llama", vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    ),
    vision_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4,
        patch_size=2,
    ),
)  # fmt: skip
MODEL = Decoder(config_of(FILE))
PARAMS = jax.jit(large)(start(MODEL))
PROMPTS = [[1, IMAGE, IMAGE, IMAGE, IMAGE, 2], [3, IMAGE, IMAGE, IMAGE, IMAGE]]
IMAGES = {"images": np.random.default_rng(0).normal(size=(2, 1, 4, 4, 3)).astype(np.float32)}
KEY, HOT = jax.random.key(0), SamplingConfig(6, temperature=5.0)


def test_no_sampler_writes_the_token_of_an_image():
    """Every other one of 8 equally likely ids occurs in a hundred tokens."""
    for sampler in (generate, functools.partial(generate_continuously, places=16)):
        out = sampler(MODEL, PARAMS, PROMPTS, KEY, HOT, samples=8, columns=IMAGES)
        assert set(np.unique(out.tokens)) == {*range(8)} - {IMAGE}
        assert np.isfinite(out.log_probs).all()
    beams = SamplingConfig(2, temperature=0.0)
    found = beam_search(
        MODEL, PARAMS, PROMPTS, Beams(8, num_return_sequences=8), beams, columns=IMAGES
    )
    assert IMAGE not in np.unique(found.tokens) and len(np.unique(found.tokens)) > 4


def test_an_update_sees_an_episode_with_an_image_as_its_sampler_did():
    """Log-probs of both turns, in the cache and by one forward of whole rows, agree."""
    reply = lambda states, actions: [(state, rl.Reply(1.0, "12")) for state in states]
    env = rl.Environment(list, reply, 2)
    given = dict(next_turn=lambda text: [6, *map(int, text), 7])
    sample = rl.episodes(MODEL, Digits(), env, SamplingConfig(16, stop_ids=(4,)), 4, **given)
    batch = sample(PARAMS, rl.Asked(PROMPTS, [{}, {}], columns=IMAGES), KEY)
    assert (batch["turns"] == 2).any() and batch["images"].shape == (8, 1, 4, 4, 3)
    wrote = batch["completion_mask"]
    assert IMAGE not in batch["tokens"][:, -wrote.shape[1] :][wrote]
    batch = jax.tree.map(jnp.asarray, batch)
    now = jax.jit(lambda b: completion_log_probs(MODEL.forward, PARAMS, b))
    np.testing.assert_allclose(
        now(batch)[wrote], batch["sampler_log_probs"][wrote], rtol=0, atol=2e-5
    )
    other = now(batch | {"images": batch["images"][::-1]})
    assert np.abs(other - batch["sampler_log_probs"])[wrote].max() > 0.01


def test_samplers_that_show_no_images_refuse_them():
    asked = rl.Asked(PROMPTS, [{}, {}], columns=IMAGES)
    guided = rl.guided_answers(MODEL, None, None, None, lambda *_: True, size=4)
    with pytest.raises(ValueError, match=r"guided_answers: .* columns \['images'\]"):
        guided(PARAMS, asked, KEY)
    sampled = rl.sampled_chances(MODEL, None, [6], SamplingConfig(4), 2)
    for name, chances in ("exact", rl.exact_chances(MODEL, [6])), ("sampled", sampled):
        with pytest.raises(ValueError, match=f"{name}_chances: the prompts have the columns"):
            chances(IMAGES, np.zeros((2, 1)), PARAMS, KEY)
