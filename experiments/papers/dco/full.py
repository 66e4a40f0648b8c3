"""The direct answers of dco.py with the paper's model and data: --preset full."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import sft
from experiments.cli import flags
from experiments.cli import training as shared
from experiments.cli.models import stop_ids
from experiments.worlds import loaded
from jaxft import data, train
from jaxft.generation import SamplingConfig
from jaxft.objectives import coverage
from jaxft.parallel import mesh_context

# All params train; a constant rate after 20 of some 750 steps.
PAPER = dict(
    model="meta-llama/Meta-Llama-3-8B",
    data=("nlile/hendrycks-MATH-benchmark?split=train",),
    eval_data="nlile/hendrycks-MATH-benchmark?split=test",
    fields={"prompt": "problem", "completion": "answer"},
    adapter="full",
    max_length=1024,
    max_new_tokens=64,
    gradient_accumulation_steps=1,
    schedule="constant",
    warmup_ratio=0.025,
)
SIZES = dict(
    num_samples=(1, 16, 64, 256, 4096), epochs=4, every=1, batch_size=64, learning_rate=1e-5,
    held_out=500,
)  # fmt: skip


def opened(config: Any, pass_at: Callable, histogram: Callable) -> Callable[[int, int], list[dict]]:
    """Reads data and model; returns run(num_samples, seed) -> rows as those of `main.run`.

    Args:
        pass_at: log p [B] of the right answers -> pass@N by N.
        histogram: confidences -> counts.

    Raises:
        DataError: for missing data, before the model is read; ValueError or CheckpointError for the model.
    """
    settings = loaded.everyday(
        sft.Config(), config, PAPER, learning_rate=config.learning_rate, batch_size=config.batch_size,
        packing=False,
    )  # fmt: skip
    renderer, (training,), kept, _ = sft.load_data(settings)
    tests = data.render(kept, renderer, settings.rows.max_length)[: config.held_out * 3 // 2]
    steps = len(training) // config.batch_size
    if not steps or len(tests) < 3:
        raise ValueError(
            f"preset full: {len(training)} records to train on and {len(tests)} held out are too few for "
            f"--batch-size {config.batch_size} and 3 held-out records; give more --data or --eval-data."
        )
    settings = flags.replace(settings, max_steps=config.epochs * steps)
    mesh = shared.mesh_of(settings.mesh)
    model, base = shared.load_base(settings, mesh, keeps_start=True)
    measured = functools.partial(measure, settings, model, renderer, mesh, pass_at, histogram)

    def run(num_samples: int, seed: int) -> list[dict[str, Any]]:
        rows = []

        def look(state):
            found = {"epoch": int(state.step) // steps} | measured(state.params, tests)
            rows.append(found)
            return {}

        own = flags.replace(settings, seed=seed)
        train.fit(
            shared.adapt_params(own, model, base, mesh),
            coverage(model.forward, num_samples),
            shared.make_optimizer(settings.optimisation),
            data.batches(training, **settings.rows.sizes, packing=False, seed=seed),
            steps=config.epochs * steps,
            key=jax.random.key(seed),
            microbatches=settings.optimisation.gradient_accumulation_steps,
            mesh=mesh,
            callbacks=[
                train.every(config.every * steps, look),
                train.progress(steps=settings.output.logging_steps),
            ],
        )
        return rows

    return run


def measure(settings, model, renderer, mesh, pass_at, histogram, params, tests) -> dict[str, Any]:
    """pass@N of two in three held-out problems, greedy answers to them, and pass@N of the others."""
    groups = [data.TokenisedGroup((part,), {}) for part in tests]
    scored = train.reference_log_probs(
        model.forward, params, groups, mesh=mesh, **settings.rows.sizes
    )
    log_probs = np.array([group.columns["ref_log_probs"][0] for group in scored])
    validation = np.arange(len(tests)) % 3 == 0
    asked = [part for part, apart in zip(tests, validation, strict=True) if not apart]
    prompts, answers = zip(*map(_split, asked), strict=True)
    ends = stop_ids(renderer, model)
    greedy = SamplingConfig(settings.max_new_tokens, temperature=0.0, stop_ids=ends)
    key, size = jax.random.key(0), settings.rows.batch_size
    with mesh_context(mesh):
        out = loaded.in_parts(model, params, prompts, key, greedy, at_once=size)
    sure = np.exp(np.sum(out.log_probs, axis=1, where=out.mask))
    right = np.array([a == b for a, b in zip(out.completions, answers, strict=True)])
    return {
        "pass": pass_at(log_probs[~validation]),
        "validation": pass_at(log_probs[validation]),
        "confidence": float(sure.mean()),
        "accuracy": float(right.mean()),
        "right": histogram(sure[right]),
        "wrong": histogram(sure[~right]),
    }


def _split(part):
    """(ids of the question, ids of the answer)."""
    first = int(np.argmax(part.loss_mask > 0))
    return part.tokens[:first].tolist(), part.tokens[first:].tolist()
