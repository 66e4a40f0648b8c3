"""Splash attention: interpreted here against the reference, compiled for TPUs that are not here."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from jaxft.kernels.attention import attention
from jaxft.kernels.splash import splash_attention
from jaxft.models import Decoder, tiny_config
from jaxft.parallel import batch_sharding, make_mesh
from tests.aot import run_aot


def draw(length, heads=4, groups=2, size=64, batch=2):
    rng = np.random.default_rng(length)
    shapes = [(batch, length, h, size) for h in (heads, groups, groups)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def packed(length, batch=2):
    """Segments of 50 tokens, and padding at the end."""
    ids = 1 + np.arange(length) // 50
    ids[max(length - 20, 1) :] = 0
    return jnp.asarray(ids, jnp.int32)[None].repeat(batch, 0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(fun, inputs, counted):
    # Padding's own rows mean nothing, so nothing may depend on them.
    out, pull = jax.vjp(fun, *inputs)
    return jnp.where(counted > 0, out, 0.0), pull(jnp.cos(out) * counted)


@pytest.mark.parametrize(
    "length, options, segmented",
    [
        (256, {}, True),
        (256, {"window": 37, "softcap": 2.0, "sinks": True}, True),
        (384, {"window": 129}, True),  # blocks of 128: some lie outside of the window
        (384, {"window": 1000}, False),
        (256, {"causal": False, "window": 37}, True),
        (128, {"causal": False, "softcap": 2.0}, False),
        (1, {}, False),  # this one and the next are padded
        (200, {"causal": False}, True),
    ],
)
def test_values_and_gradients_equal_the_reference(length, options, segmented):
    inputs, sunk = draw(length), "sinks" in options
    inputs = [*inputs, jnp.linspace(-1.0, 2.0, 4)] if sunk else inputs
    ids = packed(length) if segmented else None
    counted = np.ones((2, length, 1, 1), np.float32)
    counted = counted if ids is None else counted * (ids > 0)[:, :, None, None]
    options = options | dict(segment_ids=ids, scale=0.3)

    def form(fun, **more):
        def run(query, key, value, sinks=None):
            return fun(query, key, value, **options | more | dict(sinks=sinks))

        return run

    ours = form(splash_attention, interpret=True)
    reference = form(attention, implementation="reference")
    found, gradients = value_and_gradients(ours, inputs, counted)
    expected, wanted = value_and_gradients(reference, inputs, counted)
    forward = jax.jit(ours)(*inputs)  # keeps nothing for a gradient
    for values in (found, np.where(counted > 0, forward, 0.0)):
        chex.assert_trees_all_close(values, expected, atol=2e-5, rtol=2e-5)
    chex.assert_trees_all_close(gradients, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "sizes, length, window",
    [
        (dict(data=2, fsdp=2, tensor=2), 128, None),
        (dict(fsdp=8), 128, None),  # does not divide the rows
        (dict(tensor=4, context=2), 200, None),  # does not divide the key heads; is padded
        (dict(fsdp=2, context=4), 512, 150),  # into the tile of the device before
    ],
)
def test_on_a_mesh_each_device_takes_its_rows_heads_and_queries(sizes, length, window):
    mesh = make_mesh(**sizes)
    inputs, ids = draw(length, batch=4, size=16), packed(length, batch=4)

    def run(*x, ids, fun):
        out, pull = jax.vjp(lambda *x: fun(*x, segment_ids=ids, scale=0.25), *x)
        return out, pull(jnp.cos(out) * (ids > 0)[:, :, None, None])

    ours = functools.partial(
        run,
        fun=functools.partial(
            splash_attention, window=window, sinks=jnp.linspace(-1.0, 2.0, 4), interpret=True
        ),
    )
    whole = jax.jit(ours)(*inputs, ids=ids)
    placed = lambda x: jax.device_put(x, batch_sharding(mesh)) if sizes.get("fsdp") == 2 else x
    with jax.set_mesh(mesh):
        sharded = jax.jit(ours)(*map(placed, inputs), ids=placed(ids))
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
    chex.assert_trees_all_close(to_numpy(sharded), to_numpy(whole), atol=1e-5, rtol=1e-5)


def test_on_a_mesh_of_which_an_axis_is_mapped_already():
    mesh, spec = make_mesh(data=2, fsdp=4), PartitionSpec("data")
    inputs, ours = draw(128, batch=8, size=16), functools.partial(splash_attention, scale=0.25)
    ours = functools.partial(ours, interpret=True)
    run = jax.shard_map(ours, in_specs=spec, out_specs=spec, axis_names={"data"}, check_vma=False)
    with jax.set_mesh(mesh):
        mapped = jax.jit(run)(*inputs)
    chex.assert_trees_all_close(np.asarray(mapped), np.asarray(ours(*inputs)), atol=1e-5, rtol=1e-5)


def picked(platform, devices=1, *, mesh=True, length=256, dtype=jnp.bfloat16, **options):
    """The functions that `attention` calls when traced for a platform."""
    device = AbstractDevice(device_kind="a chip", num_cores=1, platform=platform)
    axes = AbstractMesh((devices,), ("fsdp",), (AxisType.Auto,), abstract_device=device)
    inputs = [jax.ShapeDtypeStruct((8, length, 2, 64), dtype)] * 3

    def run(*x):  # a new function each time: traces are cached
        with jax.sharding.use_abstract_mesh(axes):
            return attention(*x, **options)

    return str(jax.make_jaxpr(run)(*inputs))


def test_none_picks_splash_where_it_can_run_on_a_tpu():
    assert "pallas_call" in picked("tpu")
    assert "pallas_call" in picked("tpu", window=5, softcap=2.0)
    assert "shard_map" not in picked("tpu") and "shard_map" in picked("tpu", 8)
    for other in (picked("tpu", length=100), picked("tpu", window=jnp.array(3)), picked("cpu")):
        assert "pallas_call" not in other


def test_none_picks_what_compiles_for_a_gpu_that_is_not_here():
    # XLA's fused softmax is marked; cuDNN's call needs the GPU itself.
    assert "cudnn" not in picked("gpu") and picked("gpu") != picked("cpu")


def test_misfits_are_errors():
    query, key, value = draw(128, size=8)
    with pytest.raises(ValueError, match="window known while tracing"):
        attention(query, key, value, implementation="splash", window=jnp.array(3))
    with pytest.raises(ValueError, match="unknown implementation 'flash'; expected one of refe"):
        attention(query, key, value, implementation="flash")


@pytest.mark.parametrize("windows, scan", [((4, None), False), ((4, 4), True), ((4, 4), False)])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_decoder_knows_its_windows_while_tracing(windows, scan, remat):
    config = dataclasses.replace(tiny_config(), windows=windows)
    model = Decoder(config, scan_layers=scan, remat=remat)
    tokens = jnp.arange(128)[None]
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    ours = Decoder(config, scan_layers=scan, remat=remat, attention="splash")
    text = str(jax.make_jaxpr(lambda p: ours.apply(p, tokens).logits)(params))
    assert "pallas_call" in text


CODE = """
import json, jax, jax.numpy as jnp
from jaxft.kernels.attention import attention
from jaxft.models import Decoder, DecoderConfig
from jaxft.parallel import (
    batch_sharding, compile_only_devices, compiled_cost, make_mesh, mesh_context, replicated)

