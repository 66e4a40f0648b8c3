"""Monarch against explicit permutations, the reference code's layout, and singular values."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from jaxft import train
from jaxft.adapters import carry_state, densify, full, monarch, monarch_from_dense, partition
from jaxft.models import stack_layers
from jaxft.objectives import supervised
from jaxft.weights import (
    Blocks,
    MonarchWeight,
    matmul,
    monarch_blocks,
    monarch_cost,
    monarch_project,
    monarch_weight,
    to_dense,
)
from tests.small_models import LLAMA, adapted, base, jitted

KEY = jax.random.key(0)
MLP = r"layers/.*/(up|gate|down)/kernel"


@pytest.mark.parametrize(
    "shape, cut",
    [
        ((12, 8), Blocks(3, 4, 2)),
        ((10, 7), Blocks(4, 4, 1)),
        ((6, 9), Blocks(6, 3, 1)),
        ((5, 6), Blocks(1, 1, 2)),
        ((4, 6), Blocks(2, 6, 1)),
    ],
)
def test_product_and_gradients_are_the_dense_form_s(shape, cut):
    w = jax.jit(monarch_weight, static_argnums=(1, 2))(KEY, shape, cut)
    x = np.random.default_rng(1).normal(size=(2, 3, shape[0])).astype(np.float32)

    @jax.jit
    def run(w, x):
        forms = (lambda w: matmul(x, w), lambda w: x @ to_dense(w))
        return [(form(w), jax.grad(lambda w, f=form: jnp.sum(jnp.sin(f(w))))(w)) for form in forms]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *run(w, x))
    assert jax.eval_shape(to_dense, w).shape == w.shape == shape
    assert jax.eval_shape(matmul, x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_entries_by_definition():
    """Written out index by index from the definition, loops and all."""
    cut = Blocks(2, 3, 2)
    w = monarch_weight(KEY, (8, 6), cut)
    dense = np.zeros((8, 6))
    for k, i, out, j in itertools.product(range(2), range(4), range(2), range(3)):
        dense[k * 4 + i, out * 3 + j] = sum(
            w.first[k, j, r, i] * w.second[j, out, k, r] for r in range(2)
        )
    np.testing.assert_allclose(to_dense(w), dense, atol=1e-6)


def test_square_form_is_p_l_p_r():
    w = monarch_weight(KEY, (16, 16), Blocks(4, 4, 1))
    p = np.eye(16)[np.arange(16).reshape(4, 4).T.ravel()]
    right = scipy.linalg.block_diag(*np.asarray(w.first[:, :, 0, :]))
    left = scipy.linalg.block_diag(*np.asarray(w.second[..., 0]))
    np.testing.assert_allclose(to_dense(w).T, p @ left @ p.T @ right, atol=1e-6)


def test_blocks_are_the_reference_code_s():
    """MonarchLinear(768 -> 3072, nblocks=4) in small: 8 -> 32, [4, 2, 2] and [4, 8, 2] ... by its steps."""
    n, (rows, columns) = 2, (8, 24)
    cut = monarch_blocks((rows, columns), blocks=n)
    w = monarch_weight(KEY, (rows, columns), cut)
    p, s, q = rows // n, columns // n, rows // n
    w1 = w.first.transpose(0, 2, 1, 3).reshape(n, q, p)  # q' = b n + j
    w2 = w.second.reshape(n, s, q)
    x = jax.random.normal(KEY, (5, rows))
    middle = jnp.einsum("tkp,kqp->tkq", x.reshape(5, n, p), w1).reshape(5, -1)
    middle = middle.reshape(5, q, n).transpose(0, 2, 1)
    y = jnp.einsum("tlr,lsr->tls", middle, w2).transpose(0, 2, 1).reshape(5, -1)
    np.testing.assert_allclose(matmul(x, w), y, atol=1e-5)
    gpt2 = monarch_blocks((768, 3072), blocks=4)
    assert gpt2 == Blocks(4, 4, 48)
    assert monarch_cost((768, 3072), gpt2).parameters / (768 * 3072) == 0.3125


def test_projection_worked_example():
    w = monarch_project(jnp.arange(1.0, 17).reshape(4, 4).T, Blocks(2, 2, 1))
    dense = to_dense(w).T
    np.testing.assert_allclose(dense[0], [1.4336, 1.6152, 3.3338, 3.6991], atol=1e-4)
    np.testing.assert_allclose(dense[3], [12.8918, 14.0989, 14.8949, 16.0972], atol=1e-4)
    residual = jnp.sum((dense - jnp.arange(1.0, 17).reshape(4, 4)) ** 2)
    np.testing.assert_allclose(residual, 0.82363, atol=1e-4)


@pytest.mark.parametrize("shape, cut", [((12, 8), Blocks(3, 2, 2)), ((10, 7), Blocks(4, 3, 1))])
def test_projection_is_the_best_and_idempotent(shape, cut):
    kernel = jax.random.normal(KEY, shape)
    w = monarch_project(kernel, cut)
    error = lambda w: jnp.sum((to_dense(w) - kernel) ** 2)
    if shape == (12, 8):
        slices = kernel.reshape(3, 4, 4, 2).transpose(0, 3, 2, 1)
        dropped = np.linalg.svd(slices, compute_uv=False)[..., 2:]
        np.testing.assert_allclose(error(w), np.sum(dropped**2), rtol=1e-5)
    again = monarch_project(to_dense(w), cut)
    np.testing.assert_allclose(to_dense(again), to_dense(w), atol=1e-5)
    lowest, step = (
        error(w),
        jax.jit(lambda w: jax.tree.map(lambda p, g: p - 0.01 * g, w, jax.grad(error)(w))),
    )
    for _ in range(50):  # descent from the optimum finds nothing lower
        w = step(w)
    assert error(w) > lowest - 1e-5
    np.testing.assert_allclose(
        to_dense(monarch_project(kernel, Blocks(cut.inputs, cut.outputs, 3))), kernel, atol=1e-5
    ) if shape == (10, 7) else None


def test_transforms_are_monarch():
    error = lambda m, k: float(
        jnp.linalg.norm(to_dense(monarch_project(m.T, Blocks(k, k, 1))).T - m) / jnp.linalg.norm(m)
    )
    for n, k in ((16, 4), (64, 8)):
        assert error(jnp.asarray(scipy.linalg.hadamard(n), jnp.float32), k) < 1e-6
    dft = jnp.asarray(scipy.linalg.dft(16), jnp.complex64)
    order = np.arange(16).reshape(4, 4).T.ravel()
    assert error(dft[:, order], 4) < 1e-6
    assert error(dft, 4) > 0.5
    x = jax.random.normal(KEY, (3, 16)).astype(jnp.complex64)
    w = monarch_project(dft[:, order].T, Blocks(4, 4, 1))
    np.testing.assert_allclose(matmul(x[:, order], w), np.fft.fft(x), atol=1e-4)
    gaussian = jax.random.normal(KEY, (256, 256))
    for rank, expected in ((1, 0.886), (2, 0.786), (4, 0.608)):
        w = monarch_project(gaussian, Blocks(16, 16, rank))
        relative = jnp.linalg.norm(to_dense(w) - gaussian) / jnp.linalg.norm(gaussian)
        np.testing.assert_allclose(relative, expected, atol=0.01)


def test_init_variance():
    x = jax.random.normal(KEY, (2000, 256))
    for init, gain in (("reference", 1 / 9), ("variance_preserving", 1.0)):
        w = monarch_weight(KEY, (256, 256), Blocks(16, 16, 1), init=init)
        np.testing.assert_allclose(jnp.var(matmul(x, w)), gain, rtol=0.1)
        assert jnp.max(jnp.abs(w.first)) <= (3**0.5 if gain == 1 else 1) / 4


@pytest.mark.parametrize("stacked", [False, True])
def test_reverse_sparsification_keeps_the_function_and_the_state(stacked):
    model, params = base(dataclasses.replace(LLAMA, num_layers=1 + stacked))
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 9))
    params = stack_layers(params) if stacked else params
    rules = {MLP: monarch(blocks=2), ".*": full()}
    params = adapted(params, rules)
    optimizer = train.make_optimizer(1e-2, total_steps=20)
    run = train.jit_step(train.make_step(supervised(model.forward), optimizer))
    state = train.init_state(params, optimizer, KEY)
    for _ in range(3):
        state, metrics = run(state, {"tokens": tokens})
    dense = jax.jit(densify)(state.params)
    assert not any(
        isinstance(n, MonarchWeight)
        for n in jax.tree.leaves(dense, is_leaf=lambda n: isinstance(n, MonarchWeight))
    )
    logits = lambda p: jitted(model)({"params": p}, tokens).logits
    np.testing.assert_allclose(logits(dense), logits(state.params), atol=1e-5)
    opt_state = carry_state(state.opt_state, optimizer.init(partition(dense)[0]))
    moments = lambda s, name: [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(s)
        if name in jax.tree_util.keystr(path) and hasattr(leaf, "ndim") and leaf.ndim > 1
    ]
    assert all((m == 0).all() for m in moments(opt_state, "'up'"))
    old, new = (moments(s, "'query'") for s in (state.opt_state, opt_state))
    assert old and len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != 0).any()
    counts = lambda s: [
        int(c) for c in optax.tree_utils.tree_get_all_with_path(s, "count") for c in c[1:]
    ]
    assert counts(opt_state) == counts(state.opt_state) and max(counts(opt_state)) == 3
    last = metrics["loss"].value
    state = train.TrainState(state.step, dense, opt_state, state.carry, state.key)
    state, metrics = run(state, {"tokens": tokens})
    assert metrics["loss"].value < last and int(state.step) == 4


def test_dense_to_sparse_on_a_model():
    model, params = base(LLAMA)
    kernel = params["layers"]["0"]["mlp"]["up"]["kernel"]
    rules = {MLP: monarch_from_dense(blocks=2)}
    apart, stacked = adapted(params, rules), adapted(stack_layers(params), rules)
    node = apart["layers"]["0"]["mlp"]["up"]["kernel"]
    assert isinstance(node, MonarchWeight)
    best = monarch_project(kernel, monarch_blocks(kernel.shape, blocks=2))
    np.testing.assert_allclose(to_dense(node), to_dense(best), atol=1e-6)
    logits = lambda p: jitted(model)({"params": p}, jnp.ones((1, 5), jnp.int32)).logits
    np.testing.assert_allclose(logits(stacked), logits(apart), atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"blocks": 20}, "can be cut"),
        ({"inputs": 4, "outputs": 2, "rank": 9}, "rank must lie in 1..3"),
        ({"blocks": 2, "rank": 3}, "not both"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        monarch_blocks((12, 8), **options)
    with pytest.raises(ValueError, match="matrix"):
        monarch_blocks((12,))
