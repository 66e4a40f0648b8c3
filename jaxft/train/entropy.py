"""An entropy bonus whose weight follows the entropy of the policy."""

from __future__ import annotations

import jax.numpy as jnp

from jaxft.losses import adapted_entropy_weight
from jaxft.train.accumulation import as_means
from jaxft.train.books import Book


def adaptive_entropy(
    target: float,
    *,
    weight: float = 0.0,
    delta: float = 0.005,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Book:
    """Returns a book with the `entropy_weight` of `policy_gradient`: see `adapted_entropy_weight`.

    After each step the weight follows the step's mean entropy. The batch gets it while that entropy is at
    most the target, and else 0, so the first step has none. As in TRL (use_adaptive_entropy), but the mean
    is over all tokens of the policy also with `top_entropy`. The entry of the carry is (weight, entropy).

    Args:
        target: in nats per token, positive.
        weight: the first weight.
        delta, lowest, highest: see `adapted_entropy_weight`.

    Raises:
        ValueError: for numbers out of range.
    """
    limits = dict(target=target, delta=delta, lowest=lowest, highest=highest)
    adapted_entropy_weight(jnp.float32(weight), jnp.float32(0.0), **limits)  # checks them

    def update(entry, trainable, metrics):
        del trainable
        if "entropy" not in metrics:
            raise ValueError(f"adaptive_entropy: no metric 'entropy' among {sorted(metrics)}.")
        found = as_means(metrics)["entropy"]
        new = adapted_entropy_weight(entry[0], found.value, **limits)
        # A step without tokens shows no entropy.
        known = found.weight > 0
        return jnp.where(known, new, entry[0]), jnp.where(known, found.value, entry[1])

    return Book(
        start=lambda params: (jnp.float32(weight), jnp.float32(jnp.inf)),
        give=lambda entry, params, batch: {
            "entropy_weight": jnp.where(entry[1] <= target, entry[0], 0.0)
        },
        update=update,
    )
