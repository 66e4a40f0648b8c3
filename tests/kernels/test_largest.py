"""Tests of the search for the largest entries, which never sorts a whole vocabulary."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxft.generation import SamplingConfig
from jaxft.generation.beam import _choose, _Search, _Settings
from jaxft.generation.decoding import transform_logits
from jaxft.kernels.largest import largest
from jaxft.parallel import make_mesh

V = 4096


def choose(logits):
    """A step of beam search: 2 prompts of 4 beams."""
    blank, none = jnp.zeros((2, 4, 8), jnp.int32), jnp.zeros((2, 4))
    number = jnp.zeros((), jnp.int32)
    search = _Search(
        None, logits, number, None, number, blank, none, blank, blank[..., 0], none, none[:, 0] == 0
    )
    settings = _Settings(number + 8, number, none[0, 0], number == 1, number == 1, number)
    return _choose(search, settings, SamplingConfig(1, temperature=0.0, stop_ids=(2,)))


@pytest.mark.parametrize(
    "made",
    [choose, functools.partial(transform_logits, config=SamplingConfig(1, top_k=50))],
    ids=["beams", "top_k"],
)
def test_the_vocabulary_is_not_sorted(made):
    text = jax.jit(made).lower(jnp.zeros((8, V))).compile().as_text()
    sorts = re.findall(r"= \(?\w+\[\d+,(\d+)\][^=]*? sort\(", text)
    assert "TopK" in text and all(int(size) < V for size in sorts), sorts


def test_equal_entries_come_in_their_order():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 40)), jnp.float32)
    values, indices = largest(x, 7)
    order = np.argsort(-np.asarray(x), axis=-1, kind="stable")[:, :7]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(values, np.take_along_axis(np.asarray(x), order, axis=-1))


@pytest.mark.parametrize("rows, columns", [("data", None), (None, "data")], ids=["rows", "columns"])
def test_entries_over_devices_are_those_of_one(rows, columns):
    """XLA ended the process when the partition of a top_k met a barrier of both its results."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
    sharding = jax.sharding.NamedSharding(make_mesh(data=8), PartitionSpec(rows, columns))
    for function in (
        lambda x: largest(x, 5),
        lambda x: jax.lax.map(lambda x: largest(x, 5), x[None]),
    ):
        wanted, found = function(x), jax.jit(function)(jax.device_put(x, sharding))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.75, 0.999])
def test_top_p_keeps_the_last_of_equal_tokens(top_p):
    """Compares with a stable sort of the tokens by their logits, which is transformers' rule."""
    logits = np.random.default_rng(1).integers(0, 4, (64, 24)).astype(np.float32)
    order = np.argsort(logits, axis=-1, kind="stable")
    ascending = np.take_along_axis(logits, order, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    keep = np.array(mass > 1 - top_p)
    keep[:, -1] = True
    expected = np.take_along_axis(keep, np.argsort(order, axis=-1), axis=-1)
    found = transform_logits(jnp.asarray(logits), SamplingConfig(1, top_p=top_p))
    np.testing.assert_array_equal(np.isfinite(found), expected)
