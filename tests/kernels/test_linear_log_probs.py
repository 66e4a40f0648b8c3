"""Every form of fused_log_probs against log_softmax, and compiled for devices that are not here."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxft import losses
from jaxft.kernels.linear_log_probs import fused_log_probs
from jaxft.parallel import make_mesh
from jaxft.weights import Frozen, Transposed
from tests.aot import run_aot

# Batch, tokens, features, vocabulary: the last three fill no tile of tokens, or none of columns.
SIZES = [(1, 128, 8, 256), (2, 37, 16, 300), (1, 1, 8, 5), (2, 300, 8, 2100)]
FORMS = ["reference", "xla", "pallas"]


def draw(batch, length, features, vocabulary, transposed=False, dtype=jnp.float32):
    rng = np.random.default_rng(vocabulary)
    shape = (vocabulary, features) if transposed else (features, vocabulary)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return (
        jnp.asarray(normal(batch, length, features), dtype),
        jnp.asarray(normal(*shape) / np.float32(features**0.5), dtype),
        jnp.asarray(rng.integers(0, vocabulary, (batch, length))),
        # A third of the tokens count for nothing.
        jnp.asarray(normal(batch, length) * (np.arange(length) % 3 > 0)),
    )


def plain(hidden, head, targets, transposed, temperature=1.0, softcap=None):
    logits = hidden @ (head.T if transposed else head)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_probs = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


@functools.cache
def bfloat16_and_expected():
    """Arguments in bfloat16, and what log_softmax makes of them in float32."""
    hidden, head, targets, cotangent = draw(2, 37, 64, 300, dtype=jnp.bfloat16)
    wide = (hidden.astype(jnp.float32), head.astype(jnp.float32))
    expected = graded(lambda h, w: plain(h, w, targets, False), *wide, cotangent)
    return hidden, head, targets, cotangent, expected


def graded(function, hidden, head, cotangent):
    @jax.jit
    def run(hidden, head):
        value, pull = jax.vjp(function, hidden, head)
        return (value, *pull(cotangent.astype(value.dtype)))

    return run(hidden, head)


OPTIONS = dict(temperature=0.7, softcap=3.0)


@functools.cache
def expected_of(size, transposed):
    """Arguments, and what log_softmax makes of them: compiled once for all forms."""
    hidden, head, targets, cotangent = draw(*size, transposed)
    slow = lambda h, w: plain(h, w, targets, transposed, **OPTIONS)
    return hidden, head, targets, cotangent, graded(slow, hidden, head, cotangent)


# Each form at each size, and both with a head of either layout.
@pytest.mark.parametrize(
    "form, transposed, size",
    [(f, (i + j) % 2 > 0, s) for i, f in enumerate(FORMS) for j, s in enumerate(SIZES)],
)
def test_values_and_gradients_are_those_of_log_softmax(form, transposed, size):
    hidden, head, targets, cotangent, expected = expected_of(size, transposed)
    ours = lambda h, w: fused_log_probs(
        h,
        w,
        targets,
        transposed=transposed,
        implementation=form,
        chunk=7,
        interpret=True,
        **OPTIONS,
    )
    result = graded(ours, hidden, head, cotangent)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(result[1][:, ::3], jnp.zeros_like(result[1][:, ::3]))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_as_near_to_the_truth_as_its_rounding(form):
    hidden, head, targets, cotangent, expected = bfloat16_and_expected()
    ours = lambda h, w: fused_log_probs(h, w, targets, implementation=form, interpret=True)
    result = graded(ours, hidden, head, cotangent)
    assert result[0].dtype == jnp.float32
    assert result[1].dtype == result[2].dtype == jnp.bfloat16
    for mine, true in zip(result, expected, strict=True):
        # A few roundings of 2^-9, of logits no larger than 5.
        error = np.max(np.abs(np.float32(mine) - true))
        assert error < 4 * 2**-9 * max(5.0 if mine is result[0] else 0.0, np.max(np.abs(true)))


@pytest.mark.parametrize("form", FORMS)
def test_log_probs_of_bfloat16_have_the_error_of_float32(form):
    hidden, head, targets, _ = draw(2, 37, 64, 300, dtype=jnp.bfloat16)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    expected = picked - np.log(np.sum(np.exp(logits), axis=-1))
    ours = functools.partial(fused_log_probs, implementation=form, interpret=True)
    result = jax.jit(ours)(hidden, head, targets)
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["xla", "pallas"])
def test_gradient_is_the_finite_difference(form):
    hidden, head, targets, cotangent = draw(1, 5, 8, 130)
    ours = functools.partial(
        fused_log_probs, targets=targets, implementation=form, interpret=True, softcap=2.0
    )
    loss = jax.jit(lambda h, w: jnp.sum(cotangent * jnp.sin(ours(h, w))))
    jax.test_util.check_grads(
        loss, (hidden, head), order=1, modes=["fwd", "rev"], rtol=2e-2, atol=2e-2
    )


def slopes_and_curvatures(function, at, along):
    """jvp, jvp of grad, grad of jvp and grad of grad, of a scalar function."""
    gradient = jax.grad(function, (0, 1))
    slope = lambda *at: jax.jvp(function, at, along)[1]
    dot = lambda *at: sum(jnp.vdot(a, b) for a, b in zip(gradient(*at), along, strict=True))
    hessian = jax.jvp(gradient, at, along)[1]
    return slope(*at), hessian, *(jax.grad(f, (0, 1))(*at) for f in (slope, dot))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_and_second_derivatives_are_those_of_log_softmax(form, transposed):
    hidden, head, targets, cotangent, expected = second_derivatives(transposed)
    options = dict(implementation=form, chunk=7, interpret=True, transposed=transposed)
    ours = lambda *at: fused_log_probs(*at, targets, **OPTIONS, **options)
    found = derivatives(ours, hidden, head, cotangent)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(function, hidden, head, cotangent):
    scalar = jax.jit(lambda *at: jnp.sum(cotangent * jnp.sin(function(*at))))  # traced once
    return slopes_and_curvatures(scalar, (hidden, head), (jnp.cos(7 * hidden), jnp.cos(7 * head)))


@functools.cache
def second_derivatives(transposed):
    """Arguments, and what log_softmax makes of them: neither chunks of 7 nor tiles of columns are filled."""
    hidden, head, targets, cotangent = draw(1, 12, 8, 300, transposed)
    slow = lambda *at: plain(*at, targets, transposed, **OPTIONS)
    return hidden, head, targets, cotangent, derivatives(slow, hidden, head, cotangent)


@pytest.mark.parametrize("form", ["xla", "pallas"])
def test_under_jit_vmap_scan_and_remat(form):
    hidden, head, targets, cotangent = draw(3, 6, 8, 130)
    ours = lambda h, w, t: fused_log_probs(h, w, t, implementation=form, interpret=True)

    def scanned(hidden, head, targets):
        one = jax.checkpoint(lambda w, x: (w, ours(x[0], w, x[1])))
        return jax.lax.scan(one, head, (hidden, targets))[1]

    expected = graded(lambda h, w: plain(h, w, targets, False), hidden, head, cotangent)
    for way in (jax.jit(ours), jax.vmap(ours, (0, None, 0)), jax.jit(scanned)):
        result = graded(lambda h, w, way=way: way(h, w, targets), hidden, head, cotangent)
        chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_heads():
    hidden, head, targets, cotangent = draw(3, 6, 8, 130)
    heads = jnp.stack([head, 2 * head, -head])
    ours = lambda f: jax.vmap(lambda h, w, t: f(h, w, t), (0, 0, 0))
    result = graded(lambda h, w: ours(fused_log_probs)(h, w, targets), hidden, heads, cotangent)
    slow = ours(lambda h, w, t: plain(h, w, t, False))
    expected = graded(lambda h, w: slow(h, w, targets), hidden, heads, cotangent)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


def products(function, *arguments):
    """The number of matrix products that a function takes, those of a loop's body counted once."""
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


