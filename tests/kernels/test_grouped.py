"""Grouped products equal one dense product for each group, in both modes and at second order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.grouped import grouped_matmul, grouped_matmul_reference

ROWS, GROUPS, INPUTS, OUTPUTS = 80, 4, 5, 6
# Blocks have 16 or 8 rows here. Groups without rows, one group for all rows, rows of no group, whole blocks.
SIZES = [(3, 0, 50, 27), (0, 0, 80, 0), (1, 1, 1, 1), (0, 0, 0, 0), (16, 32, 15, 8)]


def arrays():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (ROWS, INPUTS))
    return x, jax.random.normal(keys[1], (GROUPS, INPUTS, OUTPUTS))


@pytest.fixture(scope="module")
def run():
    """(function, x, w, sizes) -> the product and its gradients, compiled once for all sizes."""

    def both(function, x, w, sizes):
        y, pull = jax.vjp(lambda x, w: function(x, w, sizes), x, w)
        return y, pull(jnp.cos(y))

    return jax.jit(both, static_argnums=0)


@pytest.mark.parametrize("sizes", SIZES)
def test_products_and_gradients_equal_dense_dispatch(run, sizes):
    sizes = jnp.array(sizes, jnp.int32)
    ours, wanted = (run(f, *arrays(), sizes) for f in (grouped_matmul, grouped_matmul_reference))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_second_derivatives_in_mixed_modes():
    x, w = arrays()
    sizes = jnp.array(SIZES[0], jnp.int32)

    def twice(function):
        loss = lambda x, w: jnp.sum(jnp.sin(function(x, w, sizes)))
        return jax.jvp(jax.grad(loss, (0, 1)), (x, w), (jnp.cos(x), jnp.sin(w)))[1]

    ours, wanted = (
        jax.jit(lambda f=f: twice(f))() for f in (grouped_matmul, grouped_matmul_reference)
    )
    for one, other in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_program_holds_a_dense_product_for_each_group():
    """XLA:CPU makes jax.lax.ragged_dot a product of all rows with all groups."""
    sizes, (x, w) = jnp.array(SIZES[0], jnp.int32), arrays()
    compiled = jax.jit(grouped_matmul).lower(x, w, sizes).compile()
    assert f"[{GROUPS},{ROWS}," not in compiled.as_text()
