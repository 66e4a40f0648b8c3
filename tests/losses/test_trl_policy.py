"""Policy losses against TRL's GRPOTrainer (trl_policy.json, made by make_trl_policy_fixture.py)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import losses
from jaxft.objectives import policy
from jaxft.rl import token_losses as tokens

TRL = json.loads(pathlib.Path(__file__).with_name("trl_policy.json").read_text())
INPUTS = {name: jnp.asarray(x) for name, x in TRL["inputs"].items()}
MASK = INPUTS["mask"] > 0
BATCH = {
    "completion_mask": MASK,
    "sampler_log_probs": INPUTS["sampler"],
    "advantages": INPUTS["advantages"],
}


def reduced(token_loss, reduction=policy.token_mean):
    def loss(log_probs):
        values, _ = token_loss(log_probs, INPUTS["old"], BATCH)
        return reduction(values, MASK).value

    return loss


def top_entropy(log_probs, old, batch):
    loss, shown = tokens.clipped()(log_probs, old, batch)
    return jnp.where(losses.most_uncertain(INPUTS["entropies"], MASK, 0.3), loss, 0.0), shown


def corrected_kl(log_probs, old, batch):
    loss, shown = tokens.clipped()(log_probs, old, batch)
    ratio = jnp.exp(losses.log_ratio(log_probs, old))
    return loss + 0.2 * ratio * losses.kl_k3(log_probs, INPUTS["ref"]), shown


CASES = {
    "sapo": reduced(tokens.soft_gated(), policy.sequence_mean),
    "vespo": reduced(tokens.gamma_weighted()),
    "vespo, corrected": reduced(tokens.gamma_weighted(policy.token_correction(1.2))),
    "luspo": reduced(tokens.sequence_clipped(0.2, 0.2), policy.sequence_sum),
    "cispo": reduced(tokens.weight_clipped(1.1)),
    "off_policy_mask": reduced(tokens.off_policy_masked(tokens.clipped(), 0.01)),
    "top_entropy": reduced(top_entropy),
    "corrected_kl": reduced(corrected_kl),
}


@pytest.mark.parametrize("name", TRL["cases"])
def test_losses_and_gradients_are_those_of_trl(name):
    value, slope = jax.value_and_grad(CASES[name])(INPUTS["log_probs"])
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    close(value, TRL["cases"][name]["loss"])
    close(slope, TRL["cases"][name]["gradient"])
    plain = jax.grad(reduced(tokens.clipped()))(INPUTS["log_probs"])
    assert not np.allclose(slope, plain, atol=1e-3), "the case does not show the option"


def test_sequence_mask_keeps_whole_sequences_in_the_band():
    old, sampled = jnp.log(jnp.array([[[0.5, 0.8], [0.9, 0.9]], [[0.5, 0.4], [0.4, 0.9]]]))
    mask = jnp.ones((2, 2), bool)
    weights = policy.sequence_mask(0.5, 2.2)(old, sampled, mask)
    np.testing.assert_allclose(weights, [[2.0, 2.0], [0.0, 0.0]], rtol=1e-5)
    weights = policy.token_mask(0.5, 2.1)(old, sampled, mask)
    np.testing.assert_allclose(weights, [[1.0, 2.0], [0.0, 1.0]], rtol=1e-5)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: losses.most_uncertain(INPUTS["old"], MASK, 0.0), "share must lie in"),
        (lambda: policy.sequence_mask(2.0, 1.0)(INPUTS["old"], INPUTS["old"], MASK), "low < high"),
        (lambda: losses.sapo_loss(MASK * 1.0, MASK * 1.0, temperature_pos=0.0), "positive, got 0"),
        (lambda: losses.gamma_weights(MASK * 1.0, MASK * 1.0, lambda_neg=0.0), "λ positive"),
        (lambda: reduced(tokens.weight_clipped(0.0))(INPUTS["old"]), "clip_high must be positive"),
        (
            lambda: reduced(tokens.off_policy_masked(tokens.clipped(), 0.0))(INPUTS["old"]),
            "threshold must be positive",
        ),
    ],
)
def test_bad_numbers_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
