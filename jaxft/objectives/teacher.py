"""Distillation: the divergence of a model from its teacher, at the tokens that a task trains.

    params = with_teacher(params, teacher_params)            # frozen, one more entry of the tree
    objective = distillation(student.forward, supervised, teacher.forward, weight=0.5)
    state, history = fit(params, objective, optimizer, batches)
    save_model(path, student, without_teacher(state.params))

The teacher is part of the params: steps take it as an input, checkpoints hold only its checksum, and a mesh
holds its shards. A teacher of another kind (a server, a file) gives columns of the batch instead:

    teacher_ids, teacher_top_log_probs   [B, T, K]: what it predicted at the place of each token, given
                                         those before it; [B, N, K] of a response in experience
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import losses
from jaxft.losses.distillation import check_divergence
from jaxft.metrics import Mean, Terms, terms_of
from jaxft.models import Forward, Prediction, predict
from jaxft.models.checks import check_column, check_completion
from jaxft.objectives.next_token import Objective, shift
from jaxft.weights import Frozen, is_weight

Params = Any
TEACHER = "teacher"  # the entry of the params


def with_teacher(params: Params, teacher_params: Params) -> Params:
    """The params with the teacher's, all frozen, as the entry `teacher`; nothing is copied."""
    freeze = lambda node: node if isinstance(node, Frozen) else Frozen(node)
    return params | {TEACHER: jax.tree.map(freeze, teacher_params, is_leaf=is_weight)}


def without_teacher(params: Params) -> Params:
    """The params of the student itself, to sample from, save and use."""
    return {name: node for name, node in params.items() if name != TEACHER}


def distillation(
    forward: Forward,
    task: Callable[[Forward], Objective],
    teacher: Forward | None,
    *,
    weight: float = 1.0,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int = losses.CHUNK,
) -> Objective:
    """objective(params, batch, key) = (1 - λ) L + λ mean of D_β(teacher, student), from one forward pass.

    GKD: Agarwal et al., 2023, arxiv.org/abs/2306.13649. D is `losses.generalised_jsd`, or `top_k_jsd` of a
    teacher's columns; its mean is over the tokens that the batch counts: of rows [B, T] those of `shift`
    with their weights, of experience those of `completion_mask`. On the student's own samples this is
    GKD's on-policy form; the samples get no gradient.

    Metrics: those of the task; `divergence`, a Mean in nats per token; and `task_loss`, L. With λ = 1 the
    task is only logged. metrics["loss"] is that of the sum, as `Terms` if λ is below 1.

    Args:
        forward: of the student; see `supervised`.
        task: forward -> the objective L, such as `supervised`. Its prediction of the whole batch is the one
            that D reads; of anything else (noise, other rows) it makes its own.
        teacher: of the teacher, whose params are params["teacher"] (`with_teacher`). None: the batch has
            the teacher's likeliest tokens.
        weight: λ, above 0 and at most 1.
        beta: β in [0, 1]: 0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher).
        temperature: divides the logits of both; the log-probs in columns are already at it.
        chunk: tokens of each row whose logits are in memory at once.

    Raises:
        ValueError: for a weight, beta or temperature out of range; when traced, without a teacher.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"distillation: weight must be above 0 and at most 1, got {weight}.")
    check_divergence(beta, temperature)
    options = dict(beta=beta, temperature=temperature, chunk=chunk)

    def objective(params, batch, key):
        found = predict(forward, params, batch, key)
        seen = found if weight < 1 else jax.lax.stop_gradient(found)

        def shared(own, rows, key=None, **more):
            same = own is params and rows is batch and not more
            return seen if same else forward(own, rows, key, **more)

        loss, metrics = task(shared)(params, batch, key)
        divergence = _divergence(found, teacher, params, batch, options)
        task_loss = metrics.get("loss", loss)
        shown = jax.lax.stop_gradient(
            metrics | {"task_loss": task_loss, "divergence": divergence, "loss": divergence}
        )
        if weight == 1:
            return divergence.value, shown
        scaled = divergence._replace(total=weight * divergence.total)
        terms = Terms((*terms_of(loss, task_loss, 1 - weight), scaled))
        return terms.value, shown | {"loss": terms}

    return objective


def _divergence(found: Prediction, teacher, params, batch, options) -> Mean:
    """The mean over the batch's counted tokens."""
    if "absent_mask" in batch:
        raise ValueError(
            "distillation: rows without an advantage were left out of the batch, but the divergence has a "
            "gradient in them too; keep them: collect(..., drop_idle=False)."
        )
    if "completion_mask" in batch:
        mask = check_completion(batch, "distillation")
        weights, place = mask.astype(jnp.float32), slice(-mask.shape[1] - 1, -1)
        column = lambda x: x
    else:
        weights, place = shift(batch)[1], slice(None)
        # Position t predicts token t + 1.
        column = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))
    found = found.at(slice(None), place)
    options = options | {"softcap": found.softcap}
    if teacher is None:
        ids, log_probs = map(column, _columns(batch, weights.shape))
        total = losses.linear_top_k_jsd(
            found.hidden, found.head, ids, log_probs, weights, **options
        )
        return Mean(total, jnp.sum(weights))
    if TEACHER not in params:
        raise ValueError("distillation: the params have no teacher; see with_teacher.")
    told = jax.lax.stop_gradient(predict(teacher, params[TEACHER], batch))
    total = losses.linear_jsd(
        found.hidden,
        found.head,
        told.hidden[:, place],
        told.head,
        weights,
        teacher_softcap=told.softcap,
        **options,
    )
    return Mean(total, jnp.sum(weights))


def _columns(batch, shape):
    width = jnp.shape(batch.get("teacher_ids", 0))[-1:]
    names = "teacher_ids", "teacher_top_log_probs"
    return (check_column(batch, name, (*shape, *width), "distillation") for name in names)
