"""Properties of every weight. A new one is a row of CASES."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import adapters
from jaxft.adapters import adapt, combine, merge, partition
from jaxft.losses import linear_cross_entropy, linear_log_probs
from jaxft.models import Decoder, tiny_config
from jaxft.parallel import make_mesh
from jaxft.weights import (
    Frozen,
    MonarchWeight,
    ScaledWeight,
    Transposed,
    bits_per_parameter,
    factorise,
    frozen_matmul,
    is_weight,
    matmul,
    nf4_weight,
    quantisation_error,
    quantised_weight,
    to_dense,
    vera_tables,
)
from tests.small_models import adapted, start

KEY = jax.random.key(0)


class Case(NamedTuple):
    rule: object
    exact: bool = True  # equals its base at first
    trains: bool = True
    nests: bool = True  # takes a quantised base


def butterflies(key, kernel):
    """Two factors where their blocks divide the inputs."""
    even = kernel.shape[0] % 4 == 0
    return adapters.boft(*((2, 2) if even else (kernel.shape[0], 1)))(key, kernel)


CASES = {
    "lora": Case(adapters.lora(2, 4.0)),
    "pissa": Case(adapters.pissa(2), nests=False),
    "qpissa": Case(adapters.qpissa(2), exact=False, nests=False),
    "dora": Case(adapters.dora(2, 4.0)),
    "vera": Case(adapters.vera(5)),
    "loha": Case(adapters.loha(2)),
    "lokr": Case(adapters.lokr(1)),
    "oft": Case(adapters.oft(6)),
    "boft": Case(butterflies),
    "randlora": Case(adapters.randlora(4, 1.0)),
    "vera shared": Case(adapters.vera(5, shape=(256, 256))),
    "ia3 output": Case(adapters.ia3()),
    "ia3 input": Case(adapters.ia3("input")),
    "paca": Case(adapters.paca(3)),
    "monarch": Case(adapters.monarch(blocks=2), exact=False, nests=False),
    "monarch projected": Case(
        adapters.monarch_from_dense(inputs=2, outputs=2, rank=3), exact=False
    ),
    "frozen": Case(lambda key, kernel: Frozen(kernel), trains=False),
    "nf4": Case(adapters.quantised("nf4"), exact=False, trains=False),
    "int8": Case(adapters.quantised("int8"), exact=False, trains=False),
    "int4": Case(adapters.quantised("int4", 4), exact=False, trains=False),
    "fp8": Case(adapters.quantised("fp8"), exact=False, trains=False),
}
BASES = ("nf4", "int8", "int4", "fp8")


every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def make(name, shape=(12, 10), dtype=jnp.float32, move=True):
    """A weight on a random kernel, its trained fields moved away from their initial values."""
    kernel = draw(KEY, shape, dtype)
    params = jax.jit(lambda kernel: {"kernel": CASES[name].rule(jax.random.key(1), kernel)})(kernel)
    return kernel, moved(params)["kernel"] if move else params["kernel"]


def moved(params):
    trainable, frozen = partition(params)
    leaves, tree = jax.tree.flatten(trainable)
    rng = np.random.default_rng(2)
    noise = [(0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype) for leaf in leaves]
    return combine(
        tree.unflatten([np.asarray(a) + b for a, b in zip(leaves, noise, strict=True)]), frozen
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype)


FLOAT64 = "lora pissa dora vera loha lokr paca".split() + ["ia3 output", "monarch projected"]


@pytest.mark.parametrize("name", FLOAT64)
def test_kernels_in_float64_keep_their_digits(name):
    case = CASES[name]
    with jax.enable_x64(True):
        kernel, w = make(name, dtype=jnp.float64)
        trainable, frozen = partition({"w": w})
        x = np.cos(np.arange(24.0)).reshape(2, 12)

        @jax.jit
        def run(kernel, trainable, frozen, x):
            started = adapt(jax.random.key(1), {"w": kernel}, {"w": case.rule})["w"]
            weight = lambda t: combine(t, frozen)["w"]
            through = lambda t: jnp.sum(jnp.sin(matmul(x, weight(t))))
            dense = lambda t: jnp.sum(jnp.sin(x @ to_dense(weight(t))))
            both = [jax.value_and_grad(f)(trainable) for f in (through, dense)]
            return to_dense(started), *both

        started, found, wanted = run(kernel, trainable, frozen, x)
        if case.exact:
            np.testing.assert_allclose(started, kernel, rtol=0, atol=1e-13)
        close = lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=1e-12 if a.dtype == jnp.float64 else 1e-5
        )
        jax.tree.map(close, found, wanted)
        assert found[0].dtype == jnp.float64


def close(found, expected, atol, rtol=1e-7):
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    jax.tree.map(check, found, expected)


@every_case
def test_product_is_the_dense_form_s(name):
    # Of (12, 10): test_derivatives_are_the_dense_form_s.
    shapes = [((7, 13), (2, 3)), ((128, 64), (3,))]
    weights = [make(name, shape)[1] for shape, _ in shapes]
    inputs = [draw(jax.random.key(3), (*lead, shape[0])) for shape, lead in shapes]

    @jax.jit
    def products(inputs, weights):
        return [(matmul(x, w), x @ to_dense(w)) for x, w in zip(inputs, weights, strict=True)]

    for found, expected in products(inputs, weights):
        np.testing.assert_allclose(found, expected, atol=2e-4)
    for w, (shape, _) in zip(weights, shapes, strict=True):
        dense = jax.eval_shape(to_dense, w)
        assert w.shape == dense.shape == shape and w.dtype == dense.dtype


@every_case
def test_derivatives_are_the_dense_form_s(name):
    """Gradients, forward mode, and Hessian products by all three ways."""
    _, w = make(name)
    x = draw(jax.random.key(3), (2, 3, 12))
    trainable, frozen = partition({"w": w})
    assert bool(jax.tree.leaves(trainable)) == CASES[name].trains
    at = (trainable, x)
    along = jax.tree.map(lambda leaf: np.cos(7 * leaf), at)
    through = lambda t, x, frozen: jnp.sum(jnp.sin(matmul(x, combine(t, frozen)["w"])))
    dense = lambda t, x, frozen: jnp.sum(jnp.sin(x @ to_dense(combine(t, frozen)["w"])))

    def products(function, at, along, frozen):
        f = jax.jit(lambda *at: function(*at, frozen))  # traced once
        gradient = jax.grad(f, argnums=(0, 1))
        slope = lambda *at: jax.jvp(f, at, along)[1]
        dot = lambda *at: sum(
            jnp.sum(a * b)
            for a, b in zip(jax.tree.leaves(gradient(*at)), jax.tree.leaves(along), strict=True)
        )
        found, hessian = jax.jvp(gradient, at, along)
        backwards = jax.grad(slope, argnums=(0, 1))(*at)
        return found, (slope(*at), hessian, backwards, jax.grad(dot, argnums=(0, 1))(*at))

    run = jax.jit(lambda *args: [products(f, *args) for f in (through, dense)])
    (gradient, found), (wanted, expected) = run(at, along, frozen)
    close(gradient, wanted, atol=2e-4)
    close(found, expected, rtol=1e-3, atol=1e-3)
    if CASES[name].trains:
        assert all(np.any(g != 0) for g in jax.tree.leaves(gradient[0]))


@every_case
def test_starts_as_its_base(name):
    kernel, w = make(name, move=False)
    x = draw(jax.random.key(3), (5, 12))
    same = np.allclose(jax.jit(matmul)(x, w), x @ kernel, atol=2e-5)
    assert same == CASES[name].exact


@every_case
def test_bfloat16(name):
    _, w = make(name, (64, 32), jnp.bfloat16)
    x = draw(jax.random.key(3), (4, 64), jnp.bfloat16)
    found, dense = jax.jit(lambda x, w: (matmul(x, w), to_dense(w)))(x, w)
    assert found.dtype == dense.dtype == jnp.bfloat16
    trained = jax.tree.leaves(partition({"w": w})[0])
    if not isinstance(w, MonarchWeight):  # whose factors are the kernel
        assert all(leaf.dtype == jnp.float32 for leaf in trained)
    wide = np.float32(x) @ np.float32(dense)
    assert np.max(np.abs(np.float32(found) - wide)) < 0.05 * np.max(np.abs(wide))


@every_case
def test_stacked_layers_scan_and_vmap(name):
    kernels = draw(KEY, (2, 12, 12)) / 4

    @jax.jit
    def make(kernels):
        rules = {"kernel": CASES[name].rule}
        params = adapt(KEY, {"kernel": kernels}, rules, stacked=lambda path: 1)
        one = jax.tree.map(lambda leaf: leaf[1], params["kernel"])
        return params, merge(params)["kernel"], to_dense(one)

    params, merged, one = make(kernels)
    assert params["kernel"].shape == (2, 12, 12)
    np.testing.assert_allclose(merged[1], one, atol=1e-6)
    trainable, frozen = partition(params)
    x = draw(jax.random.key(3), (5, 12))

    def scanned(t, wrap=lambda f: f):
        body = wrap(lambda h, w: (jnp.tanh(matmul(h, w)), None))
        return jnp.sum(jax.lax.scan(body, x, combine(t, frozen)["kernel"])[0])

    def unrolled(t):
        h = x
        for i in range(2):
            h = jnp.tanh(
                h @ to_dense(jax.tree.map(lambda leaf, i=i: leaf[i], combine(t, frozen)["kernel"]))
            )
        return jnp.sum(h)

    ways = (unrolled, scanned, lambda t: scanned(t, jax.checkpoint))
    run = jax.jit(lambda t: [jax.value_and_grad(way)(t) for way in ways])
    expected, *found = run(trainable)
    for each in found:
        close(each, expected, atol=1e-3)


@every_case
def test_sharded_is_the_same(name):
    mesh = make_mesh(fsdp=4, tensor=2)
    _, w = make(name, (64, 32))

    def place(spec):
        specs = w.with_specs(PartitionSpec(*spec))
        leaves = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
        placed = []
        for leaf, part in zip(jax.tree.leaves(w), leaves, strict=True):
            # Parts that a mesh axis does not divide stay whole, as jaxft.parallel has it.
            sizes = [1 if a is None else mesh.shape[a] for a in part]
            fits = all(n % s == 0 for n, s in zip(leaf.shape, sizes, strict=False))
            part = part if fits else PartitionSpec()
            placed.append(jax.device_put(leaf, NamedSharding(mesh, part)))
        return jax.tree.unflatten(jax.tree.structure(w), placed)

    sharded = [place(spec) for spec in (("fsdp", "tensor"), (None, "tensor"), ("fsdp", None))]
    x = draw(jax.random.key(3), (8, 64))
    products = jax.jit(lambda x, ws: [matmul(x, w) for w in ws])  # one program: a third of the time
    expected = jax.jit(matmul)(x, w)
    for product in products(x, sharded):
        np.testing.assert_allclose(product, expected, atol=2e-4)


@every_case
def test_specs_speak_of_leading_axes_and_stacked_ones_are_among_them(name):
    def weight(*shape):
        options = {"rules": {"kernel": CASES[name].rule}, "stacked": lambda path: len(shape) - 2}
        return jax.eval_shape(lambda k: adapt(KEY, {"kernel": k}, **options), jnp.ones(shape))

    def specs(w, *axes):
        found = jax.tree.leaves(w["kernel"].with_specs(PartitionSpec(*axes)))
        return [(*spec, *[None] * 8)[:8] for spec in found]

    one, stacked = weight(8, 16), weight(2, 3, 8, 16)
    assert stacked["kernel"].shape == (2, 3, 8, 16)
    assert specs(one, "fsdp") == specs(one, "fsdp", None)
    inner = specs(one, "fsdp", "tensor")
    found = specs(stacked, None, "expert", "fsdp", "tensor")
    for leaf, axes, rest in zip(jax.tree.leaves(stacked), found, inner, strict=True):
        assert not any(axes[leaf.ndim :])
        assert not any(axes) or axes == (None, "expert", *rest)[:8]


# Each over both types of base; two of them over every kind.
NESTED = [n for n, c in CASES.items() if c.nests and c.trains]
NESTS = [(name, base) for name in NESTED for base in ("nf4", "int8")]
NESTS += [(name, base) for name in ("lora", "paca") for base in ("int4", "fp8")]


@pytest.mark.parametrize("name, base", NESTS)
def test_nests_over_a_quantised_base(name, base):
    # Operation by operation: bases of one type share what is compiled.
    case, (params, rounded) = CASES[name], quantise(base)
    ours = adapt(KEY, params, {"kernel": case.rule})
    x = draw(jax.random.key(3), (5, 64))
    found = matmul(x, ours["kernel"])
    np.testing.assert_allclose(found, x @ to_dense(ours["kernel"]), atol=2e-4)
    if case.exact:
        np.testing.assert_allclose(found, x @ rounded, atol=2e-4)
    trainable, frozen = partition(ours)
    grads = jax.grad(lambda t: jnp.sum(jnp.sin(matmul(x, combine(t, frozen)["kernel"]))))(trainable)
    assert jax.tree.leaves(grads) and all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@functools.cache
def quantise(base):
    """(quantised params, their dense kernel)."""
    made = adapted({"kernel": draw(KEY, (64, 16))}, {"kernel": CASES[base].rule})
    return made, jax.jit(to_dense)(made["kernel"])


def head_losses(hidden, head, targets, weights, signs):
    total = linear_cross_entropy(hidden, head, targets, weights, chunk=2)
    return total, jnp.sum(signs * linear_log_probs(hidden, head, targets, chunk=2))


@jax.jit
def unfused(hidden, dense, targets, weights, signs):
    """Both losses by a dense head, with the gradients of their sum by hidden states and head."""

    def total(hidden, dense):
        log_probs = jax.nn.log_softmax(hidden.astype(jnp.float32) @ dense.astype(jnp.float32))
        log_probs = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        values = -jnp.sum(weights * log_probs), jnp.sum(signs * log_probs)
        return sum(values), values

    return jax.grad(total, (0, 1), has_aux=True)(hidden, dense)


@functools.cache
def head_inputs(size, vocabulary, dtype):
    """(hidden states, targets, weights, signs)."""
    keys = jax.random.split(jax.random.key(3), 4)
    # Logits of about 1, as at a model's beginning: larger ones amplify rounding.
    hidden = (jax.random.normal(keys[0], (2, 3, size)) / size**0.5).astype(dtype)
    targets = jax.random.randint(keys[1], (2, 3), 0, vocabulary)
    weights = jax.random.uniform(keys[2], (2, 3)).at[0, 1].set(0.0)
    return hidden, targets, weights, jax.random.normal(keys[3], (2, 3))


def check_head(head, dtype, tolerance):
    """Losses, and gradients of their sum, are the unfused ones up to a share of the largest entry."""
    inputs = head_inputs(*head.shape, dtype)
    trainable, frozen = partition({"w": head})
    whole = lambda trainable: combine(trainable, frozen)["w"]

    @jax.jit
    def run(hidden, trainable):
        def total(hidden, trainable):
            values = head_losses(hidden, whole(trainable), *inputs[1:])
            return sum(values), values

        found = jax.grad(total, (0, 1), has_aux=True)(hidden, trainable)
        dense, pull = jax.vjp(lambda trainable: to_dense(whole(trainable)), trainable)
        (by_hidden, by_dense), values = unfused(hidden, dense, *inputs[1:])
        return found, ((by_hidden, pull(by_dense)[0]), values)

    found, expected = run(inputs[0], trainable)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        a, b = np.float32(a), np.float32(b)
        # A loss is a sum of terms of both signs and about one nat each.
        size = np.max(np.abs(b)) + (1e-6 if b.ndim else 1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)
    return found[0][1]


# In bfloat16 some weights round their dense form, others their parts, to 2^-9 of a number: one of each kind.
IN_BFLOAT16 = (
    "lora", "dora", "vera", "loha", "oft", "ia3 output", "paca", "monarch", "frozen", "nf4", "int8",
)  # fmt: skip


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [(name, jnp.float32, 2e-5) for name in CASES]
    + [(name, jnp.bfloat16, 2e-2) for name in IN_BFLOAT16],
)
def test_as_a_head_it_has_the_losses_of_its_dense_form(name, dtype, tolerance):
    _, w = make(name, (12, 10) if dtype == jnp.float32 else (64, 32), dtype)
    gradients = jax.tree.leaves(check_head(w, dtype, tolerance))
    assert bool(gradients) == CASES[name].trains and all(np.any(g != 0) for g in gradients)


@pytest.mark.parametrize(
    "name, base",
    [(name, base) for name in ("lora", "paca") for base in BASES]
    + [(name, "int8") for name in ("dora", "vera", "loha", "lokr", "ia3 output")],
)
def test_as_a_head_over_a_quantised_base(name, base):
    head = adapted(quantise(base)[0], {"kernel": CASES[name].rule})["kernel"]
    assert jax.tree.leaves(check_head(head, jnp.float32, 2e-5))


@pytest.fixture(scope="module")
def whole_model():
    """(params, logits), a function of the params."""
    model = Decoder(dataclasses.replace(tiny_config(), num_layers=1))
    tokens = jnp.arange(6)[None]
    params = start(model)
    return params, jax.jit(lambda p: model.apply({"params": p}, tokens).logits)


# All names of the command lines: tests/test_any_with_any.py.
@pytest.mark.parametrize(
    "name", ["lora", "qpissa", "vera shared", "ia3 input", "monarch projected"]
)
def test_whole_model(name, whole_model):
    """Every rule runs in a model, and merging gives the same logits."""
    case, (params, logits) = CASES[name], whole_model
    ours = adapted(params, {adapters.ALL_LINEAR: case.rule})
    found = logits(ours)
    np.testing.assert_allclose(logits(jax.jit(merge)(ours)), found, atol=1e-4)
    if case.exact:
        np.testing.assert_allclose(found, logits(params), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "pissa", "dora", "vera", "loha", "lokr", "paca"]
)
def test_bad_ranks(name):
    rule = getattr(adapters, name)
    with pytest.raises(ValueError, match=f"{name}: rank must be at least 1"):
        rule(0)
    with pytest.raises(ValueError, match="matrix"):
        rule(2)(KEY, jnp.ones(4))


def test_dora_worked_example():
    kernel = jnp.array([[3.0, 0], [4, 2]])
    w = adapters.dora(1)(KEY, kernel)
    np.testing.assert_allclose(w.magnitude, [5, 2])
    np.testing.assert_allclose(matmul(jnp.ones(2), w), [7, 2], rtol=1e-6)
    longer = dataclasses.replace(w, magnitude=jnp.array([10.0, 2]))
    np.testing.assert_allclose(matmul(jnp.ones(2), longer), [14, 2], rtol=1e-6)


def test_vera_layers_share_their_tables():
    shape = (8, 16)
    rule = adapters.vera(4, shape=shape)
    small, large = rule(KEY, jnp.ones((6, 12))), rule(jax.random.key(9), jnp.ones(shape))
    assert small.a is large.a and small.b is large.b and small.a.shape == (8, 4)
    params = adapt(KEY, {"a": jnp.ones((6, 12)), "b": jnp.ones((3, 16))}, {".*": rule})
    assert params["a"].a is params["b"].a
    assert adapters.largest_shape(params, ".*") == (6, 16)
    with pytest.raises(
        ValueError, match=r"tables \(8, 4\) and \(4, 16\) are too small for a kernel"
    ):
        rule(KEY, jnp.ones((9, 12)))
    with pytest.raises(ValueError, match="no weight matches"):
        adapters.largest_shape(params, "c")


def test_vera_tables_are_kaiming_uniform():
    a, b = vera_tables((200, 300), 50, seed=1)
    for table, fan_in in ((a, 200), (b, 50)):
        bound = (6 / fan_in) ** 0.5
        assert 0.99 * bound < jnp.max(jnp.abs(table)) <= bound * (1 + 1e-6)
        # Of a uniform variable, within 5 standard errors.
        np.testing.assert_allclose(jnp.std(table), bound / 3**0.5, rtol=5 * 0.45 * 1e-2)
    assert not np.allclose(a, vera_tables((200, 300), 50, seed=2)[0])


def test_lokr_factors_and_kronecker_product():
    assert [factorise(n) for n in (127, 128, 64, 1)] == [(1, 127), (8, 16), (8, 8), (1, 1)]
    assert [factorise(128, n) for n in (4, 3, 100)] == [(4, 32), (2, 64), (8, 16)]
    peft = pytest.importorskip("peft.tuners.lokr.layer", reason="pip install 'jaxft[test]'")
    for size in range(1, 130):
        for factor in (-1, 1, 2, 3, 4, 6, 8, 16, 40):
            assert factorise(size, factor) == peft.factorization(size, factor), (size, factor)


def test_loha_and_lokr_start_as_pefts():
    """Bounds of torch's Kaiming uniform with a = sqrt(5): 1 / sqrt(inputs) of each factor."""
    largest = lambda leaf: float(jnp.max(jnp.abs(leaf)))
    w = adapters.loha(4)(KEY, jnp.ones((400, 900)))
    assert not w.a2.any() and w.b2.any()
    found = [largest(leaf) for leaf in (w.a1, w.b1, w.b2)]
    np.testing.assert_allclose(found, [1 / 20, 1 / 2, 1 / 2], rtol=0.02)
    w = adapters.lokr(4)(KEY, jnp.ones((400, 900)))
    assert not w.u.any() and w.v is None
    np.testing.assert_allclose([largest(w.a), largest(w.b)], [20**-0.5, 1 / 2], rtol=0.05)
    assert largest(adapters.lokr(40)(KEY, jnp.ones((400, 900))).v) <= 20**-0.5


