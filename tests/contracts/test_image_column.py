"""A decoder that reads images, made outside of jaxft: `supervised` and GRPO train it as they are."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import rl
from jaxft.adapters import adapt, full, lora
from jaxft.generation import SamplingConfig, generate
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import policy_gradient, supervised
from jaxft.train import fit
from jaxft.weights import matmul
from tests.small_models import start

IMAGE, PROMPT = 6, [6, 6, 6, 6, 7]  # four patches and a question; answers are 0 to 3


@dataclasses.dataclass(frozen=True)
class Seeing:
    """A Decoder whose tokens IMAGE are the patches of the batch's column `images` [B, 4, 4]."""

    decoder: Decoder

    def __getattr__(self, name):  # config, init_cache
        return getattr(self.decoder, name)

    def forward(self, params, batch, key=None, *, cache=None):
        def put(x):
            if "images" not in batch:  # Later tokens of a sampler see them in the cache.
                return x
            parts = batch["images"].reshape(-1, 2, 2, 2, 2).swapaxes(2, 3).reshape(-1, 4, 4)
            here = (jnp.asarray(batch["tokens"]) == IMAGE)[..., None]
            place = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, 3)
            seen = jnp.take_along_axis(matmul(parts, params["vision"]), place, axis=1)
            return jnp.where(here, seen, x)

        return self.decoder.forward(params["text"], batch, key, noise=put, cache=cache)


def images(seed, count=64):
    """Images [count, 4, 4] with one bright quarter, and which it is."""
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 4, count)
    bright = np.kron(np.eye(4)[answers].reshape(-1, 2, 2), np.ones((1, 2, 2)))
    return (bright + 0.1 * rng.normal(size=bright.shape)).astype(np.float32), answers


def test_images_are_learnt_by_supervised_and_by_grpo():
    sizes = dict(hidden_size=32, intermediate_size=32, num_layers=2, max_length=16)
    model = Seeing(Decoder(dataclasses.replace(tiny_config(vocab_size=8), **sizes)))
    text = start(model.decoder)
    params = {"text": text, "vision": jax.random.normal(jax.random.key(1), (4, 32))}
    (pixels, answers), (held_out, wanted) = images(0), images(1)
    batch = {"tokens": np.insert(np.tile(PROMPT, (64, 1)), 5, answers, axis=1), "images": pixels}
    batch["loss_mask"] = np.tile(np.arange(6) == 5, (64, 1)) * 1.0
    params = adapt(jax.random.key(2), params, {"text/layers/.*/kernel": lora(8), ".*": full()})
    greedy = functools.partial(generate, config=SamplingConfig(1, temperature=0))

    def right(params, pixels=held_out):
        out = greedy(model, params, [PROMPT] * 64, jax.random.key(3), columns={"images": pixels})
        return np.mean(out.tokens[:, 0] == wanted)

    learn = functools.partial(fit, objective=supervised(model.forward), optimizer=optax.adam(1e-2))
    half, state = (learn(params, batches=[batch] * steps)[0].params for steps in (15, 60))
    assert right(params) < 0.4 and right(half) < 0.7 and right(state) > 0.95
    assert right(state, held_out[::-1]) < 0.4  # It is the image that it reads.
    prompts = rl.Prompts([PROMPT] * 64, 16, [{"is": str(a)} for a in answers], {"images": pixels})
    judge = lambda texts, asked: [t == r["is"] for t, r in zip(texts, asked, strict=True)]
    digits = types.SimpleNamespace(decode=lambda ids, **_: "".join(map(str, ids)))
    sample = rl.answers(model, digits, judge, SamplingConfig(1), 8)
    credit, objective = rl.grpo(functools.partial(policy_gradient, model.forward), 8)
    experience = rl.collect(prompts, sample, credit)
    state, history = fit(half, objective, optax.adam(3e-3), experience, steps=60)
    assert history[0]["reward"] < 0.6 and history[-1]["reward"] > 0.8 and right(state.params) > 0.8
