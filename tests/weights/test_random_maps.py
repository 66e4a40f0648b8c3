"""Fastfood maps against their definition in plain matrices, and their statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.linalg import hadamard

from jaxft.weights import cropped_fastfood, dense_projection, fastfood
from jaxft.weights.random_maps import _permutation

KEY = jax.random.key(0)
SIZES = [(1, 1), (5, 3), (10, 48), (9, 2)]


def matrix(m, d):
    """P [D, d], column by column."""
    return jax.jit(lambda m: jax.vmap(m, out_axes=1)(jnp.eye(d)))(m)


@pytest.mark.parametrize("d, D", SIZES)
def test_is_the_definition(d, D):
    """divide(H G Pi H B pad(theta)) with each factor as a dense matrix."""
    m = fastfood(KEY, d, D)
    chunks, length = m.signs.shape
    assert length // 2 < D <= length and (chunks - 1) * length < d <= chunks * length
    h, g = hadamard(length), np.diag(np.float64(m.gains))
    pi = np.eye(length)[m.permutation]
    assert (pi.sum(0) == 1).all() and (np.abs(m.signs) == 1).all()
    fold = np.concatenate([np.diag(np.float64(row)) for row in m.signs], axis=1)[:, :d]
    expected = (h @ g @ pi @ h @ fold)[:D] / np.sqrt(D * np.sum(np.float64(m.gains) ** 2))
    np.testing.assert_allclose(matrix(m, d), expected, atol=2e-5)


@pytest.mark.parametrize("make", [fastfood, dense_projection])
def test_columns_are_nearly_orthonormal(make):
    gram = np.array(matrix(make(KEY, 64, 3000), 64)).T
    gram = gram @ gram.T
    squares, rest = np.diag(gram), gram - np.diag(np.diag(gram))
    # Squared norms vary by sqrt(2 / D) = .026 at most; products by 1 / sqrt(D) = .018; 2016 of them.
    assert abs(squares.mean() - 1) < 0.02 and 0.005 < squares.std() < 0.04
    assert 0.03 < np.abs(rest).max() < 0.018 * 6 and abs(rest.mean()) < 0.01
    theta = jax.random.normal(jax.random.key(1), (50, 64))
    ratio = jnp.linalg.norm(theta @ matrix(make(KEY, 64, 3000), 64).T, axis=1)
    np.testing.assert_allclose(ratio, jnp.linalg.norm(theta, axis=1), rtol=0.15)


@pytest.mark.parametrize("d, D", SIZES)
@pytest.mark.parametrize("make", [fastfood, cropped_fastfood, dense_projection])
def test_adjoint_linearity_vmap(make, d, D):
    m = make(KEY, d, D)
    a, c = jax.random.normal(jax.random.key(1), (2, d))
    b = jax.random.normal(jax.random.key(2), (D,))

    @jax.jit
    def run(m, a, b, c):
        image, pull = jax.vjp(m, a)
        pairs = jax.vmap(m)(jnp.stack([c, 2 * a - c]))
        return image, pull(b)[0], jax.linear_transpose(m, a)(b)[0], pairs, m(c)

    image, pulled, transposed, (other, sums), alone = run(m, a, b, c)
    assert image.shape == (D,) and image.dtype == jnp.float32
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    np.testing.assert_allclose(np.dot(image, b), np.dot(pulled, a), rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(transposed, pulled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums, 2 * image - other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other, alone, rtol=1e-4, atol=1e-5)


def test_overflow():
    theta = jnp.arange(1.0, 12)
    folded, cropped = fastfood(KEY, 11, 3), cropped_fastfood(KEY, 11, 3)
    np.testing.assert_allclose(cropped(theta), cropped(theta.at[4:].set(0)))
    np.testing.assert_allclose(cropped(theta), fastfood(KEY, 4, 3)(theta[:4]), rtol=1e-6)
    assert (jnp.abs(jax.grad(lambda t: jnp.sum(folded(t) ** 2))(theta)) > 0).all()
    # Chunks add up, each under separate signs.
    signed = jnp.pad(theta, (0, 1)).reshape(3, 4) * folded.signs * folded.signs[:1]
    np.testing.assert_allclose(folded(theta), cropped(jnp.sum(signed, 0)), rtol=1e-5)
    assert len({tuple(row) for row in np.array(fastfood(KEY, 64, 8).signs)}) > 1


@pytest.mark.parametrize("D", [2, 100])
def test_a_smaller_d_is_a_part_of_a_larger(D):
    theta = jax.random.normal(KEY, (7,))
    padded = jnp.pad(theta, (0, 20))
    np.testing.assert_allclose(
        fastfood(KEY, 7, D)(theta), fastfood(KEY, 27, D)(padded), rtol=1e-5, atol=1e-6
    )


def test_keys():
    theta = jnp.ones(4)
    image = lambda key: jax.jit(lambda k: fastfood(k, 4, 50)(theta))(key)
    np.testing.assert_array_equal(image(KEY), image(jax.random.key(0)))
    assert jnp.linalg.norm(image(KEY) - image(jax.random.key(1))) > 1


@pytest.mark.parametrize("length", [1, 2, 4, 8, 1024, 2**17])
def test_permutations(length):
    assert (np.sort(_permutation(KEY, length)) == np.arange(length)).all()


def test_permutations_are_even():
    """Over keys, each number goes to each place equally often; and neighbours part."""
    many = np.array(jax.vmap(lambda k: _permutation(k, 16))(jax.random.split(KEY, 4000)))
    counts = np.stack([np.bincount(column, minlength=16) for column in many.T])
    # Rows and columns of counts both have fixed sums: 15/16 of the statistic has 15² degrees.
    assert stats.chi2.sf(15 / 16 * np.sum((counts - 250) ** 2 / 250), 15 * 15) > 1e-4
    # Correlation of place and number of one long permutation: 1 / sqrt(L) = .001 for random ones.
    one = np.array(_permutation(KEY, 2**20))
    assert abs(np.corrcoef(one, np.arange(2**20))[0, 1]) < 0.005
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.005


def test_no_random_part_becomes_a_constant():
    """The trap: B, Pi, G as constants of a program are folded, for minutes at L = 4096."""
    text = jax.jit(lambda k, t: fastfood(k, 8, 4096)(t)).lower(KEY, jnp.ones(8)).as_text()
    assert "dense_resource" not in text and len(text) < 200_000


@pytest.mark.parametrize("make", [fastfood, cropped_fastfood, dense_projection])
@pytest.mark.parametrize("d, D", [(0, 3), (3, 0), (-1, 3)])
def test_bad_sizes(make, d, D):
    with pytest.raises(ValueError, match=f"needs d >= 1 and D >= 1, got d = {d}"):
        make(KEY, d, D)


def test_bad_overflow():
    with pytest.raises(ValueError, match="expected fold or crop"):
        fastfood(KEY, 2, 2, overflow="wrap")
