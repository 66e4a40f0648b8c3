"""A reward model as the verifier of a search."""

import jax
import numpy as np
import pytest

from jaxft.models import Decoder, tiny_config
from jaxft.rewards import add_reward_head, prefix_verifier, token_rewards


def test_a_prefix_has_the_value_of_its_last_token():
    model = Decoder(tiny_config(16, 64))
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    with pytest.raises(ValueError, match="no reward head"):
        prefix_verifier(model, params)
    params = add_reward_head(jax.random.key(1), params, model.config.hidden_size)
    rng = np.random.default_rng(0)
    prefixes = [tuple(rng.integers(1, 16, size).tolist()) for size in (3, 20, 1, 7, 12)]
    found = prefix_verifier(model, params, at_once=2)(prefixes)
    for prefix, value in zip(prefixes, found, strict=True):
        tokens = np.array(prefix)[None, None]
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
        batch["positions"] = np.arange(len(prefix))[None, None]
        alone = token_rewards(model.forward, params, batch)[0, 0, -1]
        assert value == pytest.approx(float(jax.nn.sigmoid(alone)), abs=1e-5)
