"""SAM and its relatives against closed forms, optax.contrib.sam and themselves in other forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.adapters import adapt, lora, paca, partition
from jaxft.metrics import Mean
from jaxft.optim import (
    alternating_sam,
    asam,
    evaluation_params,
    fisher_sam,
    global_norm,
    in_groups,
    look_sam,
    m_sam,
    perturb_asam,
    perturb_fisher,
    perturb_sam,
    sam,
    sharpness_aware,
    with_sam,
)
from jaxft.parallel import make_mesh
from jaxft.train import accumulate, init_state, jit_step, make_step
from jaxft.weights import PacaWeight, matmul

CURVATURE = jnp.array([[2.0, 0.5], [0.5, 1.0]])
THETA = {"a": jnp.array([1.0]), "b": jnp.array([2.0])}
stack = lambda tree: jnp.concatenate([tree["a"], tree["b"]])
quadratic = lambda p, *_: 0.5 * stack(p) @ CURVATURE @ stack(p)


def random_problem(seed=0):
    """A tree of params of several shapes and a loss that is not a polynomial of them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"w": jax.random.normal(keys[0], (4, 3)), "b": jax.random.normal(keys[1], (3,))}
    x = jax.random.normal(keys[2], (8, 4))
    loss = lambda p, *_: jnp.mean(jnp.sin(x @ p["w"] + p["b"][None]) ** 2 + jnp.cosh(p["b"])[None])
    return params, loss


@pytest.mark.parametrize(
    "perturb, theta, g, expected",
    [
        (perturb_sam(0.1), [1, 2], [3, -1], [0.0948683, -0.0316228]),  # / sqrt(10)
        (
            perturb_asam(0.1),
            [1, 2],
            [3, -1],
            [0.0832050, -0.1109400],
        ),  # |θ| g = [3, -2], / sqrt(13)
        (perturb_asam(0.1, 1.0), [0, 0], [3, -4], [0.06, -0.08]),  # T = 1 is SAM
        # f = [9, 1], F⁻¹ = [1/10, 1/2], F⁻¹ g = [.3, -.5], g F⁻¹ g = 1.4
        (perturb_fisher(0.7, 1.0), [1, 2], [3, -1], [0.7 * 0.3 / 1.4**0.5, -0.35 / 1.4**0.5]),
    ],
)
def test_worked_examples(perturb, theta, g, expected):
    split = lambda x: {"a": jnp.array(x[:1], jnp.float32), "b": jnp.array(x[1:], jnp.float32)}
    np.testing.assert_allclose(stack(perturb(split(theta), split(g))), expected, rtol=2e-6)


def test_limits_in_which_one_perturbation_is_another():
    params, loss = random_problem()
    grads = jax.grad(loss)(params)
    signs = jax.tree.map(jnp.sign, params)  # |θ| = 1
    same = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-6)
    same(perturb_asam(0.3)(signs, grads), perturb_sam(0.3)(params, grads))
    same(perturb_fisher(0.3, 0.0)(params, grads), perturb_sam(0.3)(params, grads))
    np.testing.assert_allclose(global_norm(perturb_sam(0.3)(params, grads)), 0.3, rtol=1e-6)
    relative = jax.tree.map(lambda e, p: e / jnp.abs(p), perturb_asam(0.3)(params, grads), params)
    np.testing.assert_allclose(global_norm(relative), 0.3, rtol=1e-6)
    # The length of Fisher SAM's in its own metric: eps F eps = γ².
    eps = perturb_fisher(0.3, 2.0)(params, grads)
    metric = jax.tree.map(lambda e, g: e * jnp.sqrt(1 + 2.0 * g**2), eps, grads)
    np.testing.assert_allclose(global_norm(metric), 0.3, rtol=1e-6)