def test_ia3_scales_the_bias_of_its_layer():
    from jaxft.models.layers import Dense

    dense, x = Dense(5, bias=True), jax.random.normal(KEY, (2, 3))
    kernel, bias = jax.random.normal(KEY, (3, 5)), jnp.arange(5.0)
    scale = jnp.array([2.0, 3, 4, 5, 6])
    w = ScaledWeight(kernel, scale, "output")
    expected = (x @ kernel + bias[None]) * scale[None]
    for node in (w, Frozen(w)):
        params = {"kernel": node, "bias": Frozen(bias)}
        for p in (params, merge(params)):
            np.testing.assert_allclose(dense.apply({"params": p}, x), expected, rtol=1e-5)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, params)
    np.testing.assert_allclose(merge({"layers": stacked})["layers"]["bias"][1], bias * scale)
    # On the inputs' side the bias is none of its business.
    params = {"kernel": ScaledWeight(kernel, jnp.array([2.0, 3, 4]), "input"), "bias": bias}
    np.testing.assert_array_equal(merge(params)["bias"], bias)


def test_pissa_refuses_a_rounded_kernel():
    with pytest.raises(ValueError, match="before it was quantised"):
        adapters.pissa(2)(KEY, nf4_weight(jnp.ones((8, 8))))


@pytest.mark.parametrize("kind", ["nf4", "int8", "int4", "fp8"])
def test_qpissa_rounds_what_pissa_leaves_and_loses_less(kind):
    # A kernel with a decaying spectrum, as trained ones have.
    u, s, v = jnp.linalg.svd(jax.random.normal(KEY, (64, 32)), full_matrices=False)
    kernel = (u * (s / (1 + jnp.arange(32)))[None]) @ v
    w = adapters.qpissa(4, 8.0, kind=kind, block=32)(KEY, kernel)
    dense = adapters.pissa(4, 8.0)(KEY, kernel)
    rounded = adapters.quantised(kind, 32)
    change = (w.a @ w.b) * 2
    np.testing.assert_array_equal(to_dense(w.base), to_dense(rounded(KEY, dense.base)))
    np.testing.assert_array_equal(to_dense(w), to_dense(rounded(KEY, dense.base)) + change)
    error = lambda found: jnp.linalg.norm(to_dense(found) - kernel)
    assert error(w) < 0.9 * error(rounded(KEY, kernel))


