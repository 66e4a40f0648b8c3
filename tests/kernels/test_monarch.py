"""Both forms of the Monarch product against the definition, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.monarch import monarch_product


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
    y, pull = jax.vjp(ours, x, first, second)
    np.testing.assert_allclose(y, x @ dense, atol=1e-4)
    expected = jax.vjp(
        lambda x, a, b: x @ jnp.einsum("kjri,jlkr->kilj", a, b).reshape(inputs * width, -1),
        x, first, second,
    )[1](jnp.cos(y))  # fmt: skip
    for a, b in zip(pull(jnp.cos(y)), expected, strict=True):
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
    with pytest.raises(ValueError, match="expected batched or unrolled"):
        monarch_product(jnp.ones(1), jnp.ones((1,) * 4), jnp.ones((1,) * 4), implementation="x")