mesh = make_mesh(fsdp=-1, devices=compile_only_devices({topology!r}))
on = lambda sharding, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
query, key = (
    on(batch_sharding(mesh), jnp.zeros((4, 4096, heads, {size}), jnp.bfloat16)) for heads in (4, 2))
ids = on(batch_sharding(mesh), jnp.zeros((4, 4096), jnp.int32))
costs = []
for name in {names!r}:
    loss = lambda q, k, v, i: jnp.sum(
        attention(q, k, v, segment_ids=i, window=200, softcap=50.0, implementation=name) ** 2)
    with mesh_context(mesh if name is None else None):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, ids)
    costs.append(compiled_cost(lowered.compile())._asdict())

config = DecoderConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim={size})
model = Decoder(config, dtype=jnp.bfloat16, attention={names!r}[0])
params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
apply = jax.jit(lambda p, t: model.apply({{"params": p}}, t, None, t).hidden)
params = jax.tree.map(lambda x: on(replicated(mesh), x), params)
with mesh_context(mesh if model.attention is None else None):
    decoder = apply.lower(params, ids).as_text()
print(json.dumps([costs, decoder.count("tpu_custom_call")]))
"""


@pytest.mark.parametrize(
    "topology, size, names",
    [("v5e:1x1", 64, ("splash", "reference")), ("v6e:1x1", 128, (None,)), ("v5e:2x2", 64, (None,))],
)
def test_attention_compiles_for_tpus_as_kernels_and_without_scores(topology, size, names):
    (ours, *reference), in_decoder = run_aot(CODE.format(topology=topology, size=size, names=names))
    assert ours["kernels"] == 3  # forward; dq; dk and dv
    rows = 1 if topology == "v5e:2x2" else 4  # on each device
    # Of one batch's scores in float32; what is small stays out of the count, in the chip's own memory.
    assert ours["temp_bytes"] < rows * 4 * 4096 * 4096 * 4 / 10
    if reference:
        assert reference[0]["kernels"] == 0
        assert ours["temp_bytes"] < reference[0]["temp_bytes"] / 10
    assert not ours["collectives"]  # rows stay on their devices
    assert in_decoder  # a whole model lowers; that takes the compiler longer than these tests may


CONTEXT = """
import json, jax, jax.numpy as jnp
from jaxft.kernels.attention import attention
from jaxft.parallel import compile_only_devices, compiled_cost, make_mesh, token_sharding

