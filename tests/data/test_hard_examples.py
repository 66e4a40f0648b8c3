"""A queue of examples that are worth a step, against a plain list."""

import numpy as np
import pytest

from jaxft.data import HardExampleQueue


def test_batches_are_full_in_order_and_of_heavy_examples():
    rng, queue = np.random.default_rng(0), HardExampleQueue(0.3, 4)
    weights, given = rng.random(40), []
    for start in range(0, 40, 5):
        rows = np.arange(start, start + 5)
        kept = queue.push({"id": rows, "x": {"y": rows[:, None] * 2.0}}, weights[rows])
        assert kept == (weights[rows] >= 0.3).sum()
        while (batch := queue.pop()) is not None:
            assert batch["id"].shape == (4,) and batch["x"]["y"].shape == (4, 1)
            assert (batch["x"]["y"][:, 0] == 2 * batch["id"]).all()
            given += batch["id"].tolist()
    wanted = np.flatnonzero(weights >= 0.3).tolist()
    assert given == wanted[: len(given)] and len(queue) == len(wanted) - len(given) < 4


def test_bad_weights_and_sizes():
    queue = HardExampleQueue(0.1, 2)
    with pytest.raises(ValueError, match="one weight per candidate is expected"):
        queue.push({"id": np.arange(3)}, np.ones(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        HardExampleQueue(0.1, 0)