def test_pissa_holds_the_leading_triplets_and_becomes_lora():
    from jaxft.weights import pissa_to_lora

    kernel, w = draw(KEY, (12, 10)), adapters.pissa(3, 6.0)(KEY, draw(KEY, (12, 10)))
    s = np.linalg.svd(kernel, compute_uv=False)
    np.testing.assert_allclose(np.linalg.svd(w.base, compute_uv=False)[: 10 - 3], s[3:], atol=1e-5)
    np.testing.assert_allclose(jnp.sum(w.a**2, axis=0), jnp.sum(w.b**2, axis=1), rtol=1e-4)
    later = moved({"kernel": w})["kernel"]
    plain = pissa_to_lora(later, kernel)
    assert plain.rank == 6
    np.testing.assert_allclose(to_dense(plain), to_dense(later), atol=1e-4)


def test_nf4_levels_zeros_and_size():
    block = jnp.zeros((64, 2)).at[:4, 0].set(jnp.array([0.5, -1, 0.1, 0.25]))
    w = nf4_weight(block)
    dense = to_dense(w)
    # Scales are 1 and 0: their mean and step hold both.
    np.testing.assert_allclose(dense[:4, 0], [0.4407098, -1, 0.0795803, 0.2461123], atol=2e-3)
    assert (dense[4:] == 0).all() and (jnp.abs(dense[:, 1]) < 1e-6).all()
    big = jax.eval_shape(nf4_weight, jax.ShapeDtypeStruct((512, 512), jnp.float32))
    assert bits_per_parameter(big) < 4.6
    assert bits_per_parameter(quantised_weight(jnp.ones((256, 64)), "int4")) == 4.5
    assert to_dense(nf4_weight(jnp.zeros((70, 3)))).tolist() == jnp.zeros((70, 3)).tolist()


