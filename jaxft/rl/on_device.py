"""Experience with rewards computed on the device: sampling, rewards and advantages in one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from jaxft.generation import SamplingConfig, decode, fork, left_pad, prefill, remember
from jaxft.models import Decoder
from jaxft.parallel import in_turn, mesh_context
from jaxft.rewards import RewardError
from jaxft.rl.advantages import has_contrast
from jaxft.rl.algorithms import Credit
from jaxft.rl.collection import Collector, drop_multiple, in_parts
from jaxft.rl.groups import in_groups
from jaxft.rl.prompts import Prompts
from jaxft.rl.rollouts import check_policy, side_by_side, with_columns
from jaxft.rl.transforms import add_old_policy, add_reference, add_values

# (tokens [B, N], mask [B, N], which prompt [B]) -> rewards [B], traced
DeviceReward = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def collect_on_device(
    model: Decoder,
    prompts: Prompts,
    reward: DeviceReward,
    credit: Credit,
    config: SamplingConfig,
    *,
    group_size: int,
    updates: int = 1,
    epochs: int = 1,
    ref_params: Any = None,
    mesh: Mesh | None = None,
    share_prompts: bool = False,
    drop_idle: bool = False,
    microbatches: int = 1,
) -> Collector:
    """Works like `collect`, with rewards that are a function of tokens, such as `equals(answers)`.

    Sampling, rewards and credit are one compiled program without transfers to the host: for answers of
    a fixed form, and models so small that host work would dominate the time. All prompts have the
    width of the longest. The samples equal those of `collect`.

    Collectors share the program if their models, credits, settings and shapes are equal and their rewards
    differ only in arrays, which a `jax.tree_util.Partial` such as that of `equals` passes as arguments.

    Args:
        reward: function of the responses' tokens and mask and of each response's prompt number.
        group_size: responses to each prompt.
        updates, epochs: as in `collect`; several add `old_log_probs`. A value head adds `old_values`.
        ref_params: adds `ref_log_probs`; None: no reference.
        mesh: as for `fit`; with several updates, the rollout lies over its data, fsdp and expert axes.
        share_prompts: compute a group's prompt once; see `collect`.
        drop_idle, microbatches: as in `collect`.

    Raises:
        ValueError: for greedy sampling.
        RewardError: when called, if the rewards have a wrong shape.
    """
    check_policy(config)
    tokens, valid = map(jnp.asarray, _left_pad(prompts.ids, model.config))
    arrays = tokens, valid, reward if isinstance(reward, Partial) else Partial(reward)
    share = group_size if share_prompts else None
    settings = model, credit, config, group_size, updates * epochs > 1, share

    def rollout(params, place, key, kl_weight):
        draws = place.draws
        chosen, columns = np.array(prompts.chosen(draws)), prompts.pick(draws).columns
        with mesh_context(mesh):
            found = _experience(*settings, params, ref_params, key, chosen, columns, *arrays)
            return in_turn(found), 1

    drop_to = drop_multiple(microbatches, mesh) if drop_idle else None
    return in_parts(rollout, updates, epochs, seed=prompts.seed, mesh=mesh, drop_to=drop_to)


def sample_on_device(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    config: SamplingConfig,
    samples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples (tokens, mask) [prompts, samples, N] for evaluation, in one compiled program."""
    tokens, valid = map(jnp.asarray, _left_pad(prompts, model.config))
    chosen = jnp.arange(len(prompts))
    batch, _ = _sample_jit(model, params, tokens, valid, key, chosen, config, samples)
    size = batch["completion_mask"].shape[1]
    shape = (len(prompts), samples, size)
    return (
        np.asarray(batch["tokens"][:, -size:]).reshape(shape),
        np.asarray(batch["completion_mask"]).reshape(shape),
    )


