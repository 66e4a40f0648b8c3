"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

import dataclasses

import jax
import optax

from jaxft.weights import DoraWeight, LoraWeight


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of every B by `ratio`: optax.chain(optax.adamw(1e-4), lora_plus()).

    LoRA+: Hayou et al., 2024, arxiv.org/abs/2402.12354. It must be last in the
    chain; it also multiplies weight decay, which optax scales by the learning rate.
    The updates are a params tree with LoRA or DoRA weights.

    Raises:
        ValueError: for a ratio that is not positive; or if there is no LoRA weight among the updates.
    """
    if not ratio > 0:
        raise ValueError(f"lora_plus: ratio must be positive, got {ratio}; 16 is usual.")

    def scale(updates, params):
        del params
        # At any depth: in a frozen weight, or as the matrix of a convolution's kernel.
        is_low_rank = lambda node: isinstance(node, LoraWeight | DoraWeight)
        if not any(map(is_low_rank, jax.tree.leaves(updates, is_leaf=is_low_rank))):
            raise ValueError("lora_plus: no LoRA weight among the updates; adapt the params first.")

        def one(node):
            return dataclasses.replace(node, b=node.b * ratio) if is_low_rank(node) else node

        return jax.tree.map(one, updates, is_leaf=is_low_rank)

    return optax.stateless(scale)