@pytest.mark.parametrize(
    "kind, bound", [("int8", 0.01), ("fp8", 0.04), ("int4", 0.15), ("nf4", 0.12)]
)
def test_rounding_error(kind, bound):
    kernel = jax.random.normal(KEY, (256, 64))
    w = adapters.quantised(kind)(KEY, kernel)
    assert bound / 4 < quantisation_error(kernel, w) < bound
    # Every number goes to a nearest level: no other level of its block is nearer.
    if kind == "nf4":
        from jaxft.weights.quantised import NF4_LEVELS

        scale = np.repeat(np.abs(kernel).reshape(4, 64, 64).max(1), 64, axis=0)
        exact = (
            NF4_LEVELS[np.abs(np.asarray(kernel / scale)[..., None] - NF4_LEVELS).argmin(-1)]
            * scale
        )
        np.testing.assert_allclose(to_dense(w), exact, atol=0.02)


def test_a_quantised_kernel_is_never_kept_dense():
    from jax._src.ad_checkpoint import saved_residuals

    params = {"kernel": jax.random.normal(KEY, (64, 48))}
    for kind in BASES:
        base = adapt(KEY, params, {"kernel": adapters.quantised(kind)})
        for rule in (adapters.lora(2), adapters.paca(2)):
            trainable, frozen = partition(adapt(KEY, base, {"kernel": rule}))
            x = jnp.ones((5, 64))
            loss = lambda t, x=x, f=frozen: jnp.sum(jnp.sin(matmul(x, combine(t, f)["kernel"])))
            kept = [(a.shape, a.dtype) for a, _ in saved_residuals(loss, trainable)]
            assert ((64, 48), jnp.float32) not in kept


