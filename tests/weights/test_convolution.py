"""Convolutions by structured kernels, against jax.lax with the dense kernel and against PEFT's Conv2d."""

import functools
import math
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.errors import ScopeParamShapeError
from jax._src.ad_checkpoint import saved_residuals
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import adapters
from jaxft.adapters import (
    base_params,
    combine,
    count,
    densify,
    full,
    largest_shape,
    load_adapter,
    lora_plus,
    merge,
    monarch_from_dense,
    partition,
    quantised,
)
from jaxft.adapters.native import apply_named, load_native, save_native
from jaxft.parallel import make_mesh, param_shardings, shard_params
from jaxft.weights import ReshapedWeight, conv, lora_weight, to_dense
from tests import small_models
from tests.weights.test_family import CASES, KEY

# Kernels here are [*window, in, out], stacked or not.
adapt = functools.partial(adapters.adapt, input_axes=lambda path: 3)
X = jax.random.normal(jax.random.key(3), (2, 7, 6, 4))
SHAPE = (3, 2, 4, 10)


def dense_conv(x, kernel, strides=1, padding="SAME", dilation=1, groups=1):
    """The same by jax.lax, one window axis after the other named."""
    n, letters = kernel.ndim - 2, "DHW"[5 - kernel.ndim :]
    places = f"N{letters}C"
    numbers = jax.lax.conv_dimension_numbers(
        x.shape, kernel.shape, (places, f"{letters}IO", places)
    )
    return jax.lax.conv_general_dilated(
        x, kernel, (strides,) * n, padding, None, (dilation,) * n, numbers, groups
    )