mesh = make_mesh(fsdp=4, context=4, devices=compile_only_devices("v5e:4x4"))
on = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=token_sharding(mesh))
query, key = (on(jnp.bfloat16, 4, 8192, heads, 64) for heads in (4, 2))
loss = lambda q, k, v, i: jnp.sum(
    attention(q, k, v, segment_ids=i, window=2000, softcap=50.0).astype(jnp.float32) ** 2)
with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, key, on(jnp.int32, 4, 8192))
print(json.dumps(compiled_cost(lowered.compile())._asdict()))
"""


def test_on_a_slice_with_context_keys_are_gathered_and_their_gradients_scattered():
    cost, keys = run_aot(CONTEXT), 2 * 8192 * 2 * 64 * 2  # of one row, in bfloat16
    assert cost["kernels"] == 3 and cost["temp_bytes"] < 4 * 2048 * 8192 * 4 / 10
    gathered, scattered = (cost["exchanged"].pop(f) for f in ("all-gather", "reduce-scatter"))
    assert gathered[1] == keys + 4 * 8192 and scattered[1] == keys / 4
    assert not cost["exchanged"]


GPU = """
import json, jax, jax.numpy as jnp
from jaxft.kernels.attention import attention
from jaxft.parallel import batch_sharding, compile_only_devices, compiled_cost, make_mesh

mesh = make_mesh(fsdp=-1, devices=compile_only_devices("h100:1"))
x = jax.ShapeDtypeStruct((4, 1024, 8, 64), jnp.bfloat16, sharding=batch_sharding(mesh))
with jax.set_mesh(mesh):
    compiled = jax.jit(attention).lower(x, x, x).compile()
print(json.dumps(compiled_cost(compiled)._asdict()))
"""


def test_causal_attention_compiles_for_an_h100():
    assert run_aot(GPU)["argument_bytes"] == 3 * 4 * 1024 * 8 * 64 * 2
