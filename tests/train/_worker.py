"""A tiny run: the problem that these tests share, and a script that trains it, to be killed.

python _worker.py DIRECTORY SEED trains in this process until a signal comes.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.adapters import adapt, full, lora
from jaxft.metrics import Mean
from jaxft.train import Checkpoints, fit, jsonl_log, make_optimizer, run_main
from jaxft.weights import matmul

STEPS, ROWS, WIDTH = 16, 8, 6


def make_params(seed=0):
    """Two layers: LoRA on the first, the second frozen, a bias that trains."""
    keys = jax.random.split(jax.random.key(seed), 3)
    kernel = lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
    params = {
        "first": {"kernel": kernel(keys[0]), "bias": jnp.zeros(WIDTH)},
        "second": {"kernel": kernel(keys[1])},
    }
    return adapt(keys[2], params, {"first/kernel": lora(rank=2, alpha=4.0), ".*/bias": full()})


def objective(params, batch, key):
    """Weighted mean of squared errors per token, with noise, so that the key matters."""
    noise = 0.01 * jax.random.normal(key, batch["x"].shape) if key is not None else 0.0
    hidden = (
        matmul(batch["x"] + noise, params["first"]["kernel"]) + params["first"]["bias"][None, None]
    )
    out = matmul(jnp.tanh(hidden), params["second"]["kernel"])
    errors = jnp.mean((out - batch["y"]) ** 2, axis=-1)
    loss = Mean.of(errors, batch["weights"])
    return loss.value, {"loss": loss, "largest": jnp.max(jnp.abs(out))}


def quiet(params, batch, key):
    """The objective without noise or metrics that depend on the split of the batch."""
    del key
    loss, metrics = objective(params, batch, None)
    return loss, {"loss": metrics["loss"]}


def make_batch(seed, rows=ROWS):
    """Ragged: row r has r mod 4 tokens that count, so every fourth row has none."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, rows, 3, WIDTH)).astype(np.float32)
    weights = (np.arange(3)[None] < np.arange(rows)[:, None] % 4).astype(np.float32)
    return {"x": x, "y": y, "weights": weights}


class Batches:
    """An endless iterator with a position, as Grain's."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return make_batch(self.taken)

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


def train(directory, *, batches=None, steps=STEPS, seed=0, every=2, **options):
    """`fit` with checkpoints and a log in `directory`, resuming what is there."""
    options = {"callbacks": [jsonl_log(Path(directory) / "metrics.jsonl")]} | options
    return fit(
        make_params(),
        objective,
        make_optimizer(1e-2, total_steps=STEPS, weight_decay=0.1),
        Batches() if batches is None else batches,
        steps=steps,
        key=jax.random.key(seed),
        checkpoints=Checkpoints(Path(directory) / "checkpoints", every=every, resume=True),
        **options,
    )


def main(argv):
    directory, seed = Path(argv[0]), int(argv[1])
    slow = lambda row: (print("row", flush=True), time.sleep(0.05))
    train(directory, seed=seed, callbacks=[jsonl_log(directory / "metrics.jsonl"), slow])


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
