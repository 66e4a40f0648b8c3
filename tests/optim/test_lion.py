"""Lion against optax's, the paper's worked steps, and the arithmetic of its few-bit momentum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.kernels.counter_bits import counter_bits, seeds
from jaxft.kernels.lion import kernel_applies, lion_int8_kernel, lion_step
from jaxft.kernels.rounding import Int8Blocks, dequantise, quantise, spread, stochastic_round
from jaxft.optim import lion, lion_apply, round_stochastically, scale_by_lion
from tests.aot import run_aot

SHAPES = {"a": (300, 13), "b": (7,), "c": (16, 70), "d": (2, 5, 3), "e": ()}
MASK = {"a": True, "b": False, "c": True, "d": False, "e": True}


def tree(number, dtype=jnp.float32):
    rng = np.random.default_rng(number)
    return {k: jnp.asarray(rng.standard_normal(s), dtype) for k, s in SHAPES.items()}


def jitted(optimizer):
    @jax.jit
    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("rate", [1e-3, optax.cosine_decay_schedule(1e-2, 40)])
def test_float32_is_optax_to_the_last_bit(mask, rate):
    settings = dict(b1=0.95, b2=0.98, weight_decay=0.3, mask=mask)
    ours, theirs = lion(rate, **settings), optax.lion(rate, **settings)
    apply = jax.jit(lambda p, g, s: lion_apply(p, g, s, rate, **settings))
    a, b, c = [tree(0)] * 3
    states = [ours.init(a), theirs.init(b), scale_by_lion().init(c)]
    step, their_step = jitted(ours), jitted(theirs)
    for number in range(50):
        grads = tree(number + 1)
        a, states[0] = step(a, grads, states[0])
        b, states[1] = their_step(b, grads, states[1])
        c, states[2] = apply(c, grads, states[2])
        chex.assert_trees_all_equal(a, b)
        chex.assert_trees_all_equal(c, b)
        chex.assert_trees_all_equal(states[0][0].mu, states[1][0].mu)
        chex.assert_trees_all_equal(states[2].mu, states[1][0].mu)


def test_worked_example_of_the_specification():
    optimizer = lion(0.1, weight_decay=0.5)
    params = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    expected = [[0.85, -1.8], [0.9075, -1.81], [0.962125, -1.6195]]
    for g, wanted in zip([[1.0, -2.0], [-5.0, 1.0], [0.0, 0.0]], expected, strict=True):
        updates, state = optimizer.update(jnp.array(g), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, wanted, rtol=1e-6)
    np.testing.assert_allclose(state[0].mu, [-0.039699, -0.009702], rtol=1e-5)


def test_signs_alone_count():
    def run(scale, **settings):
        optimizer, params = lion(0.1, **settings), tree(0)
        state, moves = optimizer.init(params), []
        for number in range(4):
            grads = jax.tree.map(lambda g: g * scale, tree(number + 1))
            updates, state = optimizer.update(grads, state, params)
            moves.append(updates)
        return moves

    moves = run(1.0)
    for leaf in jax.tree.leaves(moves):
        np.testing.assert_array_equal(jnp.abs(leaf), np.float32(0.1))
    # A power of two changes no mantissa.
    chex.assert_trees_all_equal(moves, run(2.0**-20))
    signs = jax.tree.map(lambda g: -0.1 * jnp.sign(g), [tree(n + 1) for n in range(4)])
    chex.assert_trees_all_close(run(1.0, b1=0.0, b2=0.0), signs)


@pytest.mark.parametrize("mu_dtype, most", [("float32", 0.5), ("bfloat16", 0.25), ("int8", 0.14)])
def test_state_against_adamw_s(mu_dtype, most):
    params = {"w": jnp.zeros((576, 1536)), "lora": jnp.zeros((16, 576)), "b": jnp.zeros(768)}
    size = lambda t: sum(x.nbytes for x in jax.tree.leaves(t))
    moments = size(scale_by_lion(mu_dtype=mu_dtype).init(params).mu)
    assert moments <= most * size(optax.scale_by_adam().init(params))
    # The tables of one leaf: a code a number, and four bytes a block of 256.
    if mu_dtype == "int8":
        assert size(scale_by_lion(mu_dtype="int8").init({"w": params["w"]}).mu) == (
            576 * 1536 + 4 * 3 * 1536
        )


def test_bfloat16_moment_of_1_reaches_1_1_only_by_stochastic_rounding():
    params = jnp.zeros(4096)
    grads = jnp.full(4096, 1.1)
    means = {}
    for stochastic in (True, False):
        optimizer = scale_by_lion(mu_dtype="bfloat16", stochastic_rounding=stochastic)
        state = optimizer.init(params)
        state = state._replace(mu=jnp.ones(4096, jnp.bfloat16))
        state, _ = jax.lax.scan(
            lambda s, _, o=optimizer: (o.update(grads, s)[1], None), state, length=200
        )
        means[stochastic] = float(jnp.mean(state.mu.astype(jnp.float32)))
    exact = 1.1 - 0.1 * 0.99**200
    assert means[False] == 1.0
    # A step adds at most the variance 2^-14 / 4 of rounding in 1..2; forgetting by 0.99 sums 50 of them.
    assert abs(means[True] - exact) < 4 * np.sqrt(50 * 2**-14 / 4 / 4096)


def test_stochastic_rounding_is_unbiased_and_goes_to_neighbours():
    x = jnp.float32(1 + 2**-7 * 0.3)
    draws = stochastic_round(
        jnp.full(100_000, x), counter_bits(jnp.uint32([3, 4]), (100_000,))
    ).astype(jnp.float32)
    assert set(np.unique(draws)) == {1.0, 1 + 2.0**-7}
    share = float(jnp.mean(draws > 1))
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 100_000)
    special = jnp.float32([jnp.inf, -jnp.inf, jnp.nan, 0.0])
    rounded = stochastic_round(special, jnp.full(4, 0xFFFF, jnp.uint32))
    assert (rounded[:2] == special[:2]).all() and jnp.isnan(rounded[2])


def test_bfloat16_params_move_by_steps_below_their_last_place():
    params = jnp.ones(4096, jnp.bfloat16)
    optimizer = lion(1e-4)
    step = lambda c, _: (jitted(optimizer)(c[0], jnp.ones_like(c[0]), c[1]), None)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=100))(
        (params, optimizer.init(params))
    )
    # 100 steps of 1e-4 down from 1, each with the variance of rounding to 2^-8 at most.
    mean = float(jnp.mean(params.astype(jnp.float32)))
    assert abs(mean - 0.99) < 4 * np.sqrt(100 * 2**-18 / 4096)
    nearest = lion(1e-4, stochastic_rounding=False)
    updates, _ = nearest.update(params, nearest.init(params), params)
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("exponent", range(-30, 31, 10))
def test_rounded_updates_land_on_the_rounded_params(exponent):
    # Also where params and updates are of quite different sizes.
    params = (jax.random.normal(jax.random.key(0), (999,)) * 2.0**exponent).astype(jnp.bfloat16)
    given = jax.random.normal(jax.random.key(1), (999,))
    optimizer = round_stochastically(jax.random.key(5))
    updates, _ = optimizer.update(given, optimizer.init(params), params)
    new = optax.apply_updates(params, updates).astype(jnp.float32)
    exact = params.astype(jnp.float32) + given
    assert new.dtype == jnp.float32 and optax.apply_updates(params, updates).dtype == jnp.bfloat16
    assert (jnp.abs(new - exact) <= jnp.abs(exact) * 2.0**-7).all()
    assert (new == new.astype(jnp.bfloat16).astype(jnp.float32)).all()


@pytest.mark.parametrize("shape", [(300, 13), (1000,), (16, 70), (3, 256, 5)])
def test_int8_error_is_within_half_a_step(shape):
    x = jax.random.normal(jax.random.key(0), shape) ** 3
    blocks = quantise(x)
    scale = spread(blocks.scale, shape)
    assert (jnp.abs(x) <= scale).all()
    t = 127 * jnp.sqrt(jnp.abs(x) / scale)
    bound = scale * (t + 0.25) / 127**2
    assert (jnp.abs(dequantise(blocks) - x) <= bound * (1 + 1e-4)).all()
    # As good as the usual linear code in the mean square, and far better near 0.
    small = jnp.abs(x) < scale / 127 / 2
    assert (dequantise(blocks)[small] != 0).mean() > 0.8
    zero = quantise(jnp.zeros(shape))
    assert not zero.scale.any() and not dequantise(zero).any()


def test_int8_stochastic_rounding_is_unbiased():
    x = jnp.concatenate([jnp.linspace(-1, 1, 255), jnp.ones(1)])
    draws = jax.vmap(lambda s: dequantise(quantise(x, s)))(
        jax.random.bits(jax.random.key(0), (4000, 2), jnp.uint32)
    )
    error = jnp.mean(draws, axis=0) - x
    spread_ = jnp.std(draws, axis=0) / np.sqrt(4000)
    assert (jnp.abs(error) <= 4.5 * spread_ + 1e-6).all()
    assert jnp.abs(jnp.mean(error)) < 4 * jnp.sqrt(jnp.sum(spread_**2)) / 256
    step = 255 / 127**2
    assert (jnp.abs(draws - x[None]) <= step).all()


def test_counter_bits_look_random():
    bits = np.asarray(counter_bits(jnp.uint32([1, 2]), (1 << 16, 4)))
    ones = np.unpackbits(bits.view(np.uint8), bitorder="little").reshape(-1, 32)
    z = (ones.mean(0) - 0.5) * 2 * np.sqrt(len(ones))
    assert np.abs(z).max() < 4.5
    # Neighbours, columns, and other seeds are uncorrelated.
    u = bits.astype(np.float64) / 2**32 - 0.5
    other = np.asarray(counter_bits(jnp.uint32([1, 3]), bits.shape)) / 2**32 - 0.5
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, other)):
        assert abs(np.mean(a * b) * 12) < 4.5 / np.sqrt(a.size)
    assert len(np.unique(bits)) > 0.999 * bits.size
    key = jax.random.key(3)
    assert (
        len({*np.asarray(seeds(key, 4, 0, 1)).ravel(), *np.asarray(seeds(key, 4, 1, 0)).ravel()})
        == 16
    )


@pytest.mark.parametrize("shape", [(256, 128), (300, 130), (2500, 5), (2, 512, 7)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_int8_kernel_is_the_reference(shape, dtype, stochastic):
    keys = jax.random.split(jax.random.key(1), 4)
    p, g, m = (jax.random.normal(k, shape) for k in keys[:3])
    p, g, m = p.astype(dtype), g.astype(dtype), quantise(m)
    draws = jax.random.bits(keys[3], (2, 2), jnp.uint32) if stochastic else None
    settings = dict(learning_rate=1e-2, b1=0.9, b2=0.99, weight_decay=0.1)
    expected = jax.jit(lambda *a: lion_step(*a, draws, **settings, implementation="xla"))(p, g, m)
    scalars = jnp.float32(list(settings.values()))
    new = lion_int8_kernel(p, g, m, draws, scalars, interpret=True)
    chex.assert_trees_all_close(new[0], expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(new[1].scale, expected[1].scale, rtol=1e-6)
    # A scale that differs in its last bit may put a number on the other side of a code's edge.
    off = np.abs(np.int32(new[1].codes) - np.int32(expected[1].codes))
    assert off.max() <= 1 and off.mean() < 1e-3


TPU = """
import json, jax, jax.numpy as jnp, optax
from jax.sharding import SingleDeviceSharding
from jaxft.optim import lion, lion_apply, scale_by_lion
from jaxft.parallel import compile_only_devices, compiled_cost
here = SingleDeviceSharding(compile_only_devices("v5e:2x2")[0])
on = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), t)
size = lambda t: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t))
out = {}
for mu_dtype in ("float32", "bfloat16", "int8"):
    params = on({"w": jnp.zeros((2000, 2000))})
    optimizer = lion(1e-4, mu_dtype=mu_dtype, weight_decay=0.1)
    state = on(jax.eval_shape(scale_by_lion(mu_dtype=mu_dtype).init, params))
    def step(p, g, s):
        u, s = optimizer.update(g, s, p)
        return optax.apply_updates(p, u), s
    def kernel(p, g, s):
        return lion_apply(p, g, s, 1e-4, weight_decay=0.1, implementation="pallas")
    whole = on(jax.eval_shape(optimizer.init, params))
    run, held = (kernel, state) if mu_dtype == "int8" else (step, whole)
    compiled = jax.jit(run, donate_argnums=(0, 2)).lower(params, params, held).compile()
    cost = compiled_cost(compiled)
    least = 3 * size(params) + 2 * size(state.mu)
    out[mu_dtype] = [cost.bytes_accessed / least, cost.temp_bytes / least, cost.kernels]
