"""Pretraining and sampling of small language models on rows of one shape, for scripts of papers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import train
from jaxft.generation import SamplingConfig
from jaxft.generation.sampler import decode, prefill
from jaxft.models import Decoder, DecoderConfig
from jaxft.objectives import supervised


def decoder(
    vocabulary: int, length: int, width: int = 64, layers: int = 2, **options: Any
) -> Decoder:
    """Returns a Llama-like decoder with four heads; `options` are fields of its config."""
    return Decoder(
        DecoderConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_layers=layers,
            num_heads=4, num_kv_heads=4, head_dim=width // 4, max_length=length, **options,
        )
    )  # fmt: skip


@functools.cache
def sampler(
    model: Decoder, size: int, stop: int | None = None, temperature: float = 1.0
) -> Callable[..., Any]:
    """Returns sample(params, prompts [B, P], key) -> (completions [B, size], mask, log-probs of tokens).

    A fourth argument, `columns`, has further inputs of the model's forward, [B, ...] each: images, whose
    token is then never sampled.
    Compiles one program for each B. A completion ends after `stop`, which the mask counts. Temperature 0 is
    greedy, with log-probs at temperature 1.
    """
    stops = () if stop is None else (stop,)
    config = SamplingConfig(max_new_tokens=size, temperature=temperature, stop_ids=stops)

    @jax.jit
    def sample(params, prompts, key, columns=None):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(prompts)))
        valid = jnp.ones(prompts.shape, bool)
        slots = prompts.shape[1] + size
        state = prefill(model, params, prompts, valid, keys, slots, columns=columns)
        _, part = decode(model, params, state, config, steps=size)
        return part.tokens, part.mask, part.log_probs

    return sample


def answered_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], size: int
) -> dict[str, np.ndarray]:
    """Rows of prompts and their right answers of at most `size` tokens, padded at both ends as rollouts are.

    `loss_mask` counts the answers.
    """
    lead = max(map(len, prompts))
    tokens = np.zeros((len(prompts), lead + size), np.int32)
    seen, mask = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        place = slice(lead - len(prompt), lead + len(answer))
        tokens[i, place], seen[i, place] = [*prompt, *answer], True
        mask[i, lead : lead + len(answer)] = 1
    positions = np.maximum(np.cumsum(seen, axis=1) - 1, 0).astype(np.int32)
    segments = seen.astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask}


def rows(prompts: Any, completions: Any, mask: Any = None) -> dict[str, jax.Array]:
    """A batch of objectives: `tokens`, `loss_mask` and `segment_ids` [..., P + N]."""
    mask = jnp.ones(completions.shape, bool) if mask is None else mask
    before = jnp.broadcast_to(prompts, (*completions.shape[:-1], prompts.shape[-1]))
    join = lambda x, y: jnp.concatenate([x, y], axis=-1)
    seen = join(jnp.ones(before.shape, jnp.int32), mask.astype(jnp.int32))
    return {
        "tokens": join(before, completions * mask),
        "loss_mask": join(jnp.zeros(before.shape), mask.astype(jnp.float32)),
        "segment_ids": seen,
    }


def pretrain(
    model: Decoder,
    draw: Callable[[np.random.Generator], Any],
    steps: int,
    rate: float,
    seed: int,
    params: Any = None,
) -> Any:
    """Trains params (None: new ones) with supervised steps on batches of `draw`: Adam, cosine schedule."""
    rng = np.random.default_rng(seed)
    if params is None:
        params = jax.jit(model.init)(jax.random.key(seed), model.example_input())["params"]
    optimizer = optax.adam(lambda count: rate * train.cosine(count / steps))
    batches = (draw(rng) for _ in range(steps))
    state, _ = train.fit(params, supervised(model.forward), optimizer, batches, steps=steps)
    return state.params
