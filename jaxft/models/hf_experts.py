"""The keys of config.json that describe mixtures of experts, which several families share."""

from __future__ import annotations

from typing import Any

from jaxft.models.config import DecoderConfig, Experts
from jaxft.models.errors import CheckpointError
from jaxft.models.family import Json

READS = frozenset({"num_experts_per_tok", "router_aux_loss_coef"})
QWEN_READS = READS | {
    "num_experts",
    "norm_topk_prob",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
}
# output_router_logits adds the balance loss to transformers' loss; here objectives take it as an argument.
# The jitter multiplies inputs of routers by noise in training only, and is left out as dropout is.
NO_EFFECT = frozenset({"output_router_logits", "router_jitter_noise"})


def keys(
    count: int, per_token: int, coefficient: float, name: str = "num_experts"
) -> dict[str, Any]:
    """The defaults of the keys that all classes have; `name` is that of the number of experts."""
    return {
        name: count,
        "num_experts_per_tok": per_token,
        "router_aux_loss_coef": coefficient,
    }


def read_experts(json: Json, count: str, width: str, normalised: bool, **more: Any) -> Experts:
    """The experts of a config.json.

    Args:
        json: the file, with defaults for absent keys.
        count, width: the keys of the number of experts and of the features of their MLPs.
        normalised: whether the gates of a token are divided by their sum.
        more: other fields.

    Raises:
        CheckpointError: for a token that passes no expert, or more than there are.
    """
    experts, per_token = json[count], json["num_experts_per_tok"]
    if not 1 <= per_token <= experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {per_token}, expected 1 to {count} ({experts}); correct "
            "the file."
        )
    return Experts(
        count=experts,
        per_token=per_token,
        width=json[width],
        normalised=normalised,
        balance=float(json.get("router_aux_loss_coef", 0.0)),
        **more,
    )


def write_experts(config: DecoderConfig, count: str, width: str) -> dict[str, Any]:
    """The keys of `read_experts`, without those of `more`."""
    experts = config.experts
    return {
        count: experts.count,
        width: experts.width,
        "num_experts_per_tok": experts.per_token,
        "router_aux_loss_coef": experts.balance,
    }


def dense_layers(json: Json) -> tuple[int, ...]:
    """Qwen's layers without experts: those of mlp_only_layers, and all but every decoder_sparse_step-th.

    Raises:
        CheckpointError: for layers that are not integers, or if no layer has experts.
    """
    only, step, layers = (
        json["mlp_only_layers"] or [],
        json["decoder_sparse_step"],
        json["num_hidden_layers"],
    )
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in only):
        raise CheckpointError(
            f"config.json: mlp_only_layers is {only!r}, expected a list of layers, numbered from 0."
        )
    dense = tuple(i for i in range(layers) if i in only or (i + 1) % step)
    if len(dense) == layers:
        raise CheckpointError(
            f"config.json: no layer has experts (mlp_only_layers {only!r}, decoder_sparse_step {step}, "
            f"{layers} layers); correct the file, or use the family without experts."
        )
    return dense


def write_qwen(config: DecoderConfig) -> dict[str, Any]:
    """The keys of Qwen's experts; layers without them are listed in mlp_only_layers."""
    return write_experts(config, "num_experts", "moe_intermediate_size") | {
        "norm_topk_prob": config.experts.normalised,
        "mlp_only_layers": list(config.experts.dense_layers),
        "decoder_sparse_step": 1,
    }
