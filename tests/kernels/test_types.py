"""The shapes in signatures are checked at every call in tests: see addopts in pyproject.toml."""

import jax.numpy as jnp
import jaxtyping
import pytest

from jaxft.kernels.attention import attention
from jaxft.kernels.monarch import monarch_product
from jaxft.losses import cross_entropy


def test_wrong_shapes_are_caught():
    x, ids = jnp.ones((2, 8, 4, 16)), jnp.ones((8,), jnp.int32)
    with pytest.raises(jaxtyping.TypeCheckError, match="value"):
        attention(x, x, x[:, :4])
    with pytest.raises(jaxtyping.TypeCheckError, match="segment_ids"):
        attention(x, x, x, segment_ids=ids)
    with pytest.raises(jaxtyping.TypeCheckError, match="second"):
        monarch_product(jnp.ones(4), jnp.ones((2, 2, 1, 2)), jnp.ones((3, 2, 2, 1)))
    with pytest.raises(jaxtyping.TypeCheckError, match="targets"):
        cross_entropy(jnp.ones((2, 3, 5)), jnp.ones((2, 1), jnp.int32))


def test_wrong_types_are_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="targets"):
        cross_entropy(jnp.ones((2, 5)), jnp.ones((2,)))
