"""Every form of the Monarch product against the definition, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.monarch import monarch_product
from tests.aot import run_aot


@functools.partial(jax.jit, static_argnums=0)
def graded(function, *args):
    """The value y of function(*args) and its pullback of cos(y)."""
    y, pull = jax.vjp(function, *args)
    return y, *pull(jnp.cos(y))


@pytest.mark.parametrize("sizes", [(2, 3, 2, 4, 5), (1, 1, 3, 4, 6), (4, 4, 1, 1, 2)])
@pytest.mark.parametrize("implementation", ["batched", "unrolled", None])
def test_forms_agree(sizes, implementation):
    inputs, outputs, rank, width, height = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    first = jax.random.normal(keys[0], (inputs, outputs, rank, width))
    second = jax.random.normal(keys[1], (outputs, height, inputs, rank))
    x = jax.random.normal(keys[2], (2, 3, inputs * width))
    dense = np.einsum("kjri,jlkr->kilj", first, second).reshape(inputs * width, -1)
    ours = lambda *args: monarch_product(*args, implementation=implementation)
    plain = lambda x, a, b: x @ jnp.einsum("kjri,jlkr->kilj", a, b).reshape(inputs * width, -1)
    y, *found = graded(ours, x, first, second)
    np.testing.assert_allclose(y, x @ dense, atol=1e-4)
    for a, b in zip(found, graded(plain, x, first, second)[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_unrolled_cpu_program_has_no_batched_product():
    first, second = jnp.ones((2, 2, 2, 3)), jnp.ones((2, 3, 2, 2))
    text = lambda name: str(
        jax.make_jaxpr(lambda x: monarch_product(x, first, second, implementation=name))(
            jnp.ones(6)
        )
    )
    assert text(None) == text("unrolled") != text("batched")


def test_unknown_implementation():
    with pytest.raises(ValueError, match="expected batched, unrolled or pallas"):
        monarch_product(jnp.ones(1), jnp.ones((1,) * 4), jnp.ones((1,) * 4), implementation="x")


# K, J, R, I, L, D, F, tokens: several token tiles, blocks that begin inside a lane tile, padded
# inputs, cut outputs, blocks that are only padding, and ranks of 1 and of no multiple of 8.
AWKWARD = [
    (2, 2, 8, 32, 64, 64, 128, 128, jnp.bfloat16, 2e-2),
    (3, 3, 1, 4, 3, 10, 7, 129, jnp.bfloat16, 2e-2),
    (3, 3, 1, 4, 3, 10, 7, 130, jnp.float32, 1e-5),
    (2, 3, 2, 100, 5, 190, 14, 257, jnp.float32, 1e-5),
    (3, 2, 2, 2, 3, 4, 5, 1, jnp.float32, 1e-5),
]


@pytest.mark.parametrize("sizes", AWKWARD)
def test_the_kernel_equals_the_plain_form(sizes):
    k, j, r, i, height, inputs, outputs, tokens, dtype, tolerance = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(tokens, inputs), (k, j, r, i), (j, height, k, r), (tokens, outputs)]
    x, first, second, g = (
        jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)
    )

    def run(cast, **form):
        @jax.jit
        def pulled(g, *args):
            y, pull = jax.vjp(lambda *a: monarch_product(*a, features=outputs, **form), *args)
            return y, *pull(g)

        return pulled(*map(cast, (g, x, first, second)))

    found = run(lambda a: a, implementation="pallas", interpret=True)
    # The plain form in float32: the kernel may err only by its data type.
    expected = run(lambda a: a.astype(jnp.float32), implementation="batched")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.max(jnp.abs(b)) + 1e-6), rtol=0)


@pytest.mark.parametrize("sizes", [AWKWARD[2], AWKWARD[4]])
def test_forward_mode_and_hessian_products_of_the_kernel_are_the_plain_form_s(sizes):
    k, j, r, i, height, inputs, outputs, tokens, dtype, _ = sizes
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(tokens, inputs), (k, j, r, i), (j, height, k, r)] * 2
    draws = [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]
    at, along = tuple(draws[:3]), tuple(draws[3:])

    @functools.partial(jax.jit, static_argnums=0)
    def products(form):
        value = lambda *a: jnp.sum(jnp.sin(monarch_product(*a, features=outputs, **dict(form))))
        gradient = jax.grad(value, (0, 1, 2))
        slope = lambda *a: jax.jvp(value, a, along)[1]
        dot = lambda *a: sum(jnp.vdot(p, q) for p, q in zip(gradient(*a), along, strict=True))
        hessian = jax.jvp(gradient, at, along)[1]
        return slope(*at), hessian, *(jax.grad(f, (0, 1, 2))(*at) for f in (slope, dot))

    found = products((("implementation", "pallas"), ("interpret", True)))
    expected = products((("implementation", "batched"),))
    # Relative to the largest entry: sums of several hundred products cancel.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max() + 1e-6),
        found,
        expected,
    )


def test_the_kernel_keeps_no_middle_vector():
    from jax._src.ad_checkpoint import saved_residuals

    args = jnp.ones((5, 6)), jnp.ones((2, 3, 1, 3)), jnp.ones((3, 4, 2, 1))
    product = lambda *a: monarch_product(*a, implementation="pallas", interpret=True).sum()
    kept = [aval.shape for aval, _ in saved_residuals(product, *args)]
    assert sorted(kept) == sorted(a.shape for a in args)


COMPILED = """
import json, jax, jax.numpy as jnp, math
from jax.sharding import SingleDeviceSharding
from jaxft.kernels.monarch import monarch_product
from jaxft.parallel import compile_only_devices, compiled_cost
from jaxft.weights import monarch_blocks
from jaxft.weights.monarch import _factor_shapes
found = []
for topology in ("v5e:2x2", "v6e:2x2"):
    place = SingleDeviceSharding(compile_only_devices(topology)[0])
    for cut in (dict(blocks=4), {})[: 2 if topology.startswith("v5e") else 1]:
        shapes = _factor_shapes((384, 1536), monarch_blocks((384, 1536), **cut))
        x, first, second, g = (
            jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place)
            for s in ((8 * 197, 384), *shapes, (8 * 197, 1536))
        )
        form = lambda *a: monarch_product(*a, features=1536, implementation="pallas")
        back = lambda x, first, second, g: jax.vjp(form, x, first, second)[1](g)
        size = lambda *arrays: 2 * sum(math.prod(a.shape) for a in arrays)
        for fn, args, least in (
            (form, (x, first, second), size(x, first, second, g)),
            (back, (x, first, second, g), size(x, first, second, g, x, first, second)),
        ):
            cost = compiled_cost(jax.jit(fn).lower(*args).compile())
            found.append([topology, cost.kernels, cost.bytes_accessed / least, cost.temp_bytes])
print(json.dumps(found))
"""


def test_the_compiled_kernel_moves_little_more_than_its_operands():
    """ViT-S's MLP on a v5e and (4 blocks) a v6e, 4 and sqrt(n) blocks, forward and backward.

    The kernel itself counts by its own estimate, each operand once, as its block specs have it
    (grid over tokens; factors whole); what XLA adds around it, copies of permuted factors, is XLA's
    count. No copy may be as large as the inputs or outputs.
    """
    found = run_aot(COMPILED)
    assert len(found) == 6
    for topology, kernels, ratio, temp in found:
        assert kernels == 1 and temp == 0, topology
        assert 1 <= ratio < 1.15, topology


def test_on_several_devices_or_another_backend_no_kernel_is_chosen():
    args = jnp.ones((5, 18)), jnp.ones((9, 3, 1, 2)), jnp.ones((3, 4, 9, 1))
    assert "pallas" not in str(jax.make_jaxpr(monarch_product)(*args))
    lowered = jax.jit(monarch_product).trace(*args).lower(lowering_platforms=("cuda",))
    assert "custom_call" not in lowered.as_text()
