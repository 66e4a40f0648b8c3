"""A long prompt passes the MLPs in parts."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from jaxft.adapters import ALL_LINEAR, PFEIFFER, adapt, bottleneck, lora
from jaxft.models import Experts, blocks
from tests.small_models import GEMMA, KEY, LLAMA, base, large, trained

EXPERTS = dataclasses.replace(LLAMA, experts=Experts(4, 2, 8), num_layers=1)


@pytest.mark.parametrize("config", [GEMMA, EXPERTS], ids=["adapters", "experts"])
def test_a_prompt_in_parts_gives_what_it_gives_whole(config, monkeypatch):
    """The last part is shorter; weights and adapters are read as by the modules themselves."""
    model, params = base(config)
    params = large(params)
    if config.experts is None:
        params = trained(adapt(KEY, params, {ALL_LINEAR: lora(2, 4.0), PFEIFFER: bottleneck(3)}))
    tokens = np.random.default_rng(0).integers(0, 29, (2, 21), np.int32)
    valid = np.arange(21)[None] >= np.array([[6], [0]])
    given = dict(
        positions=np.maximum(np.cumsum(valid, 1) - 1, 0), segment_ids=valid.astype(np.int32)
    )

    def run():
        call = lambda params, cache: model.apply({"params": params}, tokens, cache=cache, **given)
        found = jax.jit(call)(params, model.init_cache(2, 24))
        return found.hidden, found.routing, found.cache

    whole = run()
    monkeypatch.setattr(blocks, "TOKENS", 8)
    chex.assert_trees_all_close(run(), whole, rtol=1e-4, atol=1e-4)