@pytest.mark.parametrize("perturb", [perturb_sam(), perturb_asam(), perturb_fisher()])
def test_a_zero_gradient_is_not_perturbed_and_a_tiny_one_is_whole(perturb):
    zero = jax.tree.map(jnp.zeros_like, THETA)
    chex.assert_trees_all_equal(perturb(THETA, zero), zero)
    tiny = jax.tree.map(lambda p: p * 1e-15, THETA)
    unit = jax.tree.map(lambda p: p * 1e-3, THETA)  # where 1 + η f is 1 up to 1e-6
    chex.assert_trees_all_close(perturb(THETA, tiny), perturb(THETA, unit), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_sam_of_a_quadratic_is_the_closed_form(steps):
    x = stack(THETA)
    for _ in range(steps):
        g = CURVATURE @ x
        x = x + 0.2 * g / jnp.linalg.norm(g)
    estimate = sharpness_aware(perturb_sam(0.2), ascent_steps=steps)(quadratic)
    value, grads = jax.jit(estimate)(THETA)
    np.testing.assert_allclose(stack(grads), CURVATURE @ x, rtol=1e-6)
    np.testing.assert_allclose(value, quadratic(THETA), rtol=1e-6)


def test_value_and_aux_are_those_at_theta_and_both_passes_draw_alike():
    seen = []

    def fun(params, batch, key):
        seen.append(key)
        noise = jax.random.normal(key, batch.shape)
        return quadratic(params) + jnp.mean(batch * noise), {"theta": stack(params)}

    key = jax.random.key(3)
    (value, aux), _ = sam(0.5)(fun, has_aux=True)(THETA, jnp.ones(4), key)
    np.testing.assert_allclose(value, fun(THETA, jnp.ones(4), key)[0])
    np.testing.assert_allclose(aux["theta"], [1, 2])
    assert len(seen) == 3 and all((k == key).all() for k in seen)


def test_no_gradient_flows_through_eps():
    # Differentiated through eps, the loss at θ + eps has another gradient.
    params, loss = random_problem()
    eps = perturb_sam(0.3)(params, jax.grad(loss)(params))
    fixed = jax.grad(lambda p: loss(jax.tree.map(jnp.add, p, eps)))(params)
    chex.assert_trees_all_close(sam(0.3)(loss)(params)[1], fixed, rtol=1e-5)
    chex.assert_trees_all_close(asam(0.3)(loss)(params)[0], loss(params))


def test_asam_does_not_see_a_rescaling_that_leaves_the_function():
    # w1 c, w2 / c: the same linear net, and the same loss at θ + eps only under ASAM.
    x, y = jax.random.normal(jax.random.key(0), (2, 16, 3))
    loss = lambda p: jnp.mean((x @ p["w1"] @ p["w2"] - y) ** 2)
    keys = jax.random.split(jax.random.key(1))
    base = {k: jax.random.normal(key, (3, 3)) for k, key in zip(("w1", "w2"), keys, strict=True)}

    def sharp(perturb, c):
        params = {"w1": base["w1"] * c, "w2": base["w2"] / c}
        eps = perturb(params, jax.grad(loss)(params))
        return loss(jax.tree.map(jnp.add, params, eps))

    for c in (0.1, 7.0):
        same = sharp(perturb_asam(0.3), 1.0)
        np.testing.assert_allclose(sharp(perturb_asam(0.3), c), same, rtol=1e-4)
        other = sharp(perturb_sam(0.3), 1.0)
        assert abs(float(sharp(perturb_sam(0.3), c) / other) - 1) > 0.05


def run(optimizer, loss, params, steps, needs_grad_fn=True):
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        params, state = carry
        extra = {"grad_fn": lambda p, _: jax.grad(loss)(p)} if needs_grad_fn else {}
        updates, state = optimizer.update(jax.grad(loss)(params), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    loop = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    return loop((params, optimizer.init(params)))


@pytest.mark.parametrize("base", [optax.sgd(0.1, momentum=0.9), optax.adam(0.03)])
@pytest.mark.parametrize("ascent_steps", [1, 2])
def test_it_is_optax_contrib_sam_where_that_is_finite(base, ascent_steps):
    params, loss = random_problem(1)
    up = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = {
        opaque: optax.contrib.sam(base, up, ascent_steps + 1, opaque_mode=opaque)
        for opaque in (True, False)
    }
    expected, _ = run(theirs[True], loss, params, 20)
    ours, _ = run(with_sam(base, 0.1, ascent_steps=ascent_steps), loss, params, 20)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
    period = ascent_steps + 1
    expected, _ = run(theirs[False], loss, params, 20 * period, needs_grad_fn=False)
    ours, state = run(
        alternating_sam(base, 0.1, period), loss, params, 20 * period, needs_grad_fn=False
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(evaluation_params(state, ours), ours)


def test_zero_gradients_that_ruin_optax_contrib_sam_do_nothing_here():
    flat = lambda p: jnp.sum(jnp.maximum(p["a"], 0.0) ** 2)
    params = {"a": jnp.array([-1.0, -2.0])}
    up = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.1), up, opaque_mode=True)
    assert not jnp.isfinite(run(theirs, flat, params, 1)[0]["a"]).any()
    for ours in (with_sam(optax.sgd(0.1)), look_sam(optax.sgd(0.1), period=2)):
        chex.assert_trees_all_equal(run(ours, flat, params, 5)[0], params)
    ours = alternating_sam(optax.sgd(0.1))
    chex.assert_trees_all_equal(run(ours, flat, params, 4, needs_grad_fn=False)[0], params)


@pytest.mark.parametrize("kind", ["with_sam", "look_sam", "alternating_sam"])
def test_rho_zero_is_the_base(kind):
    params, loss = random_problem()
    base = optax.adam(0.03)
    expected, _ = run(base, loss, params, 10)
    if kind == "alternating_sam":
        ours, _ = run(alternating_sam(base, 0.0), loss, params, 20, needs_grad_fn=False)
    else:
        made = with_sam(base, 0.0) if kind == "with_sam" else look_sam(base, 0.0, alpha=0.0)
        ours, _ = run(made, loss, params, 10)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_the_transform_and_the_estimator_are_one_method():
    params, loss = random_problem()
    for perturb, estimator in [
        (perturb_sam(0.2), sam(0.2)),
        (perturb_asam(0.2), asam(0.2)),
        (perturb_fisher(0.2, 0.5), fisher_sam(0.2, 0.5)),
    ]:
        ours, _ = run(with_sam(optax.sgd(0.1), perturb=perturb), loss, params, 1)
        grads = estimator(loss)(params)[1]
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)


