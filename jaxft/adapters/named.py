"""Adapters by name, for command lines; in code, use the rules themselves."""

from __future__ import annotations

from typing import Literal

from jaxft.adapters import rules, soft
from jaxft.adapters.rules import Rule
from jaxft.models.transformer import TRANSFORMER_TARGETS, Targets
from jaxft.parallel import LAYERS

Name = Literal[
    "lora", "rslora", "pissa", "dora", "vera", "loha", "lokr", "oft", "boft", "randlora", "paca",
    "ia3", "bitfit", "norms", "monarch", "full", "bottleneck", "parallel", "prompt", "prefix",
]  # fmt: skip
Quantisation = Literal["nf4", "int8", "int4", "fp8"]


def named_rules(
    name: Name,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    target: str = "all-linear",
    shape: tuple[int, int] | None = None,
    targets: Targets = TRANSFORMER_TARGETS,
    layers: str = LAYERS,
) -> dict[str, Rule | soft.Added]:
    """The rules of an adapter for `adapt`.

    Args:
        name: ia3, bitfit, norms, full and the names from bottleneck on have their own targets; monarch
            projects the kernels onto 4 blocks.
        rank: the adapter's rank; the width of bottleneck and parallel adapters, the block size of oft
            and boft, the number of virtual tokens of prompt and prefix.
        alpha: the adapter's alpha; for paca, alpha / rank multiplies the learning rate.
        target: pattern of the paths of adapted kernels, or "all-linear".
        shape: of the matrices that vera and randlora share: see jaxft.adapters.vera.
        targets, layers: the patterns of the model's family and the path of its layers:
            `family_of(model.config).targets` and `.layers`.

    Raises:
        ValueError: for an unknown name, or a rank below 1.
    """
    target = targets.pattern(target)
    match name:
        case "lora" | "rslora" | "pissa" | "dora" | "loha" | "lokr" | "paca":
            return {target: getattr(rules, name)(rank, alpha)}
        case "oft" | "boft":
            return {target: getattr(rules, name)(rank)}
        case "vera":
            return {target: rules.vera(rank, shape=shape)}
        case "randlora":
            return {target: rules.randlora(rank, shape=shape)}
        case "ia3":
            return {targets.ia3_outputs: rules.ia3(), targets.ia3_inputs: rules.ia3("input")}
        case "bitfit":
            return {rules.ALL_BIASES: rules.full()}
        case "norms":
            return {rules.ALL_NORMS: rules.full()}
        case "monarch":
            return {target: rules.monarch_from_dense(blocks=4)}
        case "full":
            return {".*": rules.full()}
        case "bottleneck":
            return {targets.houlsby: soft.bottleneck(rank)}
        case "parallel":
            return {targets.houlsby: soft.parallel_adapter(rank)}
        case "prompt":
            return {"prompt": soft.prompt(rank)}
        case "prefix":
            return {"prefix": soft.prefix(rank, layers=layers)}
    raise ValueError(f"unknown adapter {name!r}; expected one of {', '.join(Name.__args__)}.")