def make(rule, shape=SHAPE):
    """Params with a kernel whose trained fields have moved."""
    params = {"kernel": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    return moved(adapted(params, {"kernel": rule}, input_axes=lambda path: len(shape) - 1))


adapted = functools.partial(small_models.adapted, input_axes=lambda path: 3)


def moved(params):
    trainable, frozen = partition(params)
    noise = lambda leaf: (
        np.asarray(leaf)
        + 0.3 * np.cos(1.0 + np.arange(leaf.size), dtype=np.float32).reshape(leaf.shape)
    )
    return combine(jax.tree.map(noise, trainable), frozen)


@pytest.mark.parametrize("name", CASES)
def test_products_and_derivatives_are_the_dense_kernel_s(name):
    params = make(CASES[name].rule)
    assert params["kernel"].shape == to_dense(params["kernel"]).shape == SHAPE
    trainable, frozen = partition(params)
    assert bool(jax.tree.leaves(trainable)) == CASES[name].trains
    at = (trainable, X)
    along = jax.tree.map(lambda leaf: np.cos(7 * leaf), at)

    def results(apply, at, along, frozen):
        value = jax.jit(lambda t, x: jnp.sum(jnp.sin(apply(x, combine(t, frozen)["kernel"]))))
        gradient = jax.grad(value, argnums=(0, 1))
        return *jax.jvp(gradient, at, along), jax.jvp(value, at, along)

    forms = (conv, lambda x, w: dense_conv(x, to_dense(w)))
    run = jax.jit(lambda *args: [results(form, *args) for form in forms])
    ours, expected = run(at, along, frozen)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    jax.tree.map(close, ours, expected)
    if CASES[name].trains:
        assert all(np.any(g != 0) for g in jax.tree.leaves(ours[0]))


@pytest.mark.parametrize("name", ["lora", "dora", "paca", "ia3 output", "nf4", "frozen"])
@pytest.mark.parametrize(
    "places, window, options",
    [
        ((9,), (3,), {}),
        ((9,), (2,), dict(strides=2, padding="VALID")),
        ((8, 7), (3, 3), dict(strides=2, groups=2)),
        ((8, 7), (1, 1), dict(groups=2)),
        ((8, 7), (3, 2), dict(dilation=2, padding=[(2, 1), (0, 3)])),
        ((4, 5, 4), (2, 3, 1), dict(strides=2)),
    ],
)
def test_strides_padding_dilation_and_groups(name, places, window, options):
    x = np.random.default_rng(1).normal(size=(2, *places, 8)).astype(np.float32)
    kernel = make(CASES[name].rule, (*window, 8 // options.get("groups", 1), 16))["kernel"]

    @jax.jit
    def run(x, kernel):
        dense = to_dense(kernel)
        forms = (conv(x, kernel, **options), conv(x, dense, **options))
        return *forms, dense_conv(x, dense, **options)

    found, plain, expected = run(x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(plain, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "paca", "nf4"])
def test_stacked_layers_under_scan_and_vmap(name):
    kernels = np.random.default_rng(0).normal(size=(3, 3, 3, 4, 4)).astype(np.float32) / 6
    params = moved(adapted({"layers": {"kernel": kernels}}, {".*": CASES[name].rule}))
    stacked = params["layers"]["kernel"]
    assert stacked.shape == kernels.shape and stacked.stack == (3,)
    with pytest.raises(ValueError, match=r"of which \(3,\) are stacked"):
        conv(X, stacked)

    @jax.jit
    def run(params):
        merged, stacked = merge(params)["layers"]["kernel"], params["layers"]["kernel"]
        h = X
        for kernel in merged:
            h = jnp.tanh(dense_conv(h, kernel))
        body = jax.checkpoint(lambda h, w: (jnp.tanh(conv(h, w)), None))
        each = jax.vmap(conv, (None, 0))(X, stacked)[2]
        return (jax.lax.scan(body, X, stacked)[0], each), (h, dense_conv(X, merged[2]))

    for found, expected in zip(*run(params), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "paca", "vera", "nf4", "frozen"])
def test_the_backward_pass_keeps_no_second_kernel_and_under_frozen_ones_no_input(name):
    x, size = jnp.ones((2, 5, 5, 16)), 3 * 3 * 16 * 24
    params = {"kernel": jnp.ones((3, 3, 16, 24))}
    if CASES[name].trains:
        params = adapt(KEY, params, {"kernel": quantised("nf4")})
    trainable, frozen = partition(adapt(KEY, params, {"kernel": CASES[name].rule}))
    loss = lambda t, f, x: jnp.sum(conv(x, combine(t, f)["kernel"]))
    kept = saved_residuals(loss, trainable, frozen, x)
    made = [aval for aval, where in kept if "from the argument" not in where]
    assert all(aval.size < size for aval in made), made
    if not CASES[name].trains:
        kept = saved_residuals(lambda x: loss(trainable, frozen, x), x)
        assert all(aval.shape != x.shape for aval, _ in kept), kept


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_low_rank_factors_are_never_multiplied_out_for_the_gradient(name):
    """No product in the program has the size of the kernel, but for DoRA's norms."""
    trainable, frozen = partition(make(CASES[name].rule, (3, 3, 16, 24)))
    x = jnp.ones((1, 9, 9, 16))
    loss = lambda t: jnp.sum(jnp.sin(conv(x, combine(t, frozen)["kernel"])))
    program = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    found = re.findall(r"f32\[([\d,]+)\] = (dot_general|conv_general_dilated)", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape, _ in found]
    assert len(sizes) >= 5 and sizes.count(3 * 3 * 16 * 24) == (name == "dora")


def test_a_quantised_kernel_takes_an_adapter():
    params = {"kernel": jax.random.normal(KEY, (3, 3, 8, 16))}
    rounded = adapt(KEY, params, {"kernel": quantised("nf4", 32)})
    adapted = moved(adapt(KEY, rounded, {"kernel": CASES["lora"].rule}))
    assert adapted["kernel"].shape == (3, 3, 8, 16) and count(adapted)[0] == 2 * (72 + 16)
    x = jnp.ones((1, 4, 4, 8))
    np.testing.assert_allclose(
        conv(x, adapted["kernel"]), dense_conv(x, to_dense(adapted["kernel"])), atol=1e-4
    )
    np.testing.assert_array_equal(merge(base_params(adapted))["kernel"], merge(rounded)["kernel"])


def test_what_is_done_to_weights_is_done_to_kernels(tmp_path):
    """Saving, LoRA+, (IA)^3's bias, vera's tables, densify."""
    params = {"conv": {"kernel": jax.random.normal(KEY, (3, 3, 8, 16)), "bias": jnp.ones(16)}}
    assert largest_shape(params, ".*kernel", input_axes=lambda path: 3) == (72, 16)
    settings, experts = (
        dict(name="vera", rank=4, target=".*kernel"),
        {"kernel": jnp.ones((3, 5, 4))},
    )
    for base, depth in ((params, 0), (experts, 1)):
        axes = dict(
            stacked=lambda path, depth=depth: depth,
            input_axes=lambda path, depth=depth: None if depth else 3,
        )
        ours = moved(apply_named(base, **settings, **axes))
        save_native(tmp_path, ours, **settings)
        found = load_native(tmp_path, base, stacked=axes["stacked"])  # The files know the inputs.
        jax.tree.map(np.testing.assert_array_equal, found, ours)
    kind = types.SimpleNamespace(family="llama")  # any: the kernels' paths are not its
    options = dict(name="lora", rank=2, target=".*kernel", quantise="int8")
    quantised = moved(apply_named(params, **options, input_axes=lambda path: 3))
    save_native(tmp_path, quantised, **options)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path, kind, params), quantised)

    trainable, _ = partition(make(CASES["lora"].rule))
    updates, _ = lora_plus(4.0).update(trainable, lora_plus(4.0).init(trainable))
    b = lambda tree: tree["kernel"].matrix.b
    np.testing.assert_allclose(b(updates), 4 * b(trainable))

    scaled = moved(adapt(KEY, params, {".*kernel": CASES["ia3 output"].rule}))["conv"]
    y = (dense_conv(jnp.ones((1, 3, 3, 8)), params["conv"]["kernel"]) + 1.0) * (
        scaled["kernel"].matrix.scale.reshape(1, 1, 1, -1)
    )
    dense = merge({"conv": scaled})["conv"]
    bias = dense["bias"].reshape(1, 1, 1, -1)
    np.testing.assert_allclose(conv(jnp.ones((1, 3, 3, 8)), dense["kernel"]) + bias, y, atol=1e-3)

    blocks = adapt(KEY, params, {".*kernel": monarch_from_dense(inputs=2, outputs=2)})
    assert densify(blocks)["conv"]["kernel"].shape == (3, 3, 8, 16)


