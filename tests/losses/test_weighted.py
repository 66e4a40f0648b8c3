"""DCO, OTR, DFT and unlikelihood."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import losses


def close(ours, theirs, **tolerance):
    tolerance = dict(rtol=1e-5, atol=1e-6) | tolerance
    chex.assert_trees_all_close(ours, jnp.asarray(theirs, jnp.float32), **tolerance)


def logits_and_targets(batch=2, length=5, vocabulary=6):
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=(batch, length, vocabulary)), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, vocabulary, (batch, length)))


def test_unlikelihood_is_a_loop():
    logits, targets = logits_and_targets(vocabulary=3)  # few tokens, so that some come again
    mask = np.ones((2, 5), bool)
    mask[0, 1] = mask[1, 4] = False
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    slow = np.zeros((2, 5))
    for b in range(2):
        for t in range(5):
            earlier = {int(targets[b, s]) for s in range(t) if mask[b, s]} - {int(targets[b, t])}
            if mask[b, t]:
                slow[b, t] = -sum(np.log1p(-p[b, t, c]) for c in earlier)
    assert (slow > 0).sum() > 3
    close(losses.repetition_unlikelihood(logits, targets, jnp.asarray(mask)), slow)
    grad = jax.grad(lambda u: losses.unlikelihood_loss(u).sum())(jnp.array([0.0, -1e-9, -50.0]))
    assert jnp.isfinite(grad).all()


def test_the_weights_of_coverage_are_the_derivative_of_failing_n_times():
    p = jnp.array([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9])
    close(
        losses.coverage_weight(jnp.log(p), 4),
        [0.99985, 0.9985, 0.984975, 0.847921, 0.266667, 0.0036],
        rtol=1e-4,
    )
    for n in (2, 16, 256):
        miss = lambda log_p, n=n: -np.log(-np.expm1(n * np.log1p(-np.exp(log_p))))
        x, h = np.log(np.asarray(p, np.float64)), 1e-5
        slope = (miss(x - h) - miss(x + h)) / (2 * h)
        ours = losses.coverage_weight(jnp.log(p), n)
        near = np.asarray(n * p) < 5  # beyond, the difference quotient has no digits left
        chex.assert_trees_all_close(ours[near], slope[near].astype(np.float32), rtol=1e-3)
        assert (jnp.diff(ours) <= 0).all() and (ours >= 0).all() and (ours <= 1).all()


def test_dco_of_steps_is_dco_of_each_step_as_a_row():
    log_probs = -jnp.array([[0.5, 2.0, 1.0, 0.1, 0.7], [1e-4, 3.0, 0.2, 0.3, 0.4]])
    steps = jnp.array([[-1, 0, 0, 1, 7], [2, 0, 2, -1, 2]])
    got = losses.dco_step_loss(log_probs, steps, num_samples=8, num_steps=3)
    slow = np.zeros((2, 3))
    for row, step in ((0, 0), (0, 1), (1, 0), (1, 2)):
        mask = (steps[row] == step)[None] * 1.0
        slow[row, step] = losses.dco_loss(log_probs[row][None], mask, num_samples=8)[0]
    close(got, slow)
    assert got[0, 2] == got[1, 1] == 0  # not there
    whole = losses.dco_step_loss(log_probs, jnp.zeros((2, 5), int), num_samples=8, num_steps=1)
    close(whole[:, 0], losses.dco_loss(log_probs, jnp.ones((2, 5)), num_samples=8))


def test_dco_with_one_sample_is_cross_entropy_and_solved_examples_are_silent():
    log_probs, mask = -jnp.array([[0.5, 2.0, 1.0], [1e-4, 1e-4, 7.0]]), jnp.ones((2, 3))
    mask = mask.at[1, 2].set(0.0)
    mean = -jnp.sum(mask * log_probs, axis=1) / jnp.array([3.0, 2.0])
    assert (losses.dco_loss(log_probs, mask, num_samples=1) == mean).all()
    run = lambda x: losses.dco_loss(x, mask, num_samples=64).sum()
    grad = jax.grad(run)(log_probs)
    weight = losses.coverage_weight(jnp.float32(-3.5), 64)
    close(grad, jnp.array([[-weight / 3] * 3, [0.0] * 3]))
    huge = jax.grad(lambda x: losses.dco_loss(x, mask, num_samples=4).sum())(
        jnp.array([[0.0, 0.0, 0.0], [-800.0, 0.0, 0.0]])
    )
    assert jnp.isfinite(huge).all()
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        losses.coverage_weight(log_probs, 0)


@pytest.mark.parametrize(
    "n, expected",
    [(1, (0.6, 0.3, 0.1)), (4, (0.4664, 0.3518, 0.1818)), (16, (0.3699, 0.3401, 0.2901))],
)
def test_dco_spreads_over_three_answers(n, expected):
    q = jnp.array([0.6, 0.3, 0.1])

    def loss(logits):
        log_p = jax.nn.log_softmax(logits)[:, None]
        return jnp.sum(q * losses.dco_loss(log_p, jnp.ones((3, 1)), num_samples=n))

    step = lambda _, x: x - 2.0 * jax.grad(loss)(x)
    logits = jax.lax.fori_loop(0, 3000, step, jnp.zeros(3))
    close(jax.nn.softmax(logits), expected, rtol=0, atol=2e-3)


THETA = jnp.asarray(np.random.default_rng(0).normal(size=6), jnp.float32)


def expected_gradient(logits, target, **options):
    return jax.grad(lambda z: losses.otr_expected_loss(z, jnp.int32(target), **options))(logits)


def test_expected_otr_has_the_closed_form():
    close(expected_gradient(THETA, 2),
          [0.043542, 0.034424, -0.198582, 0.042722, 0.023871, 0.054023], rtol=1e-4)  # fmt: skip
    q = jax.nn.softmax(THETA / 1.3)
    c = jnp.where(jnp.arange(6) == 2, q, -0.1 * q)
    close(expected_gradient(THETA, 2), -c + jax.nn.softmax(THETA) * c.sum())
    close(expected_gradient(THETA, 2, kappa=1.0, beta=1.0), np.zeros(6))
    dft = jax.grad(lambda z: losses.dft_loss(jax.nn.log_softmax(z)[2]))(THETA)
    close(expected_gradient(THETA, 2, kappa=1.0, beta=0.0), dft)


def test_otr_is_unbiased_and_its_variance_falls_with_samples():
    logits, targets, mask = THETA[None, None], jnp.full((1, 1), 2), jnp.ones((1, 1), bool)

    def gradients(samples, count):
        loss = lambda z, key: losses.otr_loss(key, z, targets, mask, num_samples=samples).sum()
        keys = jax.random.split(jax.random.key(samples), count)
        return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(logits, keys)[:, 0, 0]

    few, many = gradients(4, 2000), gradients(64, 500)
    error = few.std(0) / np.sqrt(2000)
    assert (jnp.abs(few.mean(0) - expected_gradient(THETA, 2)) < 4 * error).all()
    ratio = few.var(0).sum() / many.var(0).sum()
    assert 16 * 0.7 < ratio < 16 * 1.4


def test_otr_of_masked_positions_is_zero_and_rows_have_their_own_samples():
    logits = jnp.broadcast_to(THETA, (2, 3, 6))
    targets, mask = jnp.full((2, 3), 2), jnp.array([[True, True, False]] * 2)
    run = jax.jit(functools.partial(losses.otr_loss, num_samples=8))
    loss = run(jax.random.key(0), logits, targets, mask)
    assert (loss[:, 2] == 0).all() and (loss[:, :2] != 0).all()
    assert len(set(np.asarray(loss[:, :2]).ravel().tolist())) > 1
    certain = jnp.zeros((1, 1, 6)).at[0, 0, 2].set(100.0)
    one = lambda z: run(jax.random.key(0), z, targets[:1, :1], mask[:1, :1]).sum()
    close(jax.grad(one)(certain), np.zeros((1, 1, 6)))
    for options, message in (
        (dict(num_samples=0), "num_samples must be at least 1"),
        (dict(kappa=0.0), "kappa must be positive"),
        (dict(beta=2.0), "beta must be at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.otr_loss(jax.random.key(0), logits, targets, mask, **options)


def test_dft_is_cross_entropy_weighted_by_the_likelihood():
    logits, targets = logits_and_targets()
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    close(losses.dft_loss(-ce), jnp.exp(-ce) * ce)
    grad = jax.grad(lambda x: losses.dft_loss(x).sum())(-ce)
    close(grad, -jnp.exp(-ce))


def test_sampled_otr_meets_the_closed_form_and_its_parts():
    positive = [0.039302, 0.030369, -0.178204, 0.038492, 0.020285, 0.049757]
    close(expected_gradient(THETA, 2, beta=0.0), positive, rtol=1e-4)
    loss = lambda z: losses.otr_loss(
        jax.random.key(0), z, jnp.full((1, 1), 2), jnp.ones((1, 1), bool), num_samples=200_000
    ).sum()
    many = jax.jit(jax.grad(loss))(THETA[None, None])[0, 0]
    close(many, expected_gradient(THETA, 2), rtol=0, atol=1.2e-3)


def test_otr_metrics_count_the_samples_of_the_loss():
    logits, targets = logits_and_targets()
    mask, key = jnp.ones(targets.shape, bool), jax.random.key(1)
    found = losses.otr_metrics(key, logits, targets, num_samples=4, kappa=1.0)
    # With β = 0 the loss is the hit rate times the cross-entropy.
    loss = losses.otr_loss(key, logits, targets, mask, num_samples=4, kappa=1.0, beta=0.0)
    close(loss / losses.cross_entropy(logits, targets), found["hit_rate"])
    close(found["missed"], found["hit_rate"] == 0)
    assert 0 < found["missed"].mean() < 1
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    close(found["entropy"], -(p * np.log(p)).sum(-1))
    # A row's samples follow its place: rows that change places do not take them along.
    swapped = losses.otr_metrics(key, logits[::-1], targets[::-1], num_samples=4, kappa=1.0)
    assert (swapped["hit_rate"][::-1] != found["hit_rate"]).any()
    close(swapped["entropy"][::-1], found["entropy"])