def test_a_frozen_head_costs_no_second_product_and_no_gradient():
    hidden, head, targets, _ = draw(1, 5, 8, 130)
    loss = lambda h, w: jnp.sum(fused_log_probs(h, w, targets))
    assert products(loss, hidden, head) == 1
    assert products(jax.grad(loss), hidden, head) == 2
    assert products(jax.grad(loss, 1), hidden, head) == 3
    assert products(jax.grad(loss, (0, 1)), hidden, head) == 4


def test_losses_read_dense_heads_through_it_however_they_are_wrapped():
    hidden, head, targets, cotangent = draw(2, 9, 8, 130)
    slow = lambda h, w: jnp.sum(cotangent * plain(h, w, targets, False))
    expected = jax.jit(jax.value_and_grad(slow, (0, 1)))(hidden, head)
    for weight in (head, Transposed(head.T), Frozen(head), Transposed(Frozen(head.T))):
        loss = lambda h, w: jnp.sum(cotangent * losses.linear_log_probs(h, w, targets))
        value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, weight)
        np.testing.assert_allclose(value, expected[0], rtol=1e-4)
        # An entry near 0 is a sum whose terms cancel: its rounding has the size of the largest entries.
        size = np.abs(expected[1][0]).max()
        np.testing.assert_allclose(d_hidden, expected[1][0], rtol=1e-4, atol=1e-6 * size)
        assert products(jax.grad(loss, (0, 1)), hidden, weight) == (
            2 if "Frozen" in str(jax.tree.structure(weight)) else 4
        )
        leaf = jax.tree.leaves(d_head)[0]
        if "Frozen" not in str(jax.tree.structure(weight)):
            leaf = leaf.T if isinstance(weight, Transposed) else leaf
            chex.assert_trees_all_close(leaf, expected[1][1], rtol=1e-4, atol=1e-5)
        else:
            assert not np.any(leaf)