def test_laid_over_a_mesh_it_is_the_same():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rules = [(".*", PartitionSpec(None, None, "fsdp", "tensor"))]
    x = jax.random.normal(KEY, (4, 6, 6, 8))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    for name in ("lora", "dora", "paca", "nf4"):
        params = make(CASES[name].rule, (3, 3, 8, 16))
        expected = jax.jit(conv)(x, params["kernel"])
        placed = shard_params(params, mesh, rules)["kernel"]
        found = jax.jit(conv)(jax.device_put(x, rows), placed)
        np.testing.assert_allclose(found, expected, atol=1e-3)
    lora = param_shardings(make(CASES["lora"].rule, (3, 3, 8, 16)), mesh, rules)["kernel"].matrix
    assert lora.base.spec == PartitionSpec("fsdp", "tensor")
    assert lora.b.spec == PartitionSpec(None, "tensor")


def test_lora_is_pefts_of_a_conv2d():
    torch = pytest.importorskip("torch", reason="pip install 'jaxft[test]'")
    peft = pytest.importorskip("peft", reason="pip install 'jaxft[test]'")
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, bias=False))
    theirs = peft.get_peft_model(net, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    ours = lambda tensor: jnp.asarray(tensor.detach().numpy().transpose(2, 3, 1, 0))
    kernel, a, b = map(
        ours, (layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    low_rank = lora_weight(KEY, kernel.reshape(-1, 6), rank=3, alpha=6.0)
    low_rank = type(low_rank)(low_rank.base, a.reshape(-1, 3), b.reshape(3, 6), 6.0)
    y = conv(X, ReshapedWeight(low_rank, (3, 2, 4), (6,)), strides=2, padding=[(1, 1), (1, 1)])
    places = torch.tensor(np.asarray(X.transpose(0, 3, 1, 2)))
    wanted = theirs(places).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_a_plain_flax_convolution_refuses_weights_and_takes_them_merged():
    model = nn.Conv(6, (3, 3))
    params = model.init(KEY, X)["params"]
    adapted = adapt(KEY, params, {"kernel": CASES["lora"].rule})
    with pytest.raises(ScopeParamShapeError, match='arameter "kernel"'):
        model.apply({"params": adapted}, X)
    trainable, frozen = partition(adapted)

    def loss(trainable):
        return jnp.mean(model.apply({"params": merge(combine(trainable, frozen))}, X) ** 2)

    updates = optax.tree.scale(-0.1, jax.grad(loss)(trainable))
    assert loss(optax.apply_updates(trainable, updates)) < loss(trainable)


def test_what_does_not_fit_is_explained():
    kernel = make(CASES["lora"].rule)["kernel"]
    with pytest.raises(ValueError, match=r"got x \(2, 7, 6, 4\) and a weight \(4, 10\)"):
        conv(X, lora_weight(KEY, jnp.ones((4, 10)), rank=2))
    with pytest.raises(ValueError, match=r"in 1 groups reads 4 channels.*got x \(2, 7, 6, 5\)"):
        conv(jnp.ones((2, 7, 6, 5)), kernel)
    with pytest.raises(ValueError, match="in 3 groups reads 12 channels"):
        conv(jnp.ones((2, 7, 6, 12)), kernel, groups=3)
    assert adapt(KEY, {"kernel": kernel}, {"kernel": full()})["kernel"] is kernel


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=4)(x)


# One of each class of weights: the axes are the adapter's concern, and not the weight's.
@pytest.mark.parametrize(
    "name", ["lora", "dora", "vera", "oft", "ia3 input", "ia3 output", "paca", "int8", "frozen"]
)
def test_flax_s_own_attention_takes_adapters_of_matrices(name):
    """Kernels [in, heads, head size] and [heads, head size, out] are adapted as nn.Dense's would be."""
    params = attention_params()
    rules = {".*/(query|out)/kernel": CASES[name].rule}
    inputs = lambda path: 2 if "/out/" in path else 1
    as_matrix = lambda path, leaf: leaf.reshape((32, 32) if path[-1].key == "kernel" else (32,))
    flat = jax.tree_util.tree_map_with_path(as_matrix, params)
    ours = jax.jit(merge)(moved(adapted(params, rules, input_axes=inputs)))
    wanted = jax.jit(merge)(moved(small_models.adapted(flat, rules)))
    shaped = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), wanted, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, shaped)
    x = jax.ShapeDtypeStruct((2, 5, 32), jnp.float32)
    assert (
        jax.eval_shape(lambda p, x: Attention().apply({"params": p}, x), ours, x).shape == x.shape
    )


@functools.cache
def attention_params():
    params = jax.jit(Attention().init)(KEY, jnp.ones((2, 5, 32)))["params"]
    return jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), params)


def test_heads_are_split_over_a_mesh_as_columns():
    params = {"kernel": jnp.ones((32, 4, 8))}
    adapted = adapters.adapt(KEY, params, {"kernel": CASES["lora"].rule}, input_axes=lambda path: 1)
    specs = adapted["kernel"].with_specs(PartitionSpec("fsdp", "tensor", None)).matrix
    assert specs.base == PartitionSpec("fsdp", "tensor")
    window = make(CASES["lora"].rule)["kernel"]
    specs = window.with_specs(PartitionSpec("data", None, "fsdp", "tensor")).matrix
    assert specs.base == PartitionSpec("fsdp", "tensor")  # a window is not split
    with pytest.raises(ValueError, match=r"outputs are \(4, 8\): adapt\(..., input_axes=\)"):
        conv(jnp.ones((1, 3, 4)), adapted["kernel"])