def with_key(scale=0.1):
    """An optimizer whose state holds a typed key, as some of optax's do."""

    def init(params):
        del params
        return jax.random.key(0)

    def update(updates, state, params=None):
        key, draw = jax.random.split(state)
        noise = scale * jax.random.normal(draw)
        return jax.tree.map(lambda u: -0.1 * u + noise, updates), key

    return optax.GradientTransformation(init, update)


def test_typed_keys_in_the_state_of_the_base():
    params, loss = random_problem()
    up = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    with pytest.raises(TypeError):
        run(optax.contrib.sam(with_key(), up), loss, params, 2, needs_grad_fn=False)
    expected, _ = run(optax.contrib.sam(with_key(), up, opaque_mode=True), loss, params, 4)
    ours, state = run(alternating_sam(with_key(), 0.1), loss, params, 8, needs_grad_fn=False)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert jnp.issubdtype(state.base.dtype, jax.dtypes.prng_key)
    chex.assert_trees_all_close(run(with_sam(with_key(), 0.1), loss, params, 4)[0], expected)
    run(look_sam(with_key()), loss, params, 3)
    objective = lambda p, batch, key: (loss(p), {})
    state = init_state(params, alternating_sam(with_key()), jax.random.key(0))
    jit_step(make_step(objective, alternating_sam(with_key())))(state, jnp.ones(2))


def test_params_between_steps_are_perturbed_and_those_to_evaluate_are_not():
    params, loss = random_problem()
    optimizer = optax.chain(
        optax.clip_by_global_norm(100.0), alternating_sam(optax.sgd(0.1), 0.3, 3)
    )
    state, now = optimizer.init(params), params
    for number in range(6):
        updates, state = optimizer.update(jax.grad(loss)(now), state, now)
        now = optax.apply_updates(now, updates)
        away = global_norm(jax.tree.map(lambda a, b: a - b, now, params))
        if number % 3 == 0:
            np.testing.assert_allclose(away, 0.3, rtol=1e-5)
        if number % 3 != 2:
            chex.assert_trees_all_equal(evaluation_params(state, now), params)
        else:
            params = evaluation_params(state, now)
            chex.assert_trees_all_equal(params, now)
    chex.assert_trees_all_equal(evaluation_params(optax.EmptyState(), now), now)


