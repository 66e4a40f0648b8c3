"""The task of all sides of the GRPO cells, for environments with and without jaxft, torch and Tunix."""

from typing import NamedTuple

import numpy as np

from benchmarks.harness import MODELS

# Ids below 4 are special.
EOS, LEARNING_RATE = 2, 1e-6


class Setting(NamedTuple):
    """Sizes of a run; several steps, as each call of TRL's train sets itself up."""

    model: str = "3m"  # of benchmarks.harness.MODELS
    prompts: int = 8  # per step
    group: int = 4  # answers to a prompt
    length: int = 32  # tokens of a prompt
    new: int = 64  # tokens of an answer
    steps: int = 8
    half: bool = False  # every second prompt has the reward 1 for all its answers


SETTINGS = {
    "short": Setting(),
    "long_3m": Setting(group=8, length=256, steps=2, half=True),
    "long_30m": Setting("30m", prompts=4, group=8, length=256, steps=2, half=True),
}
SHORT = SETTINGS["short"]
PROMPTS, GROUP, LENGTH, NEW, STEPS = (
    SHORT.prompts,
    SHORT.group,
    SHORT.length,
    SHORT.new,
    SHORT.steps,
)


def questions(setting: Setting = SHORT) -> np.ndarray:
    """[64, length] random ids."""
    size = MODELS[setting.model]["vocab_size"]
    return np.random.default_rng(0).integers(4, size, (64, setting.length))


def without_contrast(setting: Setting) -> np.ndarray:
    """[64] whether the answers to a question have equal rewards."""
    return (np.arange(64) % 2 == 0) & setting.half
