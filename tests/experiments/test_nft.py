"""NFT's script: its identity is exact, its arms are what they are called, its judge can fail."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments.papers import nft
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import completion_log_probs, policy_gradient
from tests.small_models import start


def test_smoke(tmp_path):
    assert nft.main(nft.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert all(claim["holds"] for claim in metrics["claims"])  # the identity: no training in it
    assert (tmp_path / "nft.png").stat().st_size > 1000


REWARDS = jnp.array([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])  # three groups of four


@pytest.fixture(scope="module")
def coefficients():
    """name -> [12], c_i of ∇loss_i = -c_i ∇log π of answers of one token, which is always the same."""
    config = tiny_config(vocab_size=5, max_length=8)
    small = dict(hidden_size=16, intermediate_size=16, head_dim=4, num_layers=1)
    model = Decoder(dataclasses.replace(config, **small))
    params = start(model)
    methods = nft.algorithms(functools.partial(policy_gradient, model.forward), 4)
    rows = {
        "tokens": jnp.tile(jnp.array([[1, 2]]), (12, 1)),
        "positions": jnp.tile(jnp.arange(2), (12, 1)),
        "segment_ids": jnp.ones((12, 2), jnp.int32),
        "completion_mask": jnp.ones((12, 1), bool),
        "sampler_log_probs": jnp.zeros((12, 1)),
    }
    log_prob = lambda p: completion_log_probs(
        model.forward, p, jax.tree.map(lambda x: x[:1], rows)
    )[0, 0]
    direction = ravel_pytree(jax.grad(log_prob)(params))[0]

    @functools.cache
    def of(name):
        credit, objective = methods[name]
        batch = rows | credit(REWARDS, rows)
        alone = lambda row: jax.tree.map(lambda x: x[None], row)
        slope = lambda row: jax.grad(lambda p: objective(p, alone(row), None)[0])(params)
        grads = jax.jit(jax.vmap(lambda row: ravel_pytree(slope(row))[0]))(batch)
        return -(grads @ direction) / (direction @ direction)

    return of


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("NFT", lambda r: 1 - r, lambda r: -r),
        ("Dr. GRPO", lambda r: 1 - r, lambda r: -r),
        ("NFT, GRPO's weight", lambda r: ((1 - r) / r) ** 0.5, lambda r: -((r / (1 - r)) ** 0.5)),
        ("NFT, weight 1", lambda r: 1.0, lambda r: -r / (1 - r)),
        ("NFT, λ = 0.5", lambda r: 1 - r, lambda r: -r / 2),
        ("RFT", lambda r: 1.0, lambda r: 0.0),
        ("wrong answers alone", lambda r: 0.0, lambda r: -r),
    ],
)
def test_on_policy_each_answer_weighs_what_the_method_says(coefficients, name, right, wrong):
    low, high = 0.25, 0.75  # shares of right answers; the third group has no contrast
    expected = [right(low)] + [wrong(low)] * 3 + [right(high)] * 3 + [wrong(high)] + [0] * 4
    np.testing.assert_allclose(coefficients(name), expected, atol=1e-3)


def test_grpo_and_dapo_are_alike_on_policy(coefficients):
    # The deviation of 1, 0, 0, 0 among 4, unbiased, is a half.
    np.testing.assert_allclose(coefficients("GRPO")[:4], [1.5, -0.5, -0.5, -0.5], rtol=1e-3)
    np.testing.assert_allclose(coefficients("GRPO"), coefficients("DAPO"), atol=1e-4)


@pytest.mark.parametrize(
    "name, change, fails",
    [
        ("NFT", {}, []),
        ("NFT", {"pass@1": 0.4}, [1, 2]),
        ("GRPO", {"pass@1": 0.66}, [2]),
        ("GRPO", {"entropy": 0.4}, [3]),
        ("wrong answers alone", {"pass@1": 0.45}, [4]),
    ],
)
def test_the_judge_can_fail(name, change, fails):
    methods = {m: {"pass@1": 0.6, "entropy": 0.3} for m in nft.METHODS}
    methods[name] = methods[name] | change
    runs = [
        {"start": 0.45 + d, "identity": {"x": 1e-7}, "methods": methods}
        for d in (0.0, 0.002, -0.002)
    ]
    assert [i for i, c in enumerate(nft.judge(runs)) if not c.holds] == fails
    runs[1]["identity"] = {"x": 0.1}
    assert not nft.judge(runs)[0].holds
