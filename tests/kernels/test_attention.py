import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxft.kernels import attention as module
from jaxft.kernels.attention import attention


def draw(length, heads=4, groups=2, size=8, batch=2):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(batch, length, h, size) for h in (heads, groups, groups)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def slow(query, key, value, visible, scale, softcap=None, sinks=None):
    """One query and head at a time, in numpy."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    repeat = query.shape[2] // key.shape[2]
    for b, t, h in np.ndindex(query.shape[:3]):
        scores = key[b, :, h // repeat] @ query[b, t, h] * scale
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max()) * visible[b, t]
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - scores.max()))
        out[b, t, h] = weights / total @ value[b, :, h // repeat]
    return out


@pytest.mark.parametrize("length", [1, 7, 131])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "blocked", "tiled", "xla"])
def test_every_implementation_equals_a_slow_loop(length, window, segmented, implementation):
    query, key, value = draw(length)
    segments = np.minimum(1 + np.arange(length) // 3, 4)[None].repeat(2, 0)
    ids = jnp.asarray(segments) if segmented else None
    t = np.arange(length)
    visible = np.tile(t[:, None] >= t[None, :], (2, 1, 1))
    if window is not None:
        visible &= t[:, None] - t[None, :] < window
    if segmented:
        visible &= segments[:, :, None] == segments[:, None, :]
    run = jax.jit(
        lambda *x: attention(
            *x, segment_ids=ids, window=window, scale=0.3, implementation=implementation
        )
    )
    expected = slow(query, key, value, visible, 0.3)
    chex.assert_trees_all_close(np.asarray(run(query, key, value)), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocked", "tiled", "gathered"])
def test_softcap_and_sinks(implementation):
    query, key, value = draw(130)
    visible = np.tile(np.tril(np.ones((130, 130), bool)), (2, 1, 1))
    sinks = np.float32([-2.0, 0.0, 1.0, 30.0])
    options = dict(softcap=0.5, sinks=jnp.asarray(sinks), implementation=implementation)
    got = attention(query, key, value, **options)
    expected = slow(query, key, value, visible, 8**-0.5, softcap=0.5, sinks=sinks)
    chex.assert_trees_all_close(np.asarray(got), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["blocked", "tiled"])
def test_gradients_equal_the_reference(form):
    inputs = [*draw(300), jnp.linspace(-1.0, 2.0, 4)]
    ids = jnp.asarray(np.arange(300) // 70 + 1)[None].repeat(2, 0)

    def grads(implementation):
        options = dict(segment_ids=ids, implementation=implementation)
        fun = lambda *x: jnp.sum(jnp.sin(attention(*x[:3], sinks=x[3], **options)))
        return jax.jit(jax.grad(fun, argnums=(0, 1, 2, 3)))(*inputs)

    chex.assert_trees_all_close(grads(form), grads("reference"), atol=1e-5, rtol=1e-5)


def test_a_forward_pass_alone_holds_the_scores_of_a_tile():
    query, key, value = (jax.ShapeDtypeStruct((1, 2048, h, 8), jnp.float32) for h in (4, 2, 2))

    def temporaries(**options):
        run = jax.jit(lambda *x: attention(*x, softcap=3.0, **options))
        return run.lower(query, key, value).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(gradient=False) < 2**20 < 4 * 2048**2 * 4 < temporaries() * 4


def test_tiles_without_a_causal_mask():
    inputs = draw(131)
    for window in (None, 3, jnp.array(3)):
        run = lambda form, w=window: attention(*inputs, causal=False, window=w, implementation=form)
        chex.assert_trees_all_close(run("tiled"), run("reference"), atol=2e-6, rtol=1e-5)


def test_padding_rows_are_finite_and_unseen():
    query, key, value = draw(6)
    ids = jnp.array([[1, 1, 1, 1, 0, 0]] * 2)
    out = attention(query, key, value, segment_ids=ids)
    assert jnp.all(jnp.isfinite(out))
    changed = attention(query, key.at[:, 4:].add(9.0), value.at[:, 4:].add(9.0), segment_ids=ids)
    chex.assert_trees_all_equal(out[:, :4], changed[:, :4])


def test_full_attention_without_a_causal_mask():
    query, key, value = draw(5)
    got = attention(query, key, value, causal=False)
    expected = slow(query, key, value, np.ones((2, 5, 5), bool), 8**-0.5)
    chex.assert_trees_all_close(np.asarray(got), expected, atol=2e-6, rtol=1e-5)


def test_what_an_implementation_lacks_is_an_error():
    query, key, value = draw(3)
    with pytest.raises(ValueError, match="'xla' has no softcap"):
        attention(query, key, value, softcap=1.0, implementation="xla")
    with pytest.raises(ValueError, match="'cudnn' has no sinks; use 'reference'"):
        attention(query, key, value, sinks=jnp.zeros(4), implementation="cudnn")
    with pytest.raises(ValueError, match="'blocked' needs causal=True"):
        attention(query, key, value, causal=False, implementation="blocked")


@pytest.mark.parametrize("window", [None, 5, jnp.array(5)])
def test_each_device_of_a_mesh_masks_its_own_rows_for_cudnn(monkeypatch, window):
    """cuDNN itself is not here; XLA's form stands in for its kernel, in the same shard_map."""
    library = jax.nn.dot_product_attention
    plain = lambda *x, implementation, **more: library(*x, implementation="xla", **more)
    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(4, 16, heads, 8)), jnp.float32)
    inputs = draw(4), draw(2), draw(2)
    segments = jnp.sort(jnp.asarray(rng.integers(0, 4, (4, 16)), jnp.int32), axis=1)
    run = lambda implementation: jax.jit(
        lambda *x: attention(*x, segment_ids=segments, window=window, implementation=implementation)
    )
    seen = np.asarray(segments > 0)
    expected = np.asarray(run("reference")(*inputs))
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        chex.assert_trees_all_close(
            np.asarray(run("cudnn")(*inputs))[seen], expected[seen], atol=1e-5
        )
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)):
        with pytest.raises(ValueError, match="tokens of a row on one device; use 'gathered'"):
            run("cudnn")(*inputs)