print(json.dumps(out))
"""


def test_on_a_tpu_each_step_is_one_pass():
    result = run_aot(TPU)
    for mu_dtype in ("float32", "bfloat16"):
        moved, temporary, kernels = result[mu_dtype]
        assert 1 <= moved <= 1.05 and temporary < 0.01 and kernels == 0
    # The compiler does not count what a kernel moves: its blocks, each once, and no temporary beside it.
    moved, temporary, kernels = result["int8"]
    assert kernels == 1 and temporary < 0.01 and moved < 0.05


CPU = """
import os
os.environ["XLA_FLAGS"] = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
import json, jax, jax.numpy as jnp, optax
from jaxft.optim import lion
params = {k: jnp.zeros((512, 512)) for k in "abc"}
optimizer = lion(1e-4, weight_decay=0.1)
def step(p, g, s):
    u, s = optimizer.update(g, s, p)
    return optax.apply_updates(p, u), s
run = jax.jit(step, donate_argnums=(0, 2)).lower(params, params, optimizer.init(params)).compile()
moved = run.cost_analysis()["bytes accessed"] / (3 * 512 * 512 * 20)
print(json.dumps([moved, run.as_text().count(" copy(")]))
"""


def test_on_a_cpu_with_multi_output_fusion_too():
    moved, copies = run_aot(CPU, alone=True)
    assert 1 <= moved <= 1.05 and copies == 0


def test_bad_input():
    with pytest.raises(ValueError, match="b2 must be in"):
        lion(1e-3, b2=1.0)
    with pytest.raises(ValueError, match="float type or int8, got int32"):
        lion(1e-3, mu_dtype="int32")
    moment = Int8Blocks(jnp.zeros((16, 16), jnp.int8), jnp.zeros((1, 1)))
    assert not kernel_applies(jnp.zeros((16, 16)), moment)
    with pytest.raises(ValueError, match="no kernel for a moment"):
        lion_step(
            jnp.zeros((16, 16)), jnp.zeros((16, 16)), moment, None, learning_rate=1.0, b1=0.9, b2=0.9,
            weight_decay=0.0, implementation="pallas",
        )  # fmt: skip
    small = scale_by_lion(mu_dtype="int8").init({"few": jnp.zeros((5, 5))})
    assert small.mu["few"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_stochastic_rounding_is_unbiased_for_gradients_of_any_type(dtype):
    """Over many elements and draws the mean of the new params is θ + u, far below half of the last place."""
    size, steps = 4096, 64
    for theta, rate in [(1.0, 1e-4), (-3.0, 3e-4), (0.37, 2e-5)]:
        params = jnp.full(size, theta, jnp.bfloat16)
        grads = jnp.full(size, 0.71875, dtype)  # which bfloat16 holds
        optimizer = optax.chain(optax.sgd(rate), round_stochastically(jax.random.key(3)))

        def step(state, _, optimizer=optimizer, params=params, grads=grads):
            updates, state = optimizer.update(grads, state, params)
            assert updates.dtype == grads.dtype
            return state, optax.apply_updates(params, updates).astype(jnp.float32)

        _, new = jax.lax.scan(step, optimizer.init(params), length=steps)
        moved = np.asarray(new, np.float64) - float(params[0])
        # sgd's update, as it comes to the rounding: in the gradient's type
        given = float(optax.sgd(rate).update(grads, optax.sgd(rate).init(params))[0][0])
        place = np.abs(moved).max()  # one step in the last place
        assert 0 < abs(given) < place / 2
        error = 4 * place * np.sqrt(abs(given) / place / (size * steps))
        assert abs(moved.mean() - given) < error < 0.1 * abs(given)
