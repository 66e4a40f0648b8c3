"""An encoder-decoder that is made outside of jaxft: its objectives, sampler and adapters take it as it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.adapters import lora
from jaxft.generation import Beams, SamplingConfig, beam_search, generate
from jaxft.losses import simpo_loss
from jaxft.models import Prediction
from jaxft.objectives import completion_log_probs, preference, supervised
from jaxft.train import fit
from jaxft.weights import matmul, take
from tests.small_models import adapted

DIM, LENGTH, START = 32, 4, 11  # words 0 to 9 and a start token


def initial(key):
    """Params: attention from a target's place to the source's words and places."""
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    kernels = {"query": (2, DIM, DIM), "value": (3, DIM, DIM), "head": (4, DIM, 12)}
    kernels = {name: draw(*size) / DIM**0.5 for name, size in kernels.items()}
    return kernels | {"embed": draw(0, 12, DIM), "places": draw(1, LENGTH + 1, DIM)}


@dataclasses.dataclass(frozen=True)
class Translator:
    """The methods that jaxft needs of a model: forward, for its sampler init_cache and the longest length."""

    config = dataclasses.make_dataclass("Sizes", [("max_length", int, 16)])()

    def init_cache(self, rows, length, dtype=None):
        return jnp.zeros((rows, LENGTH), jnp.int32)  # The source is all that later tokens need.

    def forward(self, params, batch, key=None, *, cache=None):
        source, place = batch.get("source", cache), functools.partial(take, params["places"])
        memory = take(params["embed"], source) + place(jnp.arange(1, LENGTH + 1))[None]
        query = matmul(place(jnp.minimum(batch["positions"] + 1, LENGTH)), params["query"])
        seen = jax.nn.softmax(query @ memory.swapaxes(-1, -2) / DIM**0.5) @ memory
        return Prediction(jax.nn.gelu(matmul(seen, params["value"])), params["head"], cache=source)


def task(seed, rows=256, shift=3):
    """Sources, and as tokens a start token and each word's translation w -> w + shift."""
    source = np.random.default_rng(seed).integers(0, 10, (rows, LENGTH))
    tokens = np.insert((source + shift) % 10, 0, START, axis=1)
    return {"tokens": tokens, "positions": np.arange(LENGTH + 1) + 0 * tokens, "source": source}


def test_supervised_preference_and_sampling_read_the_source():
    model, batch, options = Translator(), task(0), dict(optimizer=optax.adam(1e-2))
    params, loss = initial(jax.random.key(0)), supervised(model.forward)
    state, rows = fit(params, loss, batches=[batch] * 80, **options)
    assert rows[-1]["loss"] < 0.05 and jax.jit(loss)(state.params, task(1), None)[0] < 0.1
    asked = dict(samples=2, columns={"source": task(2)["source"][:5]})
    config, prompts = SamplingConfig(LENGTH, temperature=1.0), [[START]] * 5
    out = generate(model, state.params, prompts, jax.random.key(1), config, **asked)
    twice = {k: v[:5].repeat(2, axis=0) for k, v in task(2).items()}
    given = twice | {"tokens": np.insert(out.tokens, 0, START, axis=1), "completion_mask": out.mask}
    score = jax.jit(functools.partial(completion_log_probs, model.forward))
    scored = score(state.params, given)
    np.testing.assert_allclose(scored, out.log_probs, atol=1e-4)
    assert np.mean(out.tokens == twice["tokens"][:, 1:]) > 0.9
    # LoRA is to prefer w -> w + 4; a record's source is repeated for both sequences of its pair.
    sides = task(0, shift=4), batch
    pair = {k: np.stack([side[k] for side in sides], axis=1) for k in ("tokens", "positions")}
    pair |= {"loss_mask": 1.0 * (pair["positions"] > 0), "source": batch["source"]}
    start = adapted(state.params, {"value|head": lora(rank=4)})
    objective = preference(model.forward, functools.partial(simpo_loss, beta=1.0))
    _, rows = fit(start, objective, batches=[pair] * 60, **options)
    assert rows[0]["rewards/accuracy"] < 0.1 and rows[-1]["rewards/accuracy"] > 0.9


def test_beam_search_reads_the_source():
    """Beams of several prompts: scores are those of a full forward with each prompt's own source."""
    model, params, source = Translator(), initial(jax.random.key(0)), task(2)["source"][:3]
    rules, beams = SamplingConfig(LENGTH, temperature=0.0), Beams(4, num_return_sequences=3)
    out = beam_search(model, params, [[START]] * 3, beams, rules, columns={"source": source})
    best = out.scores.reshape(3, 3)
    assert (np.diff(best) < 0).all() and len(set(np.round(best[:, 0], 3).tolist())) == 3
    tokens = np.insert(out.tokens, 0, START, axis=1)
    batch = {"tokens": tokens, "source": source.repeat(3, axis=0), "completion_mask": out.mask}
    batch |= {"positions": np.arange(LENGTH + 1) + 0 * tokens}
    scored = completion_log_probs(model.forward, params, batch).sum(axis=1) / LENGTH
    np.testing.assert_allclose(scored, out.scores, rtol=1e-5)
