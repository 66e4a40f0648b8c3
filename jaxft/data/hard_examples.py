"""Full batches of examples that are not solved yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


class HardExampleQueue:
    """Collects examples whose weight reaches a threshold; surplus examples wait for the next batch.

    Direct coverage optimization (Chen et al., 2025, arxiv.org/abs/2502.07154) skips solved examples and
    still takes full batches: candidates are weighed until a batch is full.

        while (batch := queue.pop()) is None:
            queue.push(candidates := next(source), weigh(state.params, candidates))

    Args:
        threshold: minimum weight of an example; the authors' code has 0.1, for the weight F(N, p).
        batch_size: examples per batch.

    Raises:
        ValueError: if batch_size is below 1.
    """

    def __init__(self, threshold: float, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"HardExampleQueue: batch_size must be at least 1, got {batch_size}.")
        self.threshold, self.batch_size = threshold, batch_size
        self._waiting: list[Any] = []

    def __len__(self) -> int:
        """Number of waiting examples."""
        return len(self._waiting)

    def push(self, candidates: Mapping[str, Any], weights: np.ndarray) -> int:
        """Adds the candidates (leaves [B, ...]) that reach the threshold; returns their number.

        Raises:
            ValueError: if there is not one weight per candidate.
        """
        weights = np.asarray(weights)
        sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(candidates)}
        if sizes != {len(weights)} or weights.ndim != 1:
            raise ValueError(
                f"HardExampleQueue: one weight per candidate is expected, got weights {weights.shape} for "
                f"leaves of {sorted(sizes)} rows."
            )
        kept = np.flatnonzero(weights >= self.threshold)
        rows = jax.tree.map(np.asarray, candidates)
        self._waiting += [jax.tree.map(lambda leaf, i=i: leaf[i], rows) for i in kept]
        return len(kept)

    def pop(self) -> Any | None:
        """Removes and returns a batch of the oldest examples; None if there are fewer than a batch."""
        if len(self) < self.batch_size:
            return None
        taken, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *taken)
