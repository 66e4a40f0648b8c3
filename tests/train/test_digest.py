import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.parallel import make_mesh
from jaxft.train.digest import all_finite, checksum, digests

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "int32",
    "uint8",
    "int4",
    "bool",
    "complex64",
    "float8_e4m3fn",
]


def array(dtype, shape=(4, 6)):
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)


def reference(words):
    """MurmurHash3's finalizer of each word, in Python's integers."""
    total = 0
    for place, word in enumerate(words):
        h = int(word) ^ (place * 0x9E3779B9 + 1) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        total += h ^ h >> 16
    return total % 2**32


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 1, 3), (0,)])
def test_it_is_the_plain_loop(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert int(checksum(x)) == reference(x.reshape(-1).view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_changes_and_swaps_are_seen(dtype):
    x = array(dtype)
    flipped = x.at[2, 3].set(1 - x[2, 3] if dtype != "bool" else ~x[2, 3])
    assert len({int(checksum(y)) for y in (x, flipped, x[::-1], x[:, ::-1])}) == 4
    assert int(checksum(x)) == int(checksum(jnp.array(x)))


def test_it_does_not_depend_on_the_sharding():
    x, mesh = array("float32", (8, 6)), make_mesh(data=4, fsdp=2)
    for spec in (jax.P(("data", "fsdp")), jax.P("data", "fsdp"), jax.P(None, "fsdp"), jax.P()):
        assert int(checksum(jax.device_put(x, jax.NamedSharding(mesh, spec)))) == int(checksum(x))


def test_digests_name_leaves_and_describe_keys():
    tree = {"a": {"b": jnp.zeros((2, 3), jnp.bfloat16)}, "none": None, "key": jax.random.key(1)}
    result = digests(tree)
    assert result["a/b"][:2] == [[2, 3], "bfloat16"] and set(result) == {"a/b", "key"}
    assert result["key"] != digests({"key": jax.random.key(2)})["key"]


def test_all_finite():
    tree = {"a": jnp.ones(3), "b": jnp.array([1.0, 2.0])}
    assert all_finite(tree)
    assert not all_finite({**tree, "b": jnp.array([1.0, jnp.nan])})
    assert not all_finite({**tree, "a": jnp.array([-jnp.inf])})