def test_look_sam_is_its_algorithm_step_by_step():
    params, loss = random_problem(2)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    grad = lambda x: jax.flatten_util.ravel_pytree(jax.grad(loss)(unravel(x)))[0]
    x, v = flat, None
    for number in range(7):  # the algorithm with its cosine, as printed
        g = grad(x)
        if number % 3 == 0:
            s = grad(x + 0.2 * g / jnp.linalg.norm(g))
            cosine = g @ s / (jnp.linalg.norm(g) * jnp.linalg.norm(s))
            v = s - jnp.linalg.norm(s) * cosine * g / jnp.linalg.norm(g)
        else:
            s = g + 0.7 * jnp.linalg.norm(g) / jnp.linalg.norm(v) * v
        x = x - 0.1 * s
    ours, state = run(look_sam(optax.sgd(0.1), 0.2, period=3), loss, params, 7)
    chex.assert_trees_all_close(ours, unravel(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(global_norm(state.direction), 1.0, rtol=1e-5)


def test_only_full_steps_of_look_sam_evaluate_the_gradient():
    params, loss = random_problem()
    calls = []

    def grad_fn(p, _):
        jax.debug.callback(lambda: calls.append(1))
        return jax.grad(loss)(p)

    optimizer = look_sam(optax.sgd(0.1), period=4)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, grad_fn=grad_fn))
    for _ in range(9):
        _, state = update(jax.grad(loss)(params), state, params)
    jax.effects_barrier()
    assert len(calls) == 3
    assert update._cache_size() == 1


def linear_objective(params, batch, key):
    del key
    errors = jnp.mean((matmul(batch["x"], params["kernel"]) - batch["y"]) ** 2, axis=-1)
    loss = Mean.of(errors, batch["weights"])
    return loss.value, {"loss": loss}


def linear_batch(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, rows, 6)).astype(np.float32)
    return {"x": x, "y": y, "weights": (1 + np.arange(rows) % 3).astype(np.float32)}


def test_the_two_methods_of_microbatches_are_what_they_say():
    batch, key = linear_batch(), jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (6, 6))}
    rho, grad = 0.3, jax.grad(lambda p, b: linear_objective(p, b, None)[0])
    up = lambda p, g: jax.tree.map(jnp.add, p, perturb_sam(rho)(p, g))
    weight = batch["weights"].sum()
    slices = [jax.tree.map(lambda x, r=r: x[r::2], batch) for r in range(2)]

    def mean(parts):
        parts = [
            jax.tree.map(lambda g, b=b: g * b["weights"].sum() / weight, part)
            for part, b in zip(parts, slices, strict=True)
        ]
        return jax.tree.map(jnp.add, *parts)

    of_batch = sam(rho, gradient=accumulate(jax.value_and_grad, 2))(linear_objective, has_aux=True)
    _, got = of_batch(params, batch, key)
    expected = grad(up(params, grad(params, batch)), batch)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    _, whole = sam(rho)(linear_objective, has_aux=True)(params, batch, key)
    chex.assert_trees_all_close(got, whole, rtol=1e-5, atol=1e-6)

    of_slices = accumulate(sam(rho), 2)(linear_objective, has_aux=True)
    (_, metrics), got = of_slices(params, batch, key)
    expected = mean([grad(up(params, grad(params, b)), b) for b in slices])
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    assert metrics["loss"].weight == weight
    assert global_norm(jax.tree.map(lambda a, b: a - b, got, whole)) > 1e-3 * global_norm(whole)

    # The train step: by its estimator each slice has its eps, by its optimizer the batch.
    sgd = optax.sgd(0.1)
    for optimizer, options, wanted in [
        (sgd, {"gradient": sam(rho)}, got),
        (with_sam(sgd, rho), {}, whole),
    ]:
        state = init_state(params, optimizer, key)
        step = make_step(linear_objective, optimizer, microbatches=2, **options)
        after = step(state, batch)[0].params
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, wanted)
        chex.assert_trees_all_close(after, stepped, rtol=1e-5, atol=1e-6)


