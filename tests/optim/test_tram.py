"""TRAM and trust-region penalties against the methods that they become, and against closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.metrics import Mean
from jaxft.optim import (
    asam,
    fisher_sam,
    global_norm,
    parameter_distance,
    tram,
    tram_fisher,
    with_sam,
    with_tram,
    with_tram_fisher,
    with_trust_region,
)
from jaxft.optim.perturbations import perturb_asam
from jaxft.train import fit, init_state, make_step

X = jax.random.normal(jax.random.key(0), (8, 4))
LABELS = jnp.arange(8) % 3
PARAMS = {"w": jax.random.normal(jax.random.key(1), (4, 3)), "b": jnp.array([0.3, -0.2, 0.1])}
logits = lambda p, x=X: x @ p["w"] + p["b"][None]
loss = lambda p, x=X: jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits(p, x), LABELS)
)


def kl(target, params):
    p, q = jax.nn.softmax(logits(target)), jax.nn.softmax(logits(params))
    return jnp.mean(jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1))


def steps_of(optimizer, number, distance_fn=kl):
    """(params before and after each step, states)."""
    params, state, seen = PARAMS, optimizer.init(PARAMS), []

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(
            jax.grad(loss)(params), state, params,
            grad_fn=lambda p, _: jax.grad(loss)(p), distance_fn=distance_fn,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    for _ in range(number):
        seen.append((params, state))
        params, state = step(params, state)
    return seen + [(params, state)]


def test_a_constant_distance_is_asam_and_none_the_plain_gradient():
    same = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-6)
    same(tram(lambda p: 0.3)(loss)(PARAMS), asam(0.3)(loss)(PARAMS))
    same(tram(lambda p: Mean(0.6, 2.0))(loss)(PARAMS), asam(0.3)(loss)(PARAMS))
    same(tram(lambda p: 0.3, d_scale=2.0, d_max=0.4)(loss)(PARAMS), asam(0.4)(loss)(PARAMS))
    same(tram(lambda p: 0.3, eta=0.1)(loss)(PARAMS), asam(0.3, eta=0.1)(loss)(PARAMS))
    chex.assert_trees_all_equal(tram(lambda p: 0.0)(loss)(PARAMS), jax.value_and_grad(loss)(PARAMS))
    # A divergence that is rounded below 0 is none.
    chex.assert_trees_all_equal(
        tram(lambda p: -1e-8)(loss)(PARAMS), jax.value_and_grad(loss)(PARAMS)
    )


def test_the_distance_sees_the_arguments_and_gives_no_gradient():
    other = jax.tree.map(lambda p: p + 0.3, PARAMS)
    fun = lambda p, x: loss(p, x)
    distance = lambda p, x: jnp.mean(x) ** 2 + kl(other, p)
    _, grads = jax.jit(tram(distance)(fun))(PARAMS, X)
    d = float(distance(PARAMS, X))
    chex.assert_trees_all_close(grads, asam(d)(fun)(PARAMS, X)[1], rtol=1e-5, atol=1e-6)
    # Neither does the step by the target's params.
    by_target = jax.grad(lambda t: loss_after(t))(other)
    chex.assert_trees_all_equal(by_target, jax.tree.map(jnp.zeros_like, other))


def loss_after(target):
    _, grads = tram(lambda p: kl(target, p))(loss)(PARAMS)
    return loss(jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, grads))


def test_tram_fisher_without_noise_is_fisher_sam_and_with_it_uses_the_other_gradient():
    chex.assert_trees_all_close(
        tram_fisher(loss, 0.2, 0.7)(loss)(PARAMS), fisher_sam(0.2, 0.7)(loss)(PARAMS), rtol=1e-6
    )
    noised = lambda p: loss(p, X + 0.5)
    g, other = jax.grad(loss)(PARAMS), jax.grad(noised)(PARAMS)
    natural = jax.tree.map(lambda g, o: g / (1 + 30.0 * o**2), g, other)
    length = jnp.sqrt(sum(jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (g, natural)))))  # noqa: B905
    point = jax.tree.map(lambda p, n: p + 0.2 * n / length, PARAMS, natural)
    got = tram_fisher(noised, 0.2, 30.0)(loss)(PARAMS)[1]
    chex.assert_trees_all_close(got, jax.grad(loss)(point), rtol=1e-5, atol=1e-6)


def test_with_tram_fisher_is_its_estimator_in_an_optax_loop():
    noised = lambda p: loss(p, X + 0.5)
    expected = tram_fisher(noised, 0.2, 30.0)(loss)(PARAMS)[1]
    for own, given in ((noised, None), (None, lambda p: Mean(2 * noised(p), 2.0))):
        optimizer = with_tram_fisher(optax.sgd(1.0), 0.2, 30.0, own)
        updates, _ = optimizer.update(
            jax.grad(loss)(PARAMS), optimizer.init(PARAMS), PARAMS,
            grad_fn=lambda p, _: jax.grad(loss)(p), noised_fn=given,
        )  # fmt: skip
        chex.assert_trees_all_close(updates, jax.tree.map(jnp.negative, expected), rtol=1e-6)
    with pytest.raises(ValueError, match="noised_fn"):
        optimizer.update(PARAMS, (), PARAMS, grad_fn=lambda p, _: p)


@pytest.mark.parametrize("decay", [0.0, 1.0, 0.9])
def test_with_tram_is_asam_of_the_distance_to_its_target(decay):
    base = optax.sgd(0.5)
    seen = steps_of(with_tram(base, decay), 5)
    target = PARAMS
    for number, ((params, state), (after, later)) in enumerate(
        zip(seen[:-1], seen[1:], strict=True)
    ):
        chex.assert_trees_all_close(state.target, target, rtol=1e-6)
        d = float(kl(target, params))
        if number == 0:
            assert later.trust_distance == 0
        else:
            np.testing.assert_allclose(later.trust_distance, d, rtol=1e-3, atol=1e-7)
            assert d > 1e-5
        grads = asam(later.trust_distance)(loss)(params)[1]
        expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
        chex.assert_trees_all_close(after, expected, rtol=1e-5, atol=1e-6)
        target = jax.tree.map(lambda t, p: decay * t + (1 - decay) * p, target, params)


def test_the_first_step_and_a_zero_scale_are_the_base():
    base, options = optax.adam(0.05), [{}, {"d_scale": 0.0}, {"d_max": 0.0}]
    plain = steps_of(with_sam(base, 0.0), 3)
    for extra, number in zip(options, (1, 3, 3), strict=True):
        ours = steps_of(with_tram(base, **extra), number)
        chex.assert_trees_all_close(ours[-1][0], plain[number][0], rtol=1e-6, atol=1e-7)


def test_the_perturbation_is_as_long_as_the_distance_relative_to_the_params():
    for params, state in steps_of(with_tram(optax.sgd(0.5), 1.0), 4)[1:]:
        d = float(state.trust_distance)
        eps = perturb_asam(d)(params, jax.grad(loss)(params))
        relative = jax.tree.map(lambda e, p: e / jnp.abs(p), eps, params)
        np.testing.assert_allclose(global_norm(relative), d, rtol=1e-5)


def test_distances_fall_to_the_step_before_and_rise_to_the_start():
    schedule = optax.linear_schedule(0.3, 0.0, 40)
    before = [float(s.trust_distance) for _, s in steps_of(with_tram(optax.sgd(schedule)), 40)[2:]]
    start = [
        float(s.trust_distance) for _, s in steps_of(with_tram(optax.sgd(schedule), 1.0), 40)[2:]
    ]
    assert before[-1] < 0.1 * before[0]
    assert start == sorted(start) and start[-1] > 10 * start[0]


def test_distances_of_params():
    optimizer = with_tram(optax.sgd(0.5), distance=parameter_distance)
    seen = steps_of(optimizer, 3, distance_fn=None)
    for (one, _), (two, _), (_, state) in zip(seen, seen[1:], seen[2:], strict=False):
        moves = jax.tree.map(lambda a, b: np.asarray(a - b), two, one)
        length = np.sqrt(sum((m**2).sum() for m in jax.tree.leaves(moves)))
        np.testing.assert_allclose(state.trust_distance, length, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_trust_region_adds_the_gradient_of_the_penalty(decay):
    seen = steps_of(with_trust_region(optax.sgd(0.5), 0.7, decay), 4)
    for (params, state), (after, later) in zip(seen[:-1], seen[1:], strict=True):
        total = lambda p, t=state.target: loss(p) + 0.7 * kl(t, p)
        expected = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(total)(params))
        chex.assert_trees_all_close(after, expected, rtol=1e-5, atol=1e-6)
        target = jax.tree.map(lambda t, p: decay * t + (1 - decay) * p, state.target, params)
        chex.assert_trees_all_close(later.target, target, rtol=1e-6)
    plain = steps_of(with_sam(optax.sgd(0.5), 0.0), 4)[-1][0]
    none = steps_of(with_trust_region(optax.sgd(0.5), 0.0, decay), 4)[-1][0]
    chex.assert_trees_all_close(none, plain, rtol=1e-6, atol=1e-7)


def objective(params, batch, key):
    del key
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch["x"]), batch["labels"]
    )
    mean = Mean.of(each, batch["weights"])
    return mean.value, {"loss": mean}


def weighted_kl(target, params, batch, key):
    del key
    p, q = (jax.nn.softmax(logits(tree, batch["x"])) for tree in (target, params))
    return Mean.of(jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1), batch["weights"])


BATCH = {"x": X, "labels": LABELS, "weights": jnp.arange(8.0)}


@pytest.mark.parametrize("make", [with_tram, with_trust_region])
def test_the_train_step_hands_the_distance_of_its_batch_to_the_optimizer(make):
    results = []
    for microbatches in (1, 4):
        optimizer = make(optax.sgd(0.5))
        state, history = fit(
            PARAMS, objective, optimizer, [BATCH] * 3,
            microbatches=microbatches, extra_args={"distance_fn": weighted_kl},
        )  # fmt: skip
        results.append(state.params)
        d = [row["trust_distance"] for row in history]
        assert d[0] == 0 and d[2] > 0
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    # Against the transform by hand, with the whole batch's functions.
    fun = lambda p: objective(p, BATCH, None)[0]
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        updates, state = optimizer.update(
            jax.grad(fun)(params), state, params,
            grad_fn=lambda p, _: jax.grad(fun)(p),
            distance_fn=lambda t, p: weighted_kl(t, p, BATCH, None).value,
        )  # fmt: skip
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(results[0], params, rtol=1e-5, atol=1e-6)


def test_extra_functions_have_a_key_of_their_own_and_may_return_anything():
    seen = {}

    def update(updates, state, params=None, *, pair, draw, grad_fn, **extra):
        del grad_fn, extra
        seen["pair"], seen["draw"] = pair(params, params), draw()
        return updates, state

    def pair(first, second, batch, key):
        del key
        return {"sum": jnp.sum(first["w"] + second["w"]), "rows": batch["x"].shape[0]}

    drawn = []

    def drawing(params, batch, key):
        drawn.append(jax.random.normal(key))
        return objective(params, batch, key)

    optimizer = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    state = init_state(PARAMS, optimizer, jax.random.key(0))
    draw = lambda batch, key: jax.random.normal(key)
    step = make_step(drawing, optimizer, microbatches=1, extra_args={"pair": pair, "draw": draw})
    step(state, BATCH)
    np.testing.assert_allclose(seen["pair"]["sum"], 2 * jnp.sum(PARAMS["w"]), rtol=1e-6)
    assert seen["pair"]["rows"] == 8
    assert float(seen["draw"]) not in [float(d) for d in drawn[:1]]


def test_tram_costs_at_most_a_forward_pass_more_than_sam():
    x = jnp.ones((256, 64))
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}
    forward = lambda p: jnp.tanh(x @ p["w"]) @ p["v"]
    fun = lambda p: jnp.mean(jax.nn.logsumexp(forward(p), axis=-1))

    def step(optimizer, params, target):
        optimizer = optax.with_extra_args_support(optimizer)
        state = optimizer.init(params)
        state = state._replace(target=target) if hasattr(state, "target") else state
        measure = lambda t, p: jnp.mean((forward(t) - forward(p)) ** 2)
        return optimizer.update(
            jax.grad(fun)(params), state, params,
            grad_fn=lambda p, _: jax.grad(fun)(p), distance_fn=measure,
        )[0]  # fmt: skip

    def flops(optimizer):
        run = jax.jit(lambda p, t: step(optimizer, p, t))
        return run.lower(params, params).compile().cost_analysis()["flops"]

    sgd = optax.sgd(0.1)
    one = jax.jit(forward).lower(params).compile().cost_analysis()["flops"]
    sam, ours = flops(with_sam(sgd)), flops(with_tram(sgd))
    # The logits of θ in the distance are those of the first pass: computed once.
    assert 0.9 * one < ours - sam < 1.3 * one


def test_bad_input():
    for call in (
        lambda: with_tram(optax.sgd(1.0), 1.5),
        lambda: with_trust_region(optax.sgd(1.0), 0.1, -1),
    ):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
            call()
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        with_trust_region(optax.sgd(1.0), -1)
    with pytest.raises(ValueError, match="d_scale must be at least 0"):
        tram(lambda p: 0.0, d_scale=-1.0)
    with pytest.raises(ValueError, match="eta must be finite"):
        tram(lambda p: 0.0, eta=-1.0)
    with pytest.raises(ValueError, match=r"must be a scalar, got shape \(3,\)"):
        tram(lambda p: jnp.ones(3))(loss)(PARAMS)
    optimizer = with_tram(optax.sgd(1.0))
    state, grad_fn = optimizer.init(PARAMS), lambda p, _: p
    with pytest.raises(ValueError, match="update needs distance_fn"):
        optimizer.update(PARAMS, state, PARAMS, grad_fn=grad_fn)
    with pytest.raises(ValueError, match="differ in structure from the target"):
        other = {"w": PARAMS["w"]}
        optimizer.update(other, state, other, grad_fn=grad_fn, distance_fn=kl)
    with pytest.raises(ValueError, match=r"may not name \['grad_fn'\]"):
        make_step(objective, optimizer, extra_args={"grad_fn": kl})
