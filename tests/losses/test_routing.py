"""Losses of routers against transformers, and in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.losses import balance_loss, expert_load, router_z_loss

torch = pytest.importorskip("torch", reason="needs torch: pip install 'jaxft[test]'")


def test_balance_loss_is_that_of_transformers_without_padding():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 2, 5, 4)).astype(np.float32), np.ones((2, 5), np.float32)
    mask[1, 3:] = 0
    flat = tuple(torch.tensor(layer.reshape(10, 4)) for layer in logits)
    expected = load_balancing_loss_func(flat, 4, 2, torch.tensor(mask)).item()
    logits, mask = jnp.asarray(logits), jnp.asarray(mask)
    load, tokens = expert_load(jax.lax.top_k(logits, 2)[1], mask, experts=4)
    assert float(jnp.sum(load)) == 2 * float(tokens) == 2 * 3 * 8
    losses = balance_loss(logits, load / tokens)
    assert float(jnp.sum(losses * mask) / jnp.sum(mask)) == pytest.approx(expected, rel=1e-5)


def test_even_routers_have_the_least_balance_loss_and_z_is_the_square_of_the_log_partition():
    logits, mask = jnp.zeros((2, 1, 3, 4)), jnp.ones((1, 3))
    np.testing.assert_allclose(balance_loss(logits, jnp.full(4, 0.5)), 2.0 * mask)
    np.testing.assert_allclose(router_z_loss(logits), np.log(4) ** 2 * mask, rtol=1e-6)
    gradient = jax.grad(lambda share: jnp.sum(balance_loss(logits, share)))(jnp.full(4, 0.5))
    assert not gradient.any()