@pytest.mark.parametrize("head_spec", [("fsdp", "tensor"), (None, None), ("tensor", None)])
def test_partitioned_over_a_mesh(head_spec):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    hidden, head, targets, cotangent = draw(8, 6, 16, 130)
    expected = graded(lambda h, w: plain(h, w, targets, False), hidden, head, cotangent)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    rows = ("data", "fsdp")
    run = jax.jit(
        lambda h, w, t, g: graded(lambda h, w: fused_log_probs(h, w, t, chunk=4), h, w, g)
    )
    result = run(put(hidden, rows), put(head, *head_spec), put(targets, rows), put(cotangent, rows))
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)
    assert "data" in str(result[1].sharding.spec)  # gradients of rows stay where the rows are


def test_pallas_in_a_shard_map():
    mesh = make_mesh(data=8)
    hidden, head, targets, cotangent = draw(8, 6, 16, 130)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        lambda h, w, t: fused_log_probs(h, w, t, implementation="pallas", interpret=True),
        mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows, check_vma=False,
    )  # fmt: skip
    result = graded(lambda h, w: jax.jit(mapped)(h, w, targets), hidden, head, cotangent)
    expected = graded(lambda h, w: plain(h, w, targets, False), hidden, head, cotangent)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_target_outside_the_vocabulary_is_seen(form):
    hidden, head, _, _ = draw(1, 3, 8, 5)
    targets = jnp.array([[-100, 5, 4]])
    ours = functools.partial(fused_log_probs, implementation=form, interpret=True)
    result = jax.jit(ours)(hidden, head, targets)
    np.testing.assert_array_equal(jnp.isnan(result), [[True, True, False]])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0.0), "temperature must be positive, got 0.0"),
        (dict(softcap=-1.0), "softcap must be positive, got -1.0"),
        (dict(chunk=0), "chunk must be positive, got 0"),
        (dict(implementation="cuda"), "'cuda'; expected one of reference, xla, pallas"),
        (dict(transposed=True), r"expected hidden \[..., T, D\].*\[V, D\]"),
    ],
)
def test_bad_arguments(options, message):
    hidden, head, targets, _ = draw(1, 3, 8, 5)
    with pytest.raises(ValueError, match=message):
        fused_log_probs(hidden, head, targets, **options)


COMPILED = """
import json, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxft.kernels.linear_log_probs import fused_log_probs
from jaxft.parallel import compile_only_devices, compiled_cost
sharding = SingleDeviceSharding(compile_only_devices({topology!r})[0])
like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
V, D = {vocabulary}, 256
arguments = (like((1, 2000, D), jnp.bfloat16), like((V, D) if {transposed} else (D, V), jnp.bfloat16),
             like((1, 2000), jnp.int32), like((1, 2000), jnp.float32))
def cost(form):
    loss = lambda h, w, t, g: jnp.sum(
        g * fused_log_probs(h, w, t, transposed={transposed}, softcap=30.0, implementation=form))
    return compiled_cost(jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile())
result = {{form: cost(form)._asdict() for form in {forms}}}
print(json.dumps(result))
"""


@pytest.mark.parametrize("topology, transposed", [("v5e:1x1", False), ("v6e:1x1", True)])
def test_kernels_compile_for_tpus_and_keep_logits_out_of_memory(topology, transposed):
    # 5000 columns fill no tile, nor do 2000 tokens.
    code = COMPILED.format(
        topology=topology, transposed=transposed, vocabulary=5000, forms=["pallas"]
    )
    cost = run_aot(code)["pallas"]
    assert cost["kernels"] == 2
    assert cost["flops"] >= 4 * 2 * 2000 * 5000 * 256  # what the kernels say of themselves
    assert cost["temp_bytes"] < 2000 * 5000 * 4 / 8


def test_the_xla_form_keeps_an_eighth_on_an_h100():
    code = COMPILED.format(
        topology="h100:1", transposed=False, vocabulary=65536, forms=["xla", "reference"]
    )
    result = run_aot(code.replace("2000", "8192"))
    assert result["xla"]["temp_bytes"] < result["reference"]["temp_bytes"] / 8


def test_kernels_lower_for_tpus_from_any_machine():
    hidden, head, targets, _ = draw(1, 300, 128, 1000, dtype=jnp.bfloat16)
    loss = lambda h, w: jnp.sum(fused_log_probs(h, w, targets, implementation="pallas"))
    lowered = jax.jit(jax.grad(loss, (0, 1))).trace(hidden, head).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 2
