"""LoRA+: a larger learning rate for B than for A."""

from __future__ import annotations

import dataclasses

import jax
import optax

from jaxft.weights import DoraWeight, LoraWeight, is_weight


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of every B by `ratio`: optax.chain(optax.adamw(1e-4), lora_plus()).

    LoRA+: Hayou et al., 2024, arxiv.org/abs/2402.12354. It stands last in the
    chain; weight decay, which optax scales by the learning rate, grows too.
    The updates are a params tree with LoRA or DoRA weights.

    Raises:
        ValueError: for a ratio that is not positive; or if there is no LoRA weight among the updates.
    """
    if not ratio > 0:
        raise ValueError(f"lora_plus: ratio must be positive, got {ratio}; 16 is usual.")

    def scale(updates, params):
        del params
        nodes = jax.tree.leaves(updates, is_leaf=is_weight)
        if not any(isinstance(n, LoraWeight | DoraWeight) for n in nodes):
            raise ValueError("lora_plus: no LoRA weight among the updates; adapt the params first.")

        def one(node):
            if isinstance(node, LoraWeight | DoraWeight):
                return dataclasses.replace(node, b=node.b * ratio)
            return node

        return jax.tree.map(one, updates, is_leaf=is_weight)

    return optax.stateless(scale)
