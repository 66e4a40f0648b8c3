"""Transforms between sampling and credit: functions (batch, params, key) -> batch, and dynamic sampling.

`collect(prompts, sample, credit, *transforms)` applies them in order; a custom transform is any
function with this signature. The key depends on the rollout and the transform's index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.keys import stream
from jaxft.models import Forward
from jaxft.objectives import completion_log_probs, completion_values
from jaxft.parallel import in_turn, to_host
from jaxft.rl.advantages import has_contrast
from jaxft.rl.groups import in_groups
from jaxft.rl.prompts import Asked
from jaxft.rl.rollouts import Batch, Sample, checked, concatenated, model_inputs, rows_of

Transform = Callable[[Batch, Any, jax.Array], Batch]

policy_log_probs = jax.jit(
    completion_log_probs, static_argnames=("forward", "temperature", "chunk")
)
_log_probs_and_values = jax.jit(
    completion_values, static_argnames=("forward", "temperature", "chunk")
)


def add_penalty(penalty: Callable[[jax.Array], Any]) -> Transform:
    """Adds penalty(lengths [B]) to the rewards, such as `overlong_penalty` (DAPO)."""

    def add(batch, params, key):
        lengths = jnp.sum(jnp.asarray(batch["completion_mask"]), axis=1).astype(jnp.float32)
        return batch | {"rewards": batch["rewards"] + np.asarray(penalty(lengths))}

    return add


def mask_truncated(batch: Batch, params: Any, key: jax.Array) -> Batch:
    """Excludes responses that reached the limit from the loss, but not from baselines."""
    mask = batch["completion_mask"] & ~batch["truncated"][:, None]
    return batch | {"completion_mask": mask}


def add_old_policy(
    forward: Forward, temperature: float, share_prompts: int | None = None
) -> Transform:
    """Adds `old_log_probs` [B, N] of the sampling policy and, with a value head, `old_values`.

    Required for several updates per rollout.

    Args:
        forward: the model's model.forward.
        temperature: the sampling temperature of the responses.
        share_prompts: as for `collect`.
    """

    def add(batch, params, key):
        given = _inputs(batch, share_prompts)
        if "value_head" not in params:
            found = policy_log_probs(forward, params, given, temperature)
            return batch | {"old_log_probs": _read(found)}
        log_probs, values = _read(_log_probs_and_values(forward, params, given, temperature))
        return batch | {"old_log_probs": log_probs, "old_values": values}

    return add


def add_values(forward: Forward, share_prompts: int | None = None) -> Transform:
    """Adds `old_values` [B, N] of the params' value head, for one update per rollout.

    `share_prompts` is that of `collect`.
    """

    def add(batch, params, key):
        given = _inputs(batch, share_prompts)
        _, values = _read(_log_probs_and_values(forward, params, given))
        return batch | {"old_values": values}

    return add


def add_reference(
    forward: Forward, ref_params: Any, temperature: float, share_prompts: int | None = None
) -> Transform:
    """Adds `ref_log_probs` [B, N] of a reference; `response_kl` is then logged.

    Args:
        forward: the model's model.forward.
        ref_params: params of the reference, such as the initial params of the run.
        temperature: the sampling temperature of the responses.
        share_prompts: as for `collect`.
    """

    def add(batch, params, key):
        given = _inputs(batch, share_prompts)
        found = policy_log_probs(forward, ref_params, given, temperature)
        return batch | {"ref_log_probs": _read(found)}

    return add


def until_contrast(sample: Sample, tries: int) -> Sample:
    """Dynamic sampling: replaces groups whose rewards are all equal by draws of further prompts.

    DAPO: Yu et al., 2025, arxiv.org/abs/2503.14476, section 3.2. It stops after `tries` draws in total and
    fills the rest with groups without contrast. Rewards are compared as returned by `sample`, before any
    penalty. The batch has `draws`, the number of draws taken.

    Args:
        sample: for example `answers`.
        tries: maximum number of draws; the paper's code has 10.

    Raises:
        ValueError: if tries is below 1.
    """
    if tries < 1:
        raise ValueError(f"until_contrast: tries must be at least 1, got {tries}.")

    def several(params, asked: Asked, key):
        count, taken, kept = len(asked.ids), [], []
        while len(taken) < tries and (not kept or np.concatenate(kept).sum() < count):
            if taken:
                asked, key_now = asked.following(), stream(key, "try", len(taken))
            else:
                key_now = key
            batch = checked(sample(params, asked, key_now))
            group_size = len(batch["rewards"]) // count
            taken.append(batch)
            kept.append(np.asarray(has_contrast(jnp.asarray(batch["rewards"]), group_size)))
        # A stable sort keeps the order of sampling.
        groups = np.argsort(~np.concatenate(kept), kind="stable")[:count]
        rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        return rows_of(concatenated(taken, asked.columns), rows) | {"draws": len(taken)}

    return several


def _inputs(batch, share_prompts):
    given = model_inputs(batch)
    return given if share_prompts is None else in_groups(given, share_prompts)


def _read(found):
    """Copies the arrays to the host, except traced ones."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found))
    return found if traced else to_host(in_turn(found))
