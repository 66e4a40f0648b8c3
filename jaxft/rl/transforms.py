"""What stands between sampling and credit: functions (batch, params, key) -> batch, and dynamic sampling.

`collect(prompts, sample, credit, *transforms)` applies them in their order; one of your own is a function
with this signature. The key is that of the rollout and of the transform's place.
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
    """Takes responses that reached the limit out of the loss; they stay in baselines."""
    mask = batch["completion_mask"] & ~batch["truncated"][:, None]
    return batch | {"completion_mask": mask}


def add_old_policy(forward: Forward, temperature: float) -> Transform:
    """Adds `old_log_probs` [B, N] of the policy that sampled; with a value head `old_values` too.

    Needed for several updates a rollout.

    Args:
        forward: of the model, model.forward.
        temperature: at which the responses were sampled.
    """

    def add(batch, params, key):
        given = model_inputs(batch)
        if "value_head" not in params:
            found = policy_log_probs(forward, params, given, temperature)
            return batch | {"old_log_probs": _read(found)}
        log_probs, values = _read(_log_probs_and_values(forward, params, given, temperature))
        return batch | {"old_log_probs": log_probs, "old_values": values}

    return add


def add_values(forward: Forward) -> Transform:
    """Adds `old_values` [B, N] of the params' value head, for one update a rollout."""

    def add(batch, params, key):
        _, values = _read(_log_probs_and_values(forward, params, model_inputs(batch)))
        return batch | {"old_values": values}

    return add


def add_reference(forward: Forward, ref_params: Any, temperature: float) -> Transform:
    """Adds `ref_log_probs` [B, N] of a reference; `response_kl` from it is then shown.

    Args:
        forward: of the model, model.forward.
        ref_params: of the reference, such as the start of the run.
        temperature: at which the responses were sampled.
    """

    def add(batch, params, key):
        found = policy_log_probs(forward, ref_params, model_inputs(batch), temperature)
        return batch | {"ref_log_probs": _read(found)}

    return add


def until_contrast(sample: Sample, tries: int) -> Sample:
    """Dynamic sampling: draws of further prompts in place of groups whose rewards are all equal.

    DAPO: Yu et al., 2025, arxiv.org/abs/2503.14476, section 3.2. It stops after `tries` draws in all; what is
    missing then is filled with groups without contrast. Rewards are compared as `sample` gives them, before
    any penalty. The batch has `draws`, how many were taken.

    Args:
        sample: such as `answers`.
        tries: draws at most; the paper's code has 10.

    Raises:
        ValueError: for fewer than one.
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
        # Stable: in the order of sampling.
        groups = np.argsort(~np.concatenate(kept), kind="stable")[:count]
        rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
        return rows_of(concatenated(taken, asked.columns), rows) | {"draws": len(taken)}

    return several


def _read(found):
    """The arrays on the host, but for what is only being traced."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(found))
    return found if traced else to_host(in_turn(found))