def test_m_sam_is_a_loop_over_groups():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    fun = lambda p, batch, scale: (
        jnp.mean(jnp.sin(batch["x"] @ p) ** 2) * scale * batch["factor"],
        {"rows": jnp.int32(len(batch["x"])), "first": jnp.sum(batch["x"][0])},
    )
    p, batch = jnp.arange(1.0, 5.0), {"x": x, "factor": 2.0}
    (value, aux), grads = jax.jit(m_sam(0.3, 3)(fun, has_aux=True))(p, batch, 0.5)
    parts = [sam(0.3)(fun, has_aux=True)(p, batch | {"x": x[r::3]}, 0.5) for r in range(3)]
    mean = lambda *values: sum(values) / 3
    expected = jax.tree.map(mean, *parts)
    chex.assert_trees_all_close(((value, aux), grads), expected, rtol=1e-5, atol=1e-6)
    assert aux["rows"].dtype == jnp.int32
    one = in_groups(jax.value_and_grad, 3)(lambda *a: fun(*a)[0])(p, batch, 0.5)
    chex.assert_trees_all_close(
        one, jax.value_and_grad(lambda *a: fun(*a)[0])(p, batch, 0.5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rule", [lora(2, 4.0), paca(2)], ids=["lora", "paca"])
def test_adapters_are_perturbed_where_they_train_and_paca_sees_its_moved_rows(rule, key):
    batch = linear_batch()
    kernel = jax.random.normal(key, (6, 6))
    params, rho = adapt(key, {"kernel": kernel}, {"kernel": rule}), 0.3
    trainable, frozen = partition(params)
    weight = params["kernel"]

    def dense_loss(t):  # only on dense kernels
        if isinstance(weight, PacaWeight):
            rows = t["kernel"].rows * (weight.alpha / weight.rank)
            whole = kernel.at[weight.indices].set(rows)
        else:
            whole = kernel + 2.0 * t["kernel"].a @ t["kernel"].b  # alpha / rank
        return linear_objective({"kernel": whole}, batch, None)[0]

    g = jax.grad(dense_loss)(trainable)
    up = jax.tree.map(jnp.add, trainable, perturb_sam(rho)(trainable, g))
    expected = jax.grad(dense_loss)(up)
    before = jax.tree.map(np.array, trainable)
    for optimizer, gradient in [
        (optax.sgd(0.1), sam(rho)),
        (with_sam(optax.sgd(0.1), rho), jax.value_and_grad),
    ]:
        state = init_state(params, optimizer, key)
        step = jit_step(make_step(linear_objective, optimizer, gradient=gradient))
        state, _ = step(state, batch)
        after = partition(state.params)[0]
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, before, expected)
        chex.assert_trees_all_close(after, stepped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["sam", "m_sam", "with_sam", "look_sam", "asam", "fisher"])
def test_eight_devices_are_one(form, key):
    batch = linear_batch()
    params = {"kernel": jax.random.normal(key, (6, 8))}
    batch["y"] = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    optimizer, options = optax.sgd(0.1), {}
    if form == "with_sam":
        optimizer = with_sam(optimizer, 0.3)
    elif form == "look_sam":
        optimizer = look_sam(optimizer, 0.3, period=2)
    elif form == "m_sam":
        options = {"gradient": sam(0.3), "microbatches": 2}
        batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), batch)
    else:
        options = {"gradient": {"sam": sam(0.3), "asam": asam(), "fisher": fisher_sam()}[form]}
    mesh = make_mesh(data=2, fsdp=4)
    spec = jax.sharding.PartitionSpec
    put = lambda tree, s: jax.device_put(tree, jax.sharding.NamedSharding(mesh, s))
    results = []
    for spread in (False, True):
        here, rows = params, batch
        if spread:
            here, rows = put(params, spec(None, "fsdp")), put(batch, spec(("data", "fsdp")))
        state = init_state(here, optimizer, key)
        if spread:
            state = state._replace(step=put(state.step, spec()), key=put(state.key, spec()))
            fill = lambda x: x if hasattr(x.sharding, "mesh") else put(x, spec())
            state = state._replace(opt_state=jax.tree.map(fill, state.opt_state))
        step = jit_step(make_step(linear_objective, optimizer, **options))
        for _ in range(2):
            state, metrics = step(state, rows)
        results.append(jax.tree.map(np.asarray, (state.params, metrics["grad_norm"])))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_a_sam_step_keeps_one_copy_of_the_params():
    width = 256
    params = {str(i): jnp.ones((width, width)) for i in range(3)}
    size = sum(p.nbytes for p in jax.tree.leaves(params))

    def objective(p, batch, key):
        for i in range(3):
            batch = jnp.tanh(batch @ p[str(i)])
        return jnp.mean(batch**2), {}

    def memory(optimizer, gradient=jax.value_and_grad):
        state = init_state(params, optimizer, jax.random.key(0))
        step = jit_step(make_step(objective, optimizer, gradient=gradient))
        return step.lower(state, jnp.ones((4, width))).compile().memory_analysis()

    adam = optax.adam(1e-3)
    base = memory(adam)
    for other in (memory(adam, sam(0.05)), memory(with_sam(adam))):
        # After the step: what it returns is params and moments, in the old ones' place, as in the base's.
        assert other.output_size_in_bytes == base.output_size_in_bytes
        assert other.alias_size_in_bytes == base.alias_size_in_bytes == 3 * size + 8
        # Within it: the moved params, and the first gradients, beside the second ones.
        assert other.temp_size_in_bytes < base.temp_size_in_bytes + 2.2 * size
    looks = memory(look_sam(adam))
    assert looks.alias_size_in_bytes == 4 * size + 12


