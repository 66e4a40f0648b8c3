"""Divergences from a teacher: TRL's numbers, closed forms in float64, fused forms beside plain ones."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.losses import (
    generalised_jsd,
    linear_jsd,
    linear_top_k_jsd,
    linear_top_log_probs,
    top_k_jsd,
)
from jaxft.weights import Frozen, LoraWeight, Transposed

TRL = json.loads((pathlib.Path(__file__).parent / "trl_gkd.json").read_text())
BETAS = [0.0, 0.3, 0.5, 1.0]


def test_the_divergence_and_its_gradient_are_trls():
    student, teacher, counted = (jnp.asarray(TRL[n]) for n in ("student", "teacher", "counted"))

    def mean(logits, beta, temperature):
        tokens = generalised_jsd(logits, teacher, beta=beta, temperature=temperature)
        return jnp.sum(tokens * counted) / jnp.sum(counted), tokens

    run = jax.value_and_grad(mean, has_aux=True)
    settings = [(case["beta"], case["temperature"]) for case in TRL["cases"]]
    found = jax.jit(lambda x: [run(x, *setting) for setting in settings])(student)
    for case, ((loss, tokens), gradient) in zip(TRL["cases"], found, strict=True):
        np.testing.assert_allclose(tokens, case["tokens"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(loss, case["mean"], rtol=2e-5)
        np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-4, atol=1e-6)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), -1)


def closed(p, t, beta):
    """The definition, of probabilities in float64."""
    m = beta * t + (1 - beta) * p
    return {0.0: kl(t, p), 1.0: kl(p, t)}.get(beta, beta * kl(t, m) + (1 - beta) * kl(p, m))


def test_the_closed_form_also_with_padded_vocabularies():
    rng = np.random.default_rng(0)
    student, teacher = (8 * rng.normal(size=(3, n)) for n in (9, 11))
    p, t = (np.exp(log_softmax(x[:, :9] / 1.5)) for x in (student, teacher))
    run = lambda *x: [generalised_jsd(*x, beta=beta, temperature=1.5) for beta in BETAS]
    for beta, found in zip(BETAS, jax.jit(run)(student, teacher), strict=True):
        np.testing.assert_allclose(found, closed(p, t, beta), rtol=1e-4, atol=1e-6)


def test_a_token_of_no_mass_in_either_changes_nothing():
    """Its logits are -infinity: neither a value nor a gradient is NaN."""
    student, teacher = 3 * np.random.default_rng(0).normal(size=(2, 3, 9))
    keep = np.arange(9) != 4
    holes = (np.where(keep, x, -np.inf) for x in (student, teacher))
    of = lambda beta: jax.value_and_grad(lambda s, t: jnp.sum(generalised_jsd(s, t, beta=beta)))
    run = jax.jit(lambda *x: [of(beta)(*x) for beta in BETAS])
    found = [(value, gradient[:, keep]) for value, gradient in run(*holes)]
    wanted = run(student[:, keep], teacher[:, keep])
    chex.assert_trees_all_close(found, wanted, rtol=1e-4, atol=1e-6)


def draw(length=7, features=6, vocabulary=11, teacher_vocabulary=13, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    weights = rng.random((2, length)) * (rng.random((2, length)) < 0.6)
    student = array(2, length, features), array(features, vocabulary)
    teacher = array(2, length, features + 2), array(features + 2, teacher_vocabulary)
    return student, teacher, jnp.asarray(weights, jnp.float32)


def capped(hidden, head, cap):
    logits = hidden @ (head.to_dense() if hasattr(head, "to_dense") else head)
    return cap * jnp.tanh(logits / cap)


@pytest.mark.parametrize("beta, chunk", [(0.0, 64), (0.3, 3)])
def test_the_fused_form_equals_the_plain_one_with_gradients(beta, chunk):
    """For a trained head, a tied one and a frozen one with LoRA; the teacher has none."""
    (hidden, head), (teacher_hidden, teacher_head), weights = draw()
    options, given = dict(beta=beta, temperature=1.3), dict(softcap=2.0, teacher_softcap=3.0)

    def fused(hidden, head, teacher_hidden, teacher_head):
        return linear_jsd(
            hidden, head, teacher_hidden, teacher_head, weights, chunk=chunk, **options, **given
        )

    def plain(hidden, head, teacher_hidden, teacher_head):
        teacher = jax.lax.stop_gradient(capped(teacher_hidden, teacher_head, 3.0))
        return jnp.sum(weights * generalised_jsd(capped(hidden, head, 2.0), teacher, **options))

    lora = LoraWeight(Frozen(head), 0.3 * jnp.ones((6, 2)), 0.2 * jnp.ones((2, 11)))
    heads = [head, Transposed(head.T), lora]
    run = lambda fn: [
        jax.value_and_grad(fn, (0, 1, 2, 3))(hidden, w, teacher_hidden, teacher_head)
        for w in (heads if beta == 0.3 else heads[:1])
    ]
    found, wanted = jax.jit(lambda: (run(fused), run(plain)))()
    trained = lambda out: [
        (value, g[0], (g[1].a, g[1].b) if isinstance(g[1], LoraWeight) else g[1], g[2:])
        for value, g in out
    ]
    chex.assert_trees_all_close(trained(found), trained(wanted), rtol=2e-5, atol=1e-6)
    assert not any(np.any(x) for _, g in found for x in g[2:])


def test_listed_tokens_and_a_tail_are_the_definition_of_fewer_events():
    rng = np.random.default_rng(1)
    logits, teacher = rng.normal(size=(6, 11)), 3 * rng.normal(size=(6, 11))
    log_t, teacher = log_softmax(teacher), jnp.asarray(teacher)
    ids = np.argsort(-log_t, axis=-1)[:, :4]
    listed = np.take_along_axis(log_t, ids, -1)

    def events(x):
        top = np.take_along_axis(x, ids, -1)
        return np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)

    # Entries that list nothing by their log-prob, and ids that the student has not: those join the tail.
    column = lambda x: np.full((6, 1), x)
    ids_too = np.concatenate([ids, column(0), column(11)], axis=1)
    more = np.concatenate([listed, column(-np.inf), column(-2.0)], axis=1)

    def run(logits, beta):
        whole = generalised_jsd(logits, teacher, beta=beta)
        of = lambda *entries: top_k_jsd(logits, *entries, beta=beta)
        pairs = [tuple(map(jnp.asarray, pair)) for pair in ((ids, listed), (ids_too, more))]
        return *(of(*pair) for pair in pairs), whole

    p, t = events(np.exp(log_softmax(logits))), events(np.exp(log_t))
    found = jax.jit(lambda x: [run(x, beta) for beta in BETAS])(logits)
    for beta, (some, same, whole) in zip(BETAS, found, strict=True):
        np.testing.assert_allclose(some, closed(p, t, beta), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(same, some, rtol=1e-6)
        assert np.all(some < whole)


@pytest.mark.parametrize("beta, chunk", [(0.3, 2), (1.0, 64)])
def test_all_tokens_listed_are_the_whole_divergence_and_its_gradient(beta, chunk):
    (hidden, head), (teacher_hidden, teacher_head), weights = draw(teacher_vocabulary=11)
    options = dict(beta=beta, temperature=0.8, chunk=chunk)

    @jax.jit
    def run(hidden, head):
        ids, log_probs = linear_top_log_probs(
            teacher_hidden, teacher_head, 11, temperature=0.8, softcap=3.0, chunk=chunk
        )
        top = lambda *args: linear_top_k_jsd(*args, ids, log_probs, weights, softcap=2.0, **options)
        whole = lambda *args: linear_jsd(
            *args,
            teacher_hidden,
            teacher_head,
            weights,
            softcap=2.0,
            teacher_softcap=3.0,
            **options,
        )
        return [jax.value_and_grad(fn, (0, 1))(hidden, head) for fn in (top, whole)]

    chex.assert_trees_all_close(*run(hidden, head), rtol=2e-5, atol=2e-6)


def test_the_gradient_of_listed_tokens_is_that_of_finite_differences():
    (hidden, head), _, _ = draw(length=2)
    logits, ids = hidden @ head, jnp.tile(jnp.array([3, 7]), (2, 2, 1))
    run = jax.jit(lambda x: jnp.sum(top_k_jsd(x, ids, jnp.log(0.3 + 0.1 * ids / 7), beta=0.4)))
    gradient, step = jax.jit(jax.grad(run))(logits), 1e-2
    for at in [(0, 0, 3), (1, 1, 7), (0, 1, 5)]:
        move = jnp.zeros(logits.shape).at[at].set(step)
        difference = (run(logits + move) - run(logits - move)) / (2 * step)
        np.testing.assert_allclose(gradient[at], difference, rtol=2e-2, atol=1e-4)


def test_a_student_that_agrees_with_its_teacher_has_no_gradient():
    """The listed tokens have all but 1e-9 of the mass: float32 does not resolve that tail from 0."""
    logits = jnp.array([[30.0, 8.0, 0.0, 0.0, -3.0]])
    ids, log_probs = jnp.array([[0, 1]]), jnp.array([[0.0, -22.0]])
    of = lambda beta: jax.value_and_grad(lambda x: jnp.sum(top_k_jsd(x, ids, log_probs, beta=beta)))
    for value, gradient in jax.jit(lambda x: [of(beta)(x) for beta in BETAS])(logits):
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("top", [False, True])
def test_no_model_s_logits_of_all_tokens_are_held(top):
    (hidden, head), teacher, _ = draw(64, vocabulary=4096, teacher_vocabulary=4096)
    weights = jnp.ones((2, 64))
    ids, log_probs = jnp.zeros((2, 64, 1), jnp.int32), jnp.full((2, 64, 1), -1.0)
    fused = lambda h: linear_jsd(h, head, *teacher, weights, chunk=4)
    listed = lambda h: linear_top_k_jsd(h, head, ids, log_probs, weights, chunk=4)
    compiled = jax.jit(jax.grad(listed if top else fused)).lower(hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 64 * 4096 * 4


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beta=-0.1), r"beta must lie in \[0, 1\], got -0.1"),
        (dict(beta=1.1), "got 1.1; 0 is the forward KL"),
        (dict(temperature=0.0), "temperature must be positive and finite, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    (hidden, head), teacher, weights = draw()
    with pytest.raises(ValueError, match=message):
        linear_jsd(hidden, head, *teacher, weights, **options)
    with pytest.raises(ValueError, match=r"k must lie in 1..11, got 12"):
        linear_top_log_probs(hidden, head, 12)