def test_lora_plus_ratio_under_sgd():
    import optax

    w = adapters.lora(2)(KEY, jnp.ones((4, 4)))
    trainable, _ = partition({"kernel": w})
    grads = jax.tree.map(jnp.ones_like, trainable)
    optimizer = optax.chain(optax.sgd(0.1), adapters.lora_plus(16.0))
    updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
    np.testing.assert_allclose(updates["kernel"].a, -0.1)
    np.testing.assert_allclose(updates["kernel"].b, -1.6)
    with pytest.raises(ValueError, match="no LoRA weight"):
        optimizer.update({"x": jnp.ones(2)}, optimizer.init({"x": jnp.ones(2)}))
    with pytest.raises(ValueError, match="positive"):
        adapters.lora_plus(0)


def test_counts_of_smollm2():
    """Trained numbers by the closed forms of the survey's table, only from shapes."""
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    trains = lambda rule: (
        30
        * sum(
            adapters.count(jax.eval_shape(lambda k=shape: rule(KEY, jnp.ones(k))))[0]
            for shape in sizes
        )
    )
    assert trains(adapters.lora(8)) == 2_442_240
    assert trains(adapters.paca(16)) == 2_488_320
    assert trains(adapters.vera(256)) == 30 * sum(256 + out for _, out in sizes)
    assert trains(adapters.dora(8)) == 2_442_240 + 30 * sum(out for _, out in sizes)


