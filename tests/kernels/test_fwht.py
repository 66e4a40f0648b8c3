"""Both forms of the Walsh-Hadamard transform against scipy's matrix, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from jaxft.kernels.fwht import fwht, hadamard_matrix

FORMS = {
    "default": {},
    "butterfly": {"implementation": "butterfly"},
    "matmul 4": {"implementation": "matmul", "radix": 4},
    "matmul 16": {"implementation": "matmul", "radix": 16},
    "matmul 128": {"implementation": "matmul", "radix": 128},
}


@pytest.fixture(params=list(FORMS))
def transform(request):
    return jax.jit(functools.partial(fwht, **FORMS[request.param]), static_argnums=1)


def test_worked_example(transform):
    assert transform(jnp.array([1.0, 2, 3, 4])).tolist() == [10, -2, -4, 0]


@pytest.mark.parametrize("n", [1, 2, 8, 512])
def test_is_scipy_s_product(transform, n):
    x = jax.random.normal(jax.random.key(0), (3, n))
    np.testing.assert_allclose(transform(x), x @ hadamard(n), atol=1e-5 * n**0.5)


def test_twice_is_n_times(transform):
    x = jax.random.randint(jax.random.key(0), (64,), -100, 100, jnp.int32)
    np.testing.assert_array_equal(transform(transform(x)), 64 * x)  # integers: exact


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes_and_vmap(transform, axis):
    x = jax.random.normal(jax.random.key(0), (4, 8, 16))
    h = hadamard(x.shape[axis])
    expected = np.moveaxis(np.tensordot(h, x, (1, axis)), 0, axis)
    np.testing.assert_allclose(transform(x, axis), expected, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(transform)(x), x @ hadamard(16), atol=1e-4)


def test_its_adjoint_is_itself(transform):
    x, y = jax.random.normal(jax.random.key(0), (2, 64))
    pull = jax.jit(lambda x, y: jax.vjp(transform, x)[1](y)[0])
    np.testing.assert_allclose(pull(x, y), transform(y), rtol=1e-5, atol=1e-4)


def test_bfloat16_stays():
    assert fwht(jnp.ones(4, jnp.bfloat16)).dtype == jnp.bfloat16


def test_matrix_is_scipy_s():
    np.testing.assert_array_equal(hadamard_matrix(128), hadamard(128))


@pytest.mark.parametrize("length", [3, 12, 0])
def test_lengths_that_are_no_power_of_2(length):
    with pytest.raises(ValueError, match=f"length {length}, not a power of 2"):
        fwht(jnp.ones(length))


def test_bad_options():
    with pytest.raises(ValueError, match="radix must be a power of 2"):
        fwht(jnp.ones(4), radix=6)
    with pytest.raises(ValueError, match="expected matmul or butterfly"):
        fwht(jnp.ones(4), implementation="fft")
