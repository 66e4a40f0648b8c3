import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxft import losses
from jaxft.adapters import ALL_LINEAR, adapt, combine, lora, partition
from jaxft.models import Decoder, stack_layers, tiny_config
from jaxft.objectives import supervised
from jaxft.parallel import (
    AXES,
    batch_sharding,
    make_mesh,
    mesh_context,
    param_shardings,
    shard_params,
)
from jaxft.parallel.compiled import exchanged_bytes
from jaxft.train import evaluate, fit, make_eval_step
from jaxft.weights import LoraWeight
from tests.small_models import start


def test_make_mesh_fills_and_is_auto():
    mesh = make_mesh(data=2, fsdp=-1)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == dict(data=2, fsdp=4, tensor=1, expert=1, context=1)
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_what_would_leave_devices_idle_or_has_no_slices_is_an_error():
    with pytest.raises(ValueError, match="slices=2, but the 8 devices are those of 1 process"):
        make_mesh(data=8, slices=2)


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=-1, fsdp=-1), dict(tensor=0), {}])
def test_sizes_that_do_not_fit_are_errors(sizes):
    with pytest.raises(ValueError, match="make_mesh: "):
        make_mesh(**sizes)


def test_weights_lay_out_their_own_fields():
    model = Decoder(tiny_config(vocab_size=64))
    params = start(model)
    mesh = make_mesh(fsdp=4, tensor=2)
    for tree in (params, stack_layers(params)):
        shardings = param_shardings(adapt(jax.random.key(1), tree, {ALL_LINEAR: lora(4)}), mesh)
        layers = shardings["layers"].get("0", shardings["layers"])
        stack = () if "0" in shardings["layers"] else (None,)
        up, down = layers["mlp"]["up"]["kernel"], layers["mlp"]["down"]["kernel"]
        assert up.base.spec == PartitionSpec(*stack, "fsdp", "tensor")
        assert up.a.spec == PartitionSpec(*stack, "fsdp", None)
        assert up.b.spec == PartitionSpec(*stack, None, "tensor")
        assert down.a.spec == PartitionSpec(*stack, "tensor", None)
        assert down.b.spec == PartitionSpec(*stack, None, "fsdp")


@pytest.mark.parametrize(
    "sizes, stacked, full",
    [
        (dict(data=4, fsdp=2), True, False),
        (dict(fsdp=4, tensor=2), False, False),
        (dict(data=8), False, True),
    ],
)
def test_loss_and_gradients_equal_one_device(sizes, stacked, full):
    """With the mesh in context, as in a step: rows are kept apart, and the head is gathered once."""
    model = Decoder(tiny_config(vocab_size=64))
    params = start(model)
    params = stack_layers(params) if stacked else params
    params = params if full else adapt(jax.random.key(1), params, {ALL_LINEAR: lora(4)})
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 64, (8, 20)),
        "loss_mask": (rng.random((8, 20)) < 0.5).astype(np.float32),
        "segment_ids": np.tile(np.arange(20) // 7 + 1, (8, 1)),
    }
    objective = supervised(model.forward, chunk=4)

    def run(params, batch):
        trainable, frozen = partition(params)
        fun = lambda t, f, b: objective(combine(t, f), b, None)[0]
        return jax.jit(jax.value_and_grad(fun))(trainable, frozen, batch)

    mesh = make_mesh(**sizes)
    with mesh_context(mesh):
        sharded = run(shard_params(params, mesh), jax.device_put(batch, batch_sharding(mesh)))
    to_numpy = lambda tree: jax.tree.map(np.asarray, tree)
    chex.assert_trees_all_close(
        to_numpy(sharded), to_numpy(run(params, batch)), rtol=2e-5, atol=1e-6
    )


def test_a_step_and_an_evaluation_have_their_mesh_in_context():
    mesh, seen = make_mesh(fsdp=8), []

    def objective(params, batch, key):  # kernels shard themselves over the mesh that is in context
        seen.append(jax.sharding.get_abstract_mesh())
        return jnp.mean(batch) * params, {}

    run = dict(batches=[jnp.ones((8, 2))], steps=1)
    fit(jnp.ones(()), objective, optax.sgd(0.1), mesh=mesh, **run)
    evaluate(make_eval_step(objective), jnp.ones(()), run["batches"], mesh=mesh)
    assert seen and set(seen) == {mesh.abstract_mesh}
    seen.clear()
    fit(jnp.ones(()), objective, optax.sgd(0.1), **run)
    assert all(mesh.empty for mesh in seen)


HEAD_READERS = {
    "cross-entropy": lambda h, w, t: losses.linear_cross_entropy(
        h, w, t, jnp.ones(t.shape), chunk=4
    ),
    "log-probs": lambda h, w, t: losses.linear_log_probs(h, w, t, chunk=4),
    "log-probs of an adapted head": lambda h, w, t: losses.linear_log_probs(
        h, LoraWeight(w, jnp.ones((16, 2)), jnp.ones((2, 64)), 2.0), t, chunk=4
    ),
    "entropy": lambda h, w, t: losses.linear_entropy(h, w, chunk=4),
    "likeliest tokens": lambda h, w, t: losses.linear_top_log_probs(h, w, 3, chunk=4)[1],
}


@pytest.mark.parametrize("name", HEAD_READERS)
def test_a_head_is_gathered_once_for_all_chunks(name):
    """And values and gradients are those of one device. XLA by itself gathers it for each of 8 chunks."""
    mesh, rng = make_mesh(data=2, fsdp=4), np.random.default_rng(0)
    args = (
        rng.normal(size=(8, 32, 16)).astype(np.float32),
        rng.normal(size=(16, 64)).astype(np.float32),
        rng.integers(0, 64, (8, 32)),
    )
    total = lambda *args: jnp.sum(jnp.tanh(HEAD_READERS[name](*args)))
    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    expected = run(*args)
    specs = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp"), PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(mesh):
        split = [
            jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)
        ]
        compiled = run.lower(*split).compile()
        chex.assert_trees_all_close(compiled(*split), expected, rtol=2e-5, atol=2e-5)
    _, gathered = exchanged_bytes(compiled.as_text())["all-gather"]
    # The gradient may be gathered too.
    assert gathered <= 2 * args[1].nbytes