def test_bitfit_and_norms():
    model = Decoder(tiny_config())
    params = jax.eval_shape(model.init, KEY, model.example_input())["params"]
    norms = adapt(KEY, params, {adapters.ALL_NORMS: adapters.full()})
    trains, _ = adapters.count(norms)
    assert trains == tiny_config().hidden_size * (2 * tiny_config().num_layers + 1)


def test_transposed_of_quantised():
    w = quantised_weight(jax.random.normal(KEY, (64, 8)), "int8")
    x = jnp.ones((3, 8))
    np.testing.assert_allclose(matmul(x, Transposed(w)), x @ to_dense(w).T, rtol=1e-5)
    assert is_weight(w)


@pytest.mark.parametrize("name", ["lora", "vera", "loha", "lokr", "ia3 input", "paca", "frozen"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_scan_over_layers_keeps_no_second_copy_of_the_base(name, dtype):
    """Whatever the kernels' data type: the backward pass has them as arguments already."""
    layers, size = 3, 48
    kernels = jax.random.normal(KEY, (layers, size, size), dtype)
    params = {"kernel": jax.vmap(CASES[name].rule)(jax.random.split(KEY, layers), kernels)}
    trainable, frozen = partition(params)
    x = jnp.ones((5, size), jnp.bfloat16)

    def loss(trainable, frozen, x):
        body = lambda x, w: (jnp.tanh(matmul(x, w["kernel"])), None)
        return jnp.sum(jax.lax.scan(body, x, combine(trainable, frozen))[0])

    kept = [
        aval.shape
        for aval, where in saved_residuals(loss, trainable, frozen, x)
        if "from the argument" not in where
    ]
    assert (layers, size, size) not in kept


def test_frozen_matmul_is_the_product_with_a_stopped_kernel():
    x, kernel = draw(KEY, (2, 3, 12)), draw(KEY, (12, 10))

    @jax.jit
    def run(x, kernel):
        weights = (kernel, nf4_weight(kernel), Frozen(kernel))
        forms = (frozen_matmul, lambda x, w: x @ to_dense(w))
        slope = lambda form, w: jax.grad(lambda x: jnp.sum(jnp.sin(form(x, w))))(x)
        both = [[slope(form, w) for form in forms] for w in weights]
        return both, jax.grad(lambda w: jnp.sum(frozen_matmul(x, w)))(kernel)

    both, grad = run(x, kernel)
    for ours, expected in both:
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_array_equal(grad, jnp.zeros_like(kernel))
