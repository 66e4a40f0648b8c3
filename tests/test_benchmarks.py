"""What both sides of a benchmark must have in common."""

import jax.numpy as jnp
import numpy as np

from benchmarks import grpo


def test_rewards_on_host_and_device_are_the_same():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 12, (6, grpo.NEW))
    mask = np.arange(grpo.NEW) < rng.integers(0, grpo.NEW, (6, 1))
    texts = [grpo.Words().decode(row[m], True) for row, m in zip(tokens, mask, strict=True)]
    on_device = grpo.distinct_tokens(jnp.asarray(tokens), jnp.asarray(mask), None)
    np.testing.assert_allclose(on_device, grpo.distinct_words(texts, None))
    assert grpo.distinct_words(["w5 w5 w6", ""], None) == [2 / grpo.NEW, 0]
