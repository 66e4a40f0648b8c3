"""Policy-gradient losses against worked examples, enumeration and limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft import losses
from jaxft.rl import advantages as adv

LOG_PROBS = jnp.array([[-0.7, -1.1, -1.0], [-2.3, 0.0, 0.0]])
OLD = jnp.array([[-1.0, -1.0, -1.0], [-2.0, 0.0, 0.0]])
MASK = jnp.array([[True, True, True], [True, False, False]])
ADVANTAGES = jnp.array([[1.0], [-1.0]]) * jnp.ones((2, 3))


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=tolerance, atol=tolerance)


def test_clipped_surrogate_of_a_worked_example():
    ratio = losses.log_ratio(LOG_PROBS, OLD)
    token = losses.clipped_surrogate(ratio, ADVANTAGES)
    close(token[0], [-1.2, -0.904837, -1.0])
    close(token[1, 0], 0.8)
    close(losses.clipped_surrogate(ratio, ADVANTAGES, clip_high=0.28)[0, 0], -1.28)
    low, high = losses.clipped_tokens(ratio, ADVANTAGES, 0.2, 0.2)
    assert low[MASK].tolist() == [False, False, False, True]
    assert high[MASK].tolist() == [True, False, False, False]
    four = functools.partial(losses.clipped_surrogate, jnp.log(jnp.array([4.0])), -jnp.ones(1))
    close(four(), [4.0])
    close(four(dual_clip=3.0), [3.0])


def test_sequence_ratio_of_a_worked_example():
    ratio = losses.sequence_log_ratio(LOG_PROBS, OLD, MASK)
    close(jnp.exp(ratio[:, 0]), [1.068939, 0.740818])
    loss = losses.clipped_surrogate(ratio, ADVANTAGES, clip_low=3e-4, clip_high=4e-4)
    close(jnp.mean(loss[:, 0]), -0.00035, 1e-6)

    # Averaged over a sequence, value and gradient are those of the sequence's own ratio.
    def sequence(log_probs):
        mean = jnp.sum((log_probs - OLD) * MASK, axis=1) / jnp.sum(MASK, axis=1)
        return jnp.sum(jnp.exp(mean) * ADVANTAGES[:, 0])

    def token(log_probs):
        ratio = jnp.exp(losses.sequence_log_ratio(log_probs, OLD, MASK)) * ADVANTAGES
        return jnp.sum(jnp.sum(ratio * MASK, axis=1) / jnp.sum(MASK, axis=1))

    close(token(LOG_PROBS), sequence(LOG_PROBS))
    close(jax.grad(token)(LOG_PROBS), jax.grad(sequence)(LOG_PROBS))


def test_on_policy_all_have_the_gradient_of_reinforce(key):
    log_probs, advantages = jax.random.normal(key, (2, 3, 5))
    mask = jnp.ones((3, 5), bool)
    old = jax.lax.stop_gradient(log_probs)
    grad = lambda loss: jax.grad(lambda x: jnp.sum(loss(x)))(log_probs)
    wanted = grad(lambda x: losses.reinforce_loss(x, advantages))
    surrogate = losses.clipped_surrogate
    close(grad(lambda x: surrogate(losses.log_ratio(x, old), advantages)), wanted)
    close(grad(lambda x: losses.cispo_loss(x, old, advantages)), wanted)
    gspo = lambda x: surrogate(losses.sequence_log_ratio(x, old, mask), advantages)
    close(grad(gspo), wanted)
    # Off-policy with no clip, the importance-weighted gradient.
    far = lambda x: surrogate(
        losses.log_ratio(x, old - 1.0), advantages, clip_low=1.0, clip_high=jnp.inf
    )
    close(grad(far), np.e * wanted)


def test_surrogate_equals_torch(key):
    log_probs, old, advantages = jax.random.normal(key, (3, 40))
    mine = lambda x: jnp.sum(
        losses.clipped_surrogate(losses.log_ratio(x, old), advantages, clip_high=0.28)
    )
    value, gradient = jax.value_and_grad(mine)(log_probs)
    x, a, o = (torch.tensor(np.asarray(y)) for y in (log_probs, advantages, old))
    x.requires_grad_()
    ratio = torch.exp(x - o)
    loss = -torch.min(ratio * a, torch.clamp(ratio, 0.8, 1.28) * a).sum()
    loss.backward()
    close(value, loss.item())
    close(gradient, x.grad.numpy())


def test_kl_estimates_of_a_worked_example_and_their_gradients(key):
    log_probs, ref = jnp.array([-1.0, -0.5]), jnp.array([-1.2, -0.4])
    close(losses.kl_k1(log_probs, ref), [0.2, -0.1])
    close(losses.kl_k2(log_probs, ref), [0.02, 0.005])
    close(losses.kl_k3(log_probs, ref), [0.018731, 0.005171])
    # By enumeration of a softmax: expectations under the policy, its probabilities held fixed.
    logits, ref_logits = jax.random.normal(key, (2, 5))
    ref = jax.nn.log_softmax(ref_logits)
    p = jax.nn.softmax(logits)
    expected = lambda f, x: jnp.sum(p * f(jax.nn.log_softmax(x)))
    forward, reverse = losses.kl_divergence(logits, ref), losses.kl_divergence
    close(expected(lambda lp: losses.kl_k1(lp, ref), logits), forward)
    close(expected(lambda lp: losses.kl_k3(lp, ref), logits), forward)
    gradient = lambda f: jax.grad(lambda x: expected(f, x))(logits)
    close(gradient(lambda lp: losses.kl_k1(lp, ref)), jnp.zeros(5))
    close(gradient(lambda lp: losses.kl_k2(lp, ref)), jax.grad(reverse)(logits, ref))
    close(gradient(lambda lp: losses.kl_k3(lp, ref)), jax.grad(reverse, argnums=1)(ref, logits))
    weighted = lambda lp: jnp.exp(lp - jnp.log(p)) * losses.kl_k3(lp, ref)
    close(gradient(weighted), jax.grad(reverse)(logits, ref))


def test_entropy_is_that_of_torch_and_in_chunks_the_same(key):
    hidden, head = jax.random.normal(key, (2, 7, 6)), jax.random.normal(key, (6, 11))
    logits = hidden @ head / 0.7
    wanted = torch.distributions.Categorical(logits=torch.tensor(np.asarray(logits))).entropy()
    close(losses.entropy(logits), wanted.numpy())
    chunked = functools.partial(losses.linear_entropy, temperature=0.7, chunk=3)
    close(chunked(hidden, head), wanted.numpy())
    gradient = jax.grad(lambda h: jnp.sum(chunked(hidden, h)))(head)
    close(gradient, jax.grad(lambda h: jnp.sum(losses.entropy(hidden @ h / 0.7)))(head), 1e-4)
    close(losses.entropy(jnp.array([0.0, -jnp.inf])), 0.0)


def test_values_lengths_and_weights_of_worked_examples():
    one = lambda x: jnp.array([x])
    close(losses.clipped_value_loss(one(0.5), one(0.2), one(1.0)), [0.18])
    close(losses.clipped_value_loss(one(0.5), one(0.2), one(1.0), clip=jnp.inf), [0.125])
    lengths = jnp.array([12000.0, 14336.0, 16384.0, 20000.0])
    close(losses.overlong_penalty(lengths, 16384, 4096), [0, -0.5, -1, -1])
    d = jnp.array([0.1, 1.2, -0.5])
    close(losses.truncated_weights(d, jnp.zeros(3)), [1.105171, 2, 0.606531])
    close(losses.banded_weights(d, jnp.zeros(3)), [1.105171, 0, 0.606531])
    mask = jnp.array([[True, False, True]])
    close(losses.truncated_sequence_weights(d[None], jnp.zeros((1, 3)), mask), [np.exp(-0.4)])
    close(losses.truncated_weights(one(0.1), one(jnp.nan)), [0.0])
    moved = lambda d: jnp.sum(losses.truncated_weights(d, jnp.zeros(3)))
    close(jax.grad(moved)(d), jnp.zeros(3))


def nft(ratios, correct, rate, **options):
    log_ratio = jnp.log(jnp.asarray(ratios))
    full = lambda x, dtype: jnp.full(log_ratio.shape, x, dtype)
    call = lambda x: losses.nft_loss(x, full(correct, bool), full(rate, jnp.float32), **options)
    return call(log_ratio), jax.grad(lambda x: jnp.sum(call(x)))(log_ratio)


def test_nft_of_a_worked_example():
    loss, gradient = nft([0.5, 1.0, 1.5, 3.0], False, 0.25)
    close(loss, [-0.154151, 0, 0, 0])
    close(gradient, [0.142857, 0.333333, 0.5, 1.0])
    loss, gradient = nft([1.5, 3.0], False, 0.25, floor=0.5)
    close(loss, -np.log([5 / 6, 0.5]))
    close(gradient, [0.6, 2.0])
    loss, gradient = nft([0.5, 2.0], True, 0.25)
    close(loss, -np.log([0.5, 2.0]))
    close(gradient, [-1.0, -1.0])
    assert not nft([0.5, 2.0], False, 0.25, negative_weight=0.0)[1].any()


def test_on_policy_nft_is_grpo_and_dr_grpo(key):
    """8 answers of a softmax over 6, three of them right."""
    logits = jax.random.normal(key, (6,))
    answers = jnp.array([0, 0, 1, 2, 5, 3, 3, 4])
    correct = (answers == 0) | (answers == 5)
    rewards, rate = correct.astype(jnp.float32), jnp.full(8, 3 / 8)
    of = lambda x: jax.nn.log_softmax(x)[answers]
    ratio = lambda x: losses.log_ratio(of(x), of(logits))
    nft = lambda x, w: jnp.sum(w * losses.nft_loss(ratio(x), correct, rate))
    policy = lambda x, a: jnp.sum(losses.clipped_surrogate(ratio(x), a))
    centred = adv.centred_advantages(rewards, 8)
    gradient = lambda f, w: jax.grad(f)(logits, w)
    close(gradient(nft, 1 - rate), gradient(policy, centred))
    biased_std = jnp.std(rewards)
    close(gradient(nft, jnp.sqrt((1 - rate) / rate)), gradient(policy, centred / biased_std))


def test_nft_finds_the_policy_of_right_answers():
    """Exact expectations over 6 answers: the minimum is the old policy restricted to right ones."""
    old = jnp.array([0.161, 0.124, 0.270, 0.158, 0.083, 0.204])
    correct = jnp.array([True, False, False, True, False, False])
    rate = jnp.full(6, 0.319)

    def loss(logits):
        ratio = losses.log_ratio(jax.nn.log_softmax(logits), jnp.log(old))
        return jnp.sum(old * losses.nft_loss(ratio, correct, rate))

    step = lambda _, x: x - 2.0 * jax.grad(loss)(x)
    found = jax.nn.softmax(jax.lax.fori_loop(0, 4000, step, jnp.log(old)))
    close(found, [0.5047, 0, 0, 0.4953, 0, 0], 2e-3)


def test_straight_through_max_has_the_gradient_of_x():
    value, gradient = jax.value_and_grad(lambda x: losses.straight_through_max(x, 1.0) ** 2)(0.3)
    close(value, 1.0)
    close(gradient, 2.0)


def test_bad_settings_are_errors():
    x = jnp.zeros(3)
    yes = jnp.ones(3, bool)
    for call, message in (
        (lambda: losses.clipped_surrogate(x, x, clip_low=-0.1), "at least 0, got -0.1"),
        (lambda: losses.clipped_surrogate(x, x, dual_clip=1.0), "must exceed 1, got 1.0"),
        (lambda: losses.nft_loss(x, yes, x, floor=0.0), "floor must be positive, got 0.0"),
        (lambda: losses.nft_loss(x, yes, x, negative_weight=-1.0), "at least 0, got -1.0"),
        (lambda: losses.clipped_value_loss(x, x, x, clip=0.0), "clip must be positive, got 0.0"),
        (lambda: losses.overlong_penalty(x, 10, 11), "needs 0 < buffer <= budget, got 11, 10"),
        (lambda: losses.truncated_weights(x, x, cap=0.0), "cap must be positive, got 0.0"),
        (lambda: losses.banded_weights(x, x, low=2.0, high=1.0), "got 2.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
