"""The tokens of a row over the devices of the axis "context"."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxft.kernels import attention as kernels
from jaxft.kernels.attention import attention
from jaxft.losses import linear_entropy, linear_log_probs
from jaxft.parallel import make_mesh, mesh_context
from jaxft.train.batches import place_batch
from tests.parallel.training import packed_batch

LENGTH = 24


def draw(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def on(mesh, fun, *arguments):
    with mesh_context(mesh):
        return jax.device_get(jax.jit(fun)(*arguments))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 7, "softcap": 2.0, "sinks": True},
        {"window": jnp.array(5)},  # as layers have that are scanned over
        {"causal": False, "window": 4},
    ],
    ids=["causal", "window and cap", "traced window", "both ways"],
)
@pytest.mark.parametrize("sizes", [dict(context=8), dict(data=2, tensor=2, context=2)])
def test_attention_and_its_gradients_equal_the_reference(sizes, options, monkeypatch):
    monkeypatch.setattr(kernels, "QUERIES", 2)  # several blocks on a device
    ids = jnp.asarray(packed_batch(rows=2, length=LENGTH)["segment_ids"])
    inputs = draw((2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 8))
    options, sunk = {k: v for k, v in options.items() if k != "sinks"}, "sinks" in options
    inputs += [jnp.linspace(-1.0, 2.0, 4)] if sunk else []
    for segment_ids in (None, ids):
        counted = jnp.ones(ids.shape) if segment_ids is None else (ids > 0) * 1.0

        def run(*x, options, ids=segment_ids, counted=counted, **more):
            def form(query, key, value, sinks=None):
                masks = dict(segment_ids=ids, sinks=sinks)
                return attention(query, key, value, **masks, **options, **more)

            out, pull = jax.vjp(form, *x)
            return out, pull(jnp.sin(out) * counted[:, :, None, None])

        found = on(make_mesh(**sizes), functools.partial(run, options=options), *inputs)
        wanted = run(*inputs, options=options, implementation="reference")
        chex.assert_trees_all_close(found, jax.device_get(wanted), atol=1e-5)


def test_attention_is_the_gathered_form_where_a_mesh_splits_the_tokens():
    def traced(length, mesh):
        with mesh_context(mesh):
            return str(jax.make_jaxpr(lambda *x: attention(*x))(*draw(*[(2, length, 2, 8)] * 3)))

    assert "all_gather" in traced(LENGTH, make_mesh(fsdp=2, context=4))
    assert "all_gather" not in traced(
        LENGTH - 1, make_mesh(fsdp=2, context=4)
    )  # it cannot be split
    assert "all_gather" not in traced(LENGTH, make_mesh(fsdp=8))


@pytest.mark.parametrize("transposed", [False, True])
def test_losses_equal_one_device(transposed):
    hidden, head = draw((2, LENGTH, 16), (40, 16) if transposed else (16, 40))
    targets = jnp.asarray(packed_batch(rows=2, length=LENGTH)["tokens"]) % 40

    def run(hidden, head, weight):
        from jaxft.weights import Transposed

        head = Transposed(head) if transposed else head
        log_probs = linear_log_probs(hidden, head, targets, temperature=0.7, softcap=3.0, chunk=2)
        return jnp.sum(jnp.sin(log_probs) + linear_entropy(hidden, head, chunk=2) * weight)

    grad = jax.value_and_grad(run, argnums=(0, 1))
    sizes = dict(fsdp=2, context=4)
    found = on(make_mesh(**sizes), grad, hidden, head, jnp.float32(0.3))
    chex.assert_trees_all_close(found, on(None, grad, hidden, head, 0.3), rtol=1e-5, atol=1e-5)


def test_tokens_are_laid_over_the_axis_and_other_leaves_are_not():
    mesh = make_mesh(data=2, context=4)
    tokens = np.zeros((2, 3, LENGTH), np.int32)  # of groups
    batch = {"tokens": tokens, "positions": tokens[:, 0], "advantages": np.zeros((2, LENGTH))}
    placed = place_batch(batch, mesh)
    rows, specs = (
        ("data", "fsdp", "expert"),
        {name: leaf.sharding.spec for name, leaf in placed.items()},
    )
    assert specs == {
        "tokens": PartitionSpec(rows, None, "context"),
        "positions": PartitionSpec(rows, "context"),
        "advantages": PartitionSpec(rows),
    }
    with pytest.raises(ValueError, match=r"rows of 22 in 'tokens' .* context = 4 .* --context"):
        place_batch({"tokens": tokens[:, 0, :22]}, mesh)
