"""A teacher's log-probs of sampled responses, and their difference from the policy's as credit."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxft import losses
from jaxft.generation import ServedTeacher, teacher_columns
from jaxft.models import Forward
from jaxft.objectives.policy import spread
from jaxft.rl.algorithms import Credit
from jaxft.rl.rollouts import model_inputs
from jaxft.rl.transforms import Transform, add_reference


def add_teacher(forward: Forward, teacher_params: Any, temperature: float) -> Transform:
    """Adds `teacher_log_probs` [B, N] of the response's tokens, which `reverse_kl_credit` reads.

    Args:
        forward: of the teacher.
        teacher_params: its params, an input of the compiled program.
        temperature: the sampling temperature of the responses.
    """
    score = add_reference(forward, teacher_params, temperature)

    def add(batch, params, key):
        found = score(model_inputs(batch), params, key)["ref_log_probs"]
        return batch | {"teacher_log_probs": found}

    return add


def add_served_teacher(teacher: ServedTeacher, k: int) -> Transform:
    """Adds a server's `teacher_log_probs` [B, N], `teacher_ids` and `teacher_top_log_probs` [B, N, k].

    `reverse_kl_credit` reads the first, `jaxft.objectives.distillation` without a teacher's forward the
    others. The server's log-probs are those at temperature 1.
    """
    return lambda batch, params, key: batch | teacher_columns(teacher, batch, k)


def reverse_kl_credit(credit: Credit, weight: float = 1.0) -> Credit:
    """A credit with the advantages (1 - λ) A + λ (log π_T(y_t) - log π_old(y_t)) of each sampled token.

    At the policy that sampled, the second part is minus the reverse KL(π || π_T) of one token in
    expectation: on-policy distillation with a discount of 0, each token having its own KL and none of those
    after it (Lu and Thinking Machines Lab, 2025, thinkingmachines.ai/blog/on-policy-distillation; MiniLLM:
    Gu et al., 2023, arxiv.org/abs/2306.08543, eq. 2, sums also those after it). It needs only the teacher's
    log-probs of the sampled tokens; `jaxft.objectives.distillation` with β = 1 is the exact expectation. It
    combines with losses that multiply advantages by a ratio or log π.

    Args:
        credit: gives A, `advantages` [B] or [B, N], such as `grpo(build, 8).credit`.
        weight: λ in (0, 1]; 1: rewards are only logged.

    Raises:
        ValueError: for a weight out of range; when called, if the batch has no teacher_log_probs, or the
            credit gives no advantages (nft, online_preference).
    """
    if not 0 < weight <= 1:
        raise ValueError(f"reverse_kl_credit: weight must be above 0 and at most 1, got {weight}.")

    def combined(rewards, batch):
        if "teacher_log_probs" not in batch:
            raise ValueError(
                "reverse_kl_credit: the batch has no teacher_log_probs; pass add_teacher to collect."
            )
        given = dict(credit(rewards, batch))
        if "advantages" not in given:
            raise ValueError(
                f"reverse_kl_credit: the credit gives {sorted(given)} instead of advantages; use that of "
                "grpo, rloo, reinforce_plus_plus or another with advantages."
            )
        old = jnp.asarray(batch.get("old_log_probs", batch["sampler_log_probs"]))
        gain = losses.log_ratio(jnp.asarray(batch["teacher_log_probs"]), old)
        gain = jnp.where(batch["completion_mask"], gain, 0.0)
        mixed = weight * gain
        if weight < 1:
            mixed = mixed + (1 - weight) * spread(given["advantages"], gain)
        return given | {"advantages": mixed}

    combined.reads_kl_weight = getattr(credit, "reads_kl_weight", False)
    return combined