def estimate_success(
    sample: Callable[[int], tuple[np.ndarray, np.ndarray]],
    reward: DeviceReward,
    numbers: Sequence[int],
    samples: int,
) -> np.ndarray:
    """p̂ [B]: the fraction of `samples` answers to each prompt that are correct (reward at least 1).

    Estimates p(answer | prompt) if many derivations lead to an answer, so that no likelihood gives it.

    Args:
        sample: number of samples -> (tokens, mask) [B, samples, N], such as `sample_on_device`.
        reward: function of the responses and their prompts' numbers.
        numbers: the prompt number of each of the B rows.
        samples: samples per prompt; DCO (Chen et al., 2025, arxiv.org/abs/2502.07154) uses 64.

    Raises:
        ValueError: if `sample` returns a wrong number of samples.
    """
    tokens, mask = sample(samples)
    if np.shape(tokens)[:2] != (len(numbers), samples):
        raise ValueError(
            f"estimate_success: {samples} samples of {len(numbers)} prompts are expected, got "
            f"{np.shape(tokens)[:2]}."
        )
    flat = lambda x: jnp.asarray(x).reshape(-1, x.shape[-1])
    given = reward(flat(tokens), flat(mask), jnp.repeat(jnp.asarray(numbers), samples))
    return np.asarray(given >= 1.0).reshape(-1, samples).mean(axis=1)


def equals(answers: Sequence[Sequence[int]], size: int) -> DeviceReward:
    """Returns a reward: 1 for a response that equals its prompt's answer token by token, else 0.

    Args:
        answers: token ids of each prompt's answer, the stop token included.
        size: max_new_tokens of the sampling.

    Raises:
        ValueError: if an answer is longer than `size`, so that no response could equal it.
    """
    longest = max(map(len, answers))
    if longest > size:
        raise ValueError(
            f"equals: answers must have at most max_new_tokens = {size} tokens; the longest has "
            f"{longest}."
        )
    wanted = np.full((len(answers), size), -1, np.int32)
    for row, answer in zip(wanted, answers, strict=True):
        row[: len(answer)] = answer

    return Partial(_equal, jnp.asarray(wanted))


def _equal(wanted, tokens, mask, numbers):
    """1 for each response [B, N] that equals its prompt's row of wanted [prompts, N], -1 after its end."""
    given = jnp.where(mask, tokens, -1)
    return jnp.all(given == wanted[numbers], axis=1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=range(6))
def _experience(
    model, credit, config, group_size, several, share,
    params, ref_params, key, chosen, columns, tokens, valid, reward,
):  # fmt: skip
    """Returns a rollout's batch with rewards and credit; see `collect_on_device`."""
    batch, numbers = _sample(model, params, tokens, valid, key, chosen, config, group_size, columns)
    size = batch["completion_mask"].shape[1]
    value = reward(batch["tokens"][:, -size:], batch["completion_mask"], numbers)
    if jnp.shape(value) != numbers.shape:
        raise RewardError(
            f"collect_on_device: the reward function returned {type(value).__name__} of shape "
            f"{jnp.shape(value)}; expected {numbers.shape}, one reward per response."
        )
    flat = ~jnp.repeat(has_contrast(value, group_size), group_size)
    truncated = batch.pop("truncated")
    batch["stats"] = {"reward": value, "truncated": truncated, "no_contrast": flat * 1.0}
    if several:
        batch = add_old_policy(model.forward, config.temperature, share)(batch, params, key)
    elif "value_head" in params:
        batch = add_values(model.forward, share)(batch, params, key)
    if ref_params is not None:
        add = add_reference(model.forward, ref_params, config.temperature, share)
        batch = add(batch, params, key)
    batch |= credit(value, batch)
    return in_groups(batch, group_size) if share else batch


def _sample(model, params, tokens, valid, key, chosen, config, samples, columns=None):
    """Returns (batch without rewards, the prompt number of each row)."""
    size = config.max_new_tokens
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(chosen)))
    slots = tokens.shape[1] + size
    state = prefill(model, params, tokens[chosen], valid[chosen], keys, slots, columns=columns)
    if config.looks_back:
        state = remember(state, tokens[chosen], valid[chosen], slots)
    state, part = decode(model, params, fork(state, samples), config, steps=size)
    numbers = jnp.repeat(chosen, samples)
    batch = side_by_side(jnp, tokens[numbers], valid[numbers], *part)
    batch |= {"truncated": (~state.done).astype(jnp.float32)}
    return with_columns(batch, columns, samples), numbers


_sample_jit = jax.jit(_sample, static_argnames=("model", "config", "samples"))


def _left_pad(prompts, config):
    """Left-pads to [B, P], P the longest prompt's length: one program needs no buckets."""
    tokens, valid = left_pad(prompts, config)
    width = max(map(len, prompts))
    return tokens[: len(prompts), -width:], valid[: len(prompts), -width:]
