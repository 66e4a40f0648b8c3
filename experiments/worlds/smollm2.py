"""SmolLM2-135M-Instruct on tasks of reasoning-gym, on one CPU core: the world of `--preset smollm2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from experiments.cli import choices, flags
from experiments.worlds import questions


def sized(
    config: Any, sizes: Mapping[str, Any], smoke: Mapping[str, Any], only_small: Sequence[str]
) -> Any:
    """Returns a script's config with the sizes of --preset smollm2, for flags that are not given.

    Args:
        config: the script's, with `source` (`questions.Settings`) and `smoke`.
        sizes: those of the preset, flags of `source` among them.
        smoke: sizes of --smoke, which replace those of the preset.
        only_small: flags that only the small world reads.

    Raises:
        ValueError: for a flag that has no effect.
    """
    choices.check_excluded(config, only_small, "--preset smollm2")
    return flags.with_small(config, dict(sizes) | (dict(smoke) if config.smoke else {}))


def in_float32(task: questions.Task) -> questions.Task:
    """Returns the task with a model that computes in float32 and keeps its activations.

    CPUs are slower in bfloat16, and the batches are small.
    """
    return task._replace(model=task.model.clone(dtype=jnp.float32, remat="none"))