@pytest.mark.parametrize(
    "case, picked",
    [
        ({}, "cudnn"),
        ({"gpu": "8.6"}, "cudnn"),
        ({"gpu": "7.5"}, "xla"),  # a T4
        ({"gpu": "gfx942"}, "xla"),  # not CUDA
        ({"gpu": "9.0", "size": 256}, "cudnn"),
        ({"gpu": "12.0", "size": 256}, "cudnn"),
        ({"gpu": "9.0", "size": 264}, "xla"),
        ({"segmented": True}, "cudnn"),
        ({"causal": False}, "cudnn"),
        ({"causal": False, "window": 3}, "xla"),
        ({"length": 7}, "xla"),
        ({"size": 12}, "xla"),
        ({"size": 256}, "xla"),
        ({"softcap": 5.0}, "reference"),
        ({"dtype": jnp.float32}, "reference"),
        ({"sinks": jnp.zeros(4)}, "reference"),
        ({"sinks": jnp.zeros(4), "length": 1024}, "gathered"),
    ],
)
def test_a_gpu_takes_cudnn_for_what_cudnn_takes(monkeypatch, case, picked):
    monkeypatch.setattr(module, "target_platform", lambda: "gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    case = {"gpu": "8.0"} | case
    gpu = types.SimpleNamespace(compute_capability=case["gpu"])
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    case = {
        "length": 8, "size": 64, "dtype": jnp.bfloat16, "segmented": False, "window": None,
        "causal": True, "softcap": None, "sinks": None,
    } | case  # fmt: skip
    query = jnp.zeros((2, case["length"], 4, case["size"]), case["dtype"])
    segments = jnp.ones(query.shape[:2], jnp.int32) if case["segmented"] else None
    options = (case["window"], case["causal"], case["softcap"], case["sinks"])
    assert module._best(query, query[:, :, :2], segments, *options) == picked
    # Several devices and no mesh: the split of a mask is unknown.
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    alone = "xla" if case["segmented"] else picked
    assert module._best(query, query[:, :, :2], segments, *options) == alone