def test_a_sam_step_costs_two_gradients(key):
    params, batch = {"kernel": jnp.ones((64, 64))}, jnp.ones((256, 64))
    objective = lambda p, b, key: (jnp.mean(jnp.tanh(b @ p["kernel"]) ** 2), {})
    flops = lambda fun: jax.jit(fun).lower(params).compile().cost_analysis()["flops"]
    base = flops(lambda p: jax.value_and_grad(objective, has_aux=True)(p, batch, key))
    both = flops(lambda p: sam(0.05)(objective, has_aux=True)(p, batch, key))
    assert 1.9 * base < both < 2.05 * base


def test_rho_may_be_scheduled_and_traced():
    params, loss = random_problem()
    schedule = optax.linear_schedule(0.2, 0.0, 2)
    optimizer = optax.inject_hyperparams(with_sam)(optax.sgd(0.1), rho=schedule)
    state, now, expected = optimizer.init(params), params, params
    grad_fn = lambda p, _: jax.grad(loss)(p)
    for rho in (0.2, 0.1, 0.0):
        updates, state = jax.jit(lambda g, s, p: optimizer.update(g, s, p, grad_fn=grad_fn))(
            jax.grad(loss)(now), state, now
        )
        now = optax.apply_updates(now, updates)
        expected, _ = run(with_sam(optax.sgd(0.1), rho), loss, expected, 1)
        chex.assert_trees_all_close(now, expected, rtol=1e-5, atol=1e-6)


def test_bad_input():
    for call in (lambda: sam(-1.0), lambda: asam(float("nan")), lambda: perturb_asam(1.0, -1.0)):
        with pytest.raises(ValueError, match="must be finite and at least 0"):
            call()
    with pytest.raises(ValueError, match="gamma must be finite"):
        fisher_sam(-0.1)
    with pytest.raises(ValueError, match="ascent_steps must be at least 1, got 0"):
        with_sam(optax.sgd(0.1), ascent_steps=0)
    with pytest.raises(ValueError, match="sync_period must be at least 2, got 1"):
        alternating_sam(optax.sgd(0.1), sync_period=1)
    with pytest.raises(ValueError, match="period must be at least 1"):
        look_sam(optax.sgd(0.1), period=0)
    with pytest.raises(ValueError, match="alpha"):
        look_sam(optax.sgd(0.1), alpha=-1.0)
    optimizer = with_sam(optax.sgd(0.1))
    with pytest.raises(ValueError, match="update needs grad_fn"):
        optimizer.update(THETA, optimizer.init(THETA), THETA)
    with pytest.raises(ValueError, match="params=None"):
        optimizer.update(THETA, optimizer.init(THETA))
    with pytest.raises(ValueError, match=r"rows of \(5,\) cannot be split into 2"):
        m_sam()(lambda p, b: p * jnp.mean(b))(1.0, jnp.ones(5))
