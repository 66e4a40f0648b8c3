import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from jaxft.losses import (
    cross_entropy,
    label_smoothed_cross_entropy,
    linear_cross_entropy,
    linear_log_probs,
)
from jaxft.models import Decoder, tiny_config
from jaxft.models.decoder import project
from jaxft.objectives import supervised
from jaxft.weights import (
    Frozen,
    LoraWeight,
    Transposed,
    nf4_weight,
    quantised_weight,
    to_dense,
)
from tests.small_models import start


def draw(batch, length, features=6, vocabulary=11, share=0.5):
    rng = np.random.default_rng(length)
    return (
        jnp.asarray(rng.normal(size=(batch, length, features)), jnp.float32),
        jnp.asarray(rng.normal(size=(features, vocabulary)), jnp.float32),
        jnp.asarray(rng.integers(0, vocabulary, (batch, length))),
        jnp.asarray(rng.random((batch, length)) * (rng.random((batch, length)) < share)),
    )


def plain(hidden, head, targets, weights, softcap=None):
    logits = hidden @ to_dense(head)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def test_cross_entropy_is_optax():
    hidden, head, targets, _ = draw(3, 5)
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets)
    chex.assert_trees_all_close(cross_entropy(hidden @ head, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("batch, length, chunk", [(3, 8, 4), (1, 1, 4), (2, 7, 3), (4, 5, 64)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_fused_equals_plain_with_gradients(batch, length, chunk, softcap):
    hidden, head, targets, weights = draw(batch, length)
    fused = lambda h, w: linear_cross_entropy(h, w, targets, weights, softcap=softcap, chunk=chunk)
    slow = lambda h, w: plain(h, w, targets, weights, softcap)

    @jax.jit
    def run(hidden, head):
        both = [jax.value_and_grad(fun, argnums=(0, 1))(hidden, head) for fun in (fused, slow)]
        return *both, jax.grad(lambda h: 3.0 * fused(h, head))(hidden)

    found, expected, by_hidden = run(hidden, head)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(by_hidden, 3.0 * expected[1][0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epsilon, softcap, chunk", [(0.1, None, 64), (0.7, 2.0, 3)])
def test_label_smoothing_and_its_gradients_are_torchs(epsilon, softcap, chunk):
    """Losses of single tokens, and fused for a separate head and a tied one."""
    hidden, head, targets, weights = draw(2, 7)
    h, w = (torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, head))
    logits = h @ w if softcap is None else softcap * torch.tanh(h @ w / softcap)
    flat = logits.reshape(-1, 11), torch.tensor(np.asarray(targets)).reshape(-1).long()
    each = torch.nn.functional.cross_entropy(*flat, label_smoothing=epsilon, reduction="none")
    total = (each * torch.tensor(np.asarray(weights)).reshape(-1)).sum()
    total.backward()

    options = dict(softcap=softcap, chunk=chunk, label_smoothing=epsilon)
    fused = lambda h, w: linear_cross_entropy(h, w, targets, weights, **options)
    tied = lambda h, w: fused(h, Transposed(w.T))
    run = lambda *at: [jax.value_and_grad(fun, (0, 1))(*at) for fun in (fused, tied)]
    for found in jax.jit(run)(hidden, head):
        wanted = total.item(), (h.grad.numpy(), w.grad.numpy())
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)
    given = jnp.asarray(logits.detach().numpy())
    ours = label_smoothed_cross_entropy(given, targets, label_smoothing=epsilon)
    np.testing.assert_allclose(ours.reshape(-1), each.detach().numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1"):
        linear_cross_entropy(hidden, head, targets, weights, label_smoothing=1.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_fused_with_no_and_with_all_tokens_counted(share):
    hidden, head, targets, weights = draw(2, 6, share=share)
    fused = jax.value_and_grad(lambda h: linear_cross_entropy(h, head, targets, weights, chunk=4))
    slow = jax.value_and_grad(lambda h: plain(h, head, targets, weights))
    found, expected = jax.jit(lambda h: (fused(h), slow(h)))(hidden)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_fused_reads_structured_heads():
    hidden, head, targets, weights = draw(2, 6)
    a, b = jnp.ones((6, 2)), 0.1 * jnp.ones((2, 11))
    for weight in (Transposed(head.T), Frozen(head), LoraWeight(head, a, b)):
        run = lambda fun, w=weight: jax.jit(jax.value_and_grad(fun, argnums=(0, 1)))(hidden, w)
        fused = run(lambda h, w: linear_cross_entropy(h, w, targets, weights, chunk=4))
        slow = run(lambda h, w: plain(h, w, targets, weights))
        if isinstance(weight, LoraWeight):  # The base is frozen: only `to_dense` passes a gradient.
            take = lambda result: (result[0], result[1][0], result[1][1].a, result[1][1].b)
            fused, slow = take(fused), take(slow)
        chex.assert_trees_all_close(fused, slow, rtol=1e-5, atol=1e-6)


def test_fused_never_holds_all_logits():
    hidden, head, targets, weights = draw(2, 64, vocabulary=4096, share=1.0)
    options = dict(chunk=8, label_smoothing=0.1)
    fused = jax.grad(lambda h: linear_cross_entropy(h, head, targets, weights, **options))
    temporary = jax.jit(fused).lower(hidden).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2 * 64 * 4096 * 4


@pytest.mark.parametrize("length, chunk", [(8, 4), (7, 3), (1, 64)])
def test_linear_log_probs_equal_log_softmax(length, chunk):
    hidden, head, targets, _ = draw(2, length)

    def slow(h, w):
        log_probs = jax.nn.log_softmax(2.0 * jnp.tanh(h @ w / 2.0) / 0.7)
        return jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

    fused = lambda h, w: linear_log_probs(h, w, targets, temperature=0.7, softcap=2.0, chunk=chunk)
    derived = lambda fun: jax.grad(lambda *x: jnp.sum(jnp.sin(fun(*x))), (0, 1))
    run = lambda *x: [(fun(*x), derived(fun)(*x)) for fun in (fused, slow)]
    chex.assert_trees_all_close(*jax.jit(run)(hidden, head), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [
    lambda w: w, lambda w: Transposed(w.T), lambda w: Transposed(Frozen(w.T)), Frozen,
    lambda w: LoraWeight(w, jnp.ones((64, 2), w.dtype), jnp.zeros((2, 300), w.dtype)),
])  # fmt: skip
def test_logits_of_bfloat16_are_added_up_and_kept_in_float32(wrap):
    hidden, head, targets, _ = draw(2, 9, features=64, vocabulary=300)
    hidden, head = hidden.astype(jnp.bfloat16), (head / 4).astype(jnp.bfloat16)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    normaliser = np.log(np.sum(np.exp(logits), axis=-1))
    expected = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0] - normaliser
    weight, ones = wrap(head), jnp.ones(targets.shape)
    np.testing.assert_allclose(project(hidden, weight), logits, atol=1e-4)
    np.testing.assert_allclose(linear_log_probs(hidden, weight, targets), expected, atol=1e-4)
    total = linear_cross_entropy(hidden, weight, targets, ones)
    np.testing.assert_allclose(total, -expected.sum(), atol=1e-3)


def loops(jaxpr):
    """All while and scan equations, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("while", "scan"):
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from loops(inner)


def test_only_what_is_differentiated_of_a_head_is_accumulated():
    hidden, head, targets, weights = draw(2, 6, features=16, vocabulary=512)
    ab = (jnp.ones((16, 2)), 0.1 * jnp.ones((2, 512)))
    loss = lambda fun, w: lambda h, ab: fun(h, LoraWeight(w, *ab), targets, weights)
    summed = lambda *args: jnp.sum(linear_log_probs(*args[:3]))
    for base in (head, head.astype(jnp.bfloat16), nf4_weight(head), quantised_weight(head, "int8")):
        for fun in (linear_cross_entropy, summed):
            jaxpr = jax.make_jaxpr(jax.grad(loss(fun, base), (0, 1)))(hidden, ab)
            carried = [v.aval for loop in loops(jaxpr.jaxpr) for v in loop.outvars]
            assert any(a.shape == (2, 512) for a in carried)  # B's
            assert not any(a.shape[-2:] == (16, 512) for a in carried)
    both = jax.make_jaxpr(jax.grad(linear_cross_entropy, (0, 1)))(hidden, head, targets, weights)
    assert any(v.aval.shape == (16, 512) for loop in loops(both.jaxpr) for v in loop.outvars)


def test_a_head_partly_differentiated_by_the_caller():
    hidden, head, targets, weights = draw(2, 6)
    ab = (jnp.ones((6, 2)), 0.1 * jnp.ones((2, 11)))
    fused = lambda a: linear_cross_entropy(hidden, LoraWeight(head, a, ab[1]), targets, weights)
    slow = lambda a: plain(hidden, LoraWeight(head, a, ab[1]), targets, weights)
    chex.assert_trees_all_close(jax.grad(fused)(ab[0]), jax.grad(slow)(ab[0]), rtol=1e-5, atol=1e-6)


HEADS = {
    "dense": lambda w: w,
    "tied": lambda w: Transposed(w.T),
    "lora": lambda w: LoraWeight(w, jnp.ones((6, 2)), 0.1 * jnp.ones((2, 11))),
}


# The softcap is applied to logits, whatever the head that made them.
@pytest.mark.parametrize("wrap, softcap", [("dense", None), ("tied", 2.0), ("lora", 2.0)])
def test_forward_mode_and_second_derivatives_are_the_plain_form_s(wrap, softcap):
    hidden, head, targets, weights = draw(2, 7)
    at = (hidden, HEADS[wrap](head))
    along = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), at)
    if wrap == "lora":  # The base is frozen.
        along = (along[0], dataclasses.replace(along[1], base=jnp.zeros_like(head)))
    options = dict(softcap=softcap, chunk=3)
    fused = lambda h, w: linear_cross_entropy(h, w, targets, weights, **options)
    through = lambda h, w: -jnp.sum(weights * linear_log_probs(h, w, targets, **options))
    slow = lambda h, w: plain(h, w, targets, weights, softcap)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(function, at):
        # The gradient of the sine is not linear in the loss: its cotangent has a derivative.
        value = jax.jit(lambda *at: jnp.sin(function(*at)))  # traced once
        gradient = jax.grad(value, (0, 1))
        slope = lambda *at: jax.jvp(value, at, along)[1]
        dot = lambda *at: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(*at), along))))
        curves = (
            jax.jvp(gradient, at, along)[1],
            *(jax.grad(f, (0, 1))(*at) for f in (slope, dot)),
        )
        if wrap == "lora":  # Only `to_dense` passes the base a gradient.
            curves = tuple((h, w.a, w.b) for h, w in curves)
        return slope(*at), curves

    expected = derivatives(slow, at)
    for function in (fused, through):
        chex.assert_trees_all_close(derivatives(function, at), expected, rtol=1e-3, atol=1e-3)
    # Central differences: rounding of a loss of about 10, some 1e-6, is divided by 2e-3.
    value = jax.jit(lambda by: jnp.sin(slow(*jax.tree.map(lambda a, b: a + by * b, at, along))))
    difference = (value(1e-3) - value(-1e-3)) / 2e-3
    np.testing.assert_allclose(expected[0], difference, rtol=2e-2, atol=2e-2)


def test_forward_mode_and_hessian_products_never_hold_all_logits():
    hidden, head, targets, weights = draw(2, 64, vocabulary=4096, share=1.0)
    for fun in (
        lambda h, w: linear_cross_entropy(h, w, targets, weights, chunk=8),
        lambda h, w: jnp.sum(weights * linear_log_probs(h, w, targets, chunk=8)),
    ):
        at = (hidden, head)
        slope = lambda *at, fun=fun: jax.jvp(fun, at, at)[1]
        product = lambda *at, fun=fun: jax.jvp(jax.grad(fun), at, at)[1]
        for function in (slope, product):
            compiled = jax.jit(function).lower(*at).compile()
            assert compiled.memory_analysis().temp_size_in_bytes < 2 * 64 * 4096 * 4


def test_hessian_products_of_the_supervised_objective_are_those_of_its_logits():
    config = dataclasses.replace(tiny_config(), num_layers=1)
    model, tokens = Decoder(config), jax.random.randint(jax.random.key(1), (2, 5), 0, 99)
    params = start(model)
    along = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), params)
    whole = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5), tokens.shape)
    batch = dict(tokens=tokens, loss_mask=1.0 * whole, segment_ids=whole, positions=positions)

    def slow(params):
        logits = model.apply({"params": params}, tokens).logits[:, :-1]
        return jnp.mean(cross_entropy(logits, tokens[:, 1:]))

    def products(loss):
        slope = lambda p: jax.jvp(loss, (p,), (along,))[1]
        return jax.jvp(jax.grad(loss), (params,), (along,)), jax.grad(slope)(params)

    ours = lambda params: supervised(model.forward)(params, batch, jax.random.key(2))[0]
    found, expected = jax.jit(lambda: (products(ours), products(slow)))()
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length,counted", [(2, 1), (4, 1), (6, 2), (6, 5), (7, 3), (5, 0)])
def test_weights_known_while_compiling_give_the_same_sum(length, counted):
    """XLA may see how many tokens count: with a loop by steps of a chunk it took one chunk for none."""
    hidden, head = draw_parts(length)
    targets, weights = jnp.zeros((3, length), jnp.int32), np.ones((3, length), np.float32)
    weights = jnp.asarray(weights * (np.arange(length) < counted))
    each = np.sum(-jax.nn.log_softmax(hidden @ head)[..., 0] * weights, axis=1)
    for chunk in (64, 2):
        loss = lambda h, w, chunk=chunk: linear_cross_entropy(h, w, targets, weights, chunk=chunk)

        @jax.jit
        def run(hidden, head, loss=loss):
            value, grads = jax.value_and_grad(loss, (0, 1))(hidden, head)
            sliced = jax.lax.map(lambda h: loss(h[None].repeat(3, 0), head), hidden)
            return value, grads, sliced

        value, grads, sliced = run(hidden, head)
        np.testing.assert_allclose(value, each.sum(), rtol=1e-5)
        np.testing.assert_allclose(jax.jit(loss)(hidden, head), each.sum(), rtol=1e-5)
        np.testing.assert_allclose(sliced, 3 * each, rtol=1e-5)
        assert np.any(grads[1]) == (counted > 0)


def draw_parts(length):
    """Hidden states [3, T, 8] and a head [8, 5]."""
    rng = np.random.default_rng(length)
    return tuple(
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, length, 8), (8, 5))
    )
