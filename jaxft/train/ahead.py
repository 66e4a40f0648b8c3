"""Objectives by name with the shapes of their batches, to compile a step before there are weights or data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxft.adapters import intrinsic, intrinsic_apply
from jaxft.losses import dpo_loss, otr_loss
from jaxft.metrics import Mean
from jaxft.models import family_of, mean_pool
from jaxft.objectives import (
    coverage,
    function_distance,
    hypo,
    policy_gradient,
    preference,
    reparametrised,
    supervised,
    token_logits,
    token_supervised,
    value_loss,
    with_value_head,
)
from jaxft.objectives.policy import sequence_mean, token_mean
from jaxft.optim import with_tram
from jaxft.parallel import batch_sharding, token_sharding
from jaxft.rl.token_losses import clipped, negative_aware
from jaxft.train.batches import TOKENS

Name = Literal["sft", "grpo", "dpo", "hypo", "dco", "ppo", "nft", "otr", "tram", "classify"]
EXPERIENCE = ("grpo", "ppo", "nft")  # objectives of sampled responses
Shapes = dict[str, Any]  # name -> (shape, dtype)


class Plan(NamedTuple):
    """The parts of a step besides the model."""

    objective: Callable[..., Any]
    batch: dict[str, Any]  # jax.ShapeDtypeStruct on the mesh
    params: Callable[[Any], Any] = lambda params: params  # adds what trains beside the model
    optimizer: Callable[[Any], Any] = lambda optimizer: optimizer  # wraps the base optimizer
    extra_args: dict[str, Callable[..., Any]] | None = None  # of `make_step`


def plan(
    name: Name,
    model: Any,
    rows: int,
    length: int,
    response: int,
    d: int,
    mesh: Mesh,
    group: int = 1,
    media: int = 0,
) -> Plan:
    """Returns the plan of the objective `name`, with the hyperparameters of its paper.

    sft, and dco and otr in its place: rows of tokens. dpo: as many pairs, with the reference's log-probs as
    a column; hypo: and two of the policy's own samples for each pair, given as tokens. grpo, ppo (with a
    value head) and nft: the update on responses that were sampled. tram: the loss with a second gradient at
    the distance of the last step. classify: two classes, all tensors in a random subspace of `d` dimensions.

    Args:
        model: a model of `family_of(config).module`: an encoder for classify, else a decoder.
        rows: rows or pairs per step, over all devices and microbatches.
        length: tokens of a row.
        response: tokens of a response, below `length`.
        mesh: the mesh of the batch.
        group: of grpo, ppo and nft; above 1, a row is a group of as many responses that share their prompt.
        media: entries of a row in the columns of the model's towers (M in [B, M, ...]); 0: no such columns.
    """
    lead = (rows, group) if group > 1 else (rows,)
    shape = (rows, 2, length) if name in ("dpo", "hypo") else (*lead, length)
    fields: Shapes = {key: (shape, jnp.int32) for key in ("tokens", "segment_ids", "positions")}
    if name in EXPERIENCE:
        made, more = _of_responses(name, model, (*lead, response))
    elif name == "classify":
        del fields["positions"]
        made, more = _classify(model, d), {"labels": ((rows,), jnp.int32)}
    else:
        made, more = _of_rows(name, model), {"loss_mask": (shape, jnp.float32)}
    # Images and sounds belong to the prompt, which the two sequences of a pair share.
    fields |= more | (_of_towers(model.config.towers, lead, media) if media else {})
    if name in ("dpo", "hypo"):
        fields["ref_log_probs"] = (shape[:2], jnp.float32)
    batch = _placed(fields, mesh)
    # Of each prompt two samples: as many sequences as in the pairs.
    return made._replace(batch=batch | {"online": batch} if name == "hypo" else batch)


def _of_towers(towers, lead, media) -> Shapes:
    """The columns [*lead, media, ...] that these towers read."""
    columns = jax.eval_shape(
        lambda: {k: v for tower in towers for k, v in tower.example(1).items()}
    )
    return {k: ((*lead, media, *leaf.shape[2:]), leaf.dtype) for k, leaf in columns.items()}


def _of_rows(name, model):
    forward, loss = model.forward, functools.partial(dpo_loss, beta=0.1)
    match name:
        case "sft":
            return Plan(supervised(forward), {})
        case "dco":
            return Plan(coverage(forward, 256), {})
        case "otr":
            return Plan(token_supervised(forward, otr_loss), {})
        case "dpo":
            return Plan(preference(forward, loss, beta=0.1), {})
        case "hypo":
            return Plan(hypo(forward, loss, beta=0.1, kl_weight=1e-4), {})
        case "tram":
            distance = function_distance(token_logits(forward))
            tram = functools.partial(
                with_tram, decay=0.0
            )  # the target is the params before the last step
            return Plan(
                supervised(forward), {}, optimizer=tram, extra_args={"distance_fn": distance}
            )
    raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(Name.__args__)}.")


def _of_responses(name, model, shape):
    """(plan, further shapes of the batch) of an update on responses [B, N], or on groups [Q, G, N]."""
    numbers, rows = (shape, jnp.float32), (shape[:-1], jnp.float32)
    fields: Shapes = {"completion_mask": (shape, jnp.bool_), "sampler_log_probs": numbers}
    build = functools.partial(policy_gradient, model.forward)
    if name == "grpo":
        return Plan(build(clipped(), sequence_mean), {}), fields | {"advantages": rows}
    fields["old_log_probs"] = numbers  # there are several updates on a rollout
    if name == "nft":
        objective = build(negative_aware(), token_mean)
        return Plan(objective, {}), fields | {
            "correct": (shape[:-1], jnp.bool_), "success_rates": rows
        }  # fmt: skip
    objective = build(clipped(), token_mean, auxiliary=value_loss())
    fields |= {name: numbers for name in ("advantages", "old_values", "returns")}
    return Plan(objective, {}, params=functools.partial(with_value_head, model)), fields


def _classify(model, d):
    """Two classes by a linear head on the mean of the hidden states, in a subspace of d dimensions."""

    def objective(params, batch, key):
        segments = batch["segment_ids"]
        output = model.apply({"params": params["model"]}, batch["tokens"], segment_ids=segments)
        features, head = mean_pool(output.hidden, segments, normalize=False), params["head"]
        logits = features @ head["kernel"] + head["bias"][None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        loss = Mean.of(losses, jnp.ones_like(losses))
        return loss.value, {"loss": loss}

    def inside(params):
        kernel = jnp.zeros((model.config.hidden_size, 2))
        whole = {"model": params, "head": {"kernel": kernel, "bias": jnp.zeros(2)}}
        layers = f"model/{family_of(model.config).layers}"
        return intrinsic(jax.random.key(0), whole, d, layers=layers)

    return Plan(reparametrised(objective, intrinsic_apply), {}, params=inside)


def _placed(fields: Shapes, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    place = lambda name, shape: (
        token_sharding(mesh, len(shape)) if name in TOKENS else batch_sharding(mesh)
    )
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place(name, shape))
        for name, (shape, dtype) in fields.items()
    }
