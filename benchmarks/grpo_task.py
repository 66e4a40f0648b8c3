"""The task of all sides of the GRPO cells, for environments with and without jaxft, torch and Tunix."""

import numpy as np

from benchmarks.harness import MODELS

# Ids below 4 are special. Several steps, as each call of TRL's train sets itself up.
PROMPTS, GROUP, LENGTH, NEW, STEPS = 8, 4, 32, 64, 8
EOS, LEARNING_RATE = 2, 1e-6


def questions() -> np.ndarray:
    """[64, LENGTH] random ids."""
    return np.random.default_rng(0).integers(4, MODELS["3m"]["vocab_size"], (64, LENGTH))
