"""Mixtures of experts: routing, its corner cases, and layouts over a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import (
    ALL_LINEAR,
    PFEIFFER,
    adapt,
    bottleneck,
    combine,
    count,
    lora,
    partition,
)
from jaxft.models import Decoder, DecoderConfig, Experts, stack_layers
from jaxft.models.experts import mix, route
from jaxft.objectives import RouterTerms, supervised
from jaxft.parallel import make_mesh, param_shardings, shard_params, stacked_axes

EXPERTS = Experts(count=4, per_token=2, width=12, shared_width=8)
CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=8, max_length=32, experts=EXPERTS, tie_embeddings=False,
)  # fmt: skip
# Every token to one pair, ties everywhere, and any routing.
LOGITS = {
    "one pair": lambda logits: logits.at[..., 1].set(50.0).at[..., 3].set(40.0),
    "ties": lambda logits: jnp.zeros_like(logits),
    "any": lambda logits: logits,
}


@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("normalised", [True, False])
def test_a_mixture_is_the_gated_sum_over_its_experts(case, normalised):
    keys = jax.random.split(jax.random.key(0), 4)
    x, logits = jax.random.normal(keys[0], (2, 7, 5)), jax.random.normal(keys[1], (2, 7, 4))
    up, down = (jax.random.normal(keys[2], (4, 5, 6)), jax.random.normal(keys[3], (4, 3, 5)))
    logits = LOGITS[case](logits)
    gates, chosen = route(logits, 2, normalised)
    if case == "ties":  # the smaller number first
        assert (np.asarray(chosen) == [0, 1]).all()
    probabilities = jax.nn.softmax(logits)
    largest = jnp.sort(probabilities)[..., -2:]
    share = jnp.sum(largest, -1, keepdims=True) if normalised else 1.0
    np.testing.assert_allclose(gates, largest[..., ::-1] / share, rtol=1e-6)
    wanted = np.zeros(x.shape, np.float32)
    for index in np.ndindex(2, 7):
        for gate, e in zip(gates[index], chosen[index], strict=True):
            gated, linear = jnp.split(x[index] @ up[e], 2)
            wanted[index] += gate * ((jax.nn.silu(gated) * linear) @ down[e])
    found = mix(x, chosen, gates, up, down, lambda gate, up: jax.nn.silu(gate) * up)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def task():
    """(adapted params, batch, one device's loss, metrics and gradients)."""
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: 5 * leaf, params)
    params = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(2)})
    noise = jax.random.key(2)
    trained, frozen = partition(params)
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(noise, leaf.shape), trained)
    tokens = jax.random.randint(jax.random.key(3), (8, 8), 0, 32)
    # Rows differ in length.
    segments = (jnp.arange(8)[None] < jnp.arange(1, 9)[:, None]).astype(jnp.int32)
    batch = {"tokens": tokens, "segment_ids": segments}
    return combine(trained, frozen), batch, gradients(combine(trained, frozen), batch)


def gradients(params, batch):
    objective = supervised(Decoder(CONFIG).forward, router=RouterTerms(0.5, 0.25))

    def of_trained(trained, batch, key):
        return objective(combine(trained, frozen), batch, key)

    trained, frozen = partition(params)
    (loss, metrics), found = jax.jit(jax.value_and_grad(of_trained, has_aux=True))(
        trained, batch, None
    )
    return loss, {k: m.value for k, m in metrics.items()}, found


def same(found, wanted):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, expert=2, tensor=2)], ids=str)
def test_a_mesh_computes_what_one_device_does(task, sizes):
    params, batch, wanted = task
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        same(gradients(shard_params(params, mesh), batch), wanted)


def test_kernels_of_experts_have_an_axis_of_experts_and_all_linear_adapts_them(task):
    params, _, _ = task
    assert stacked_axes("layers/0/mlp/experts/down/kernel") == 1
    assert stacked_axes("layers/mlp/experts/down/kernel") == 2
    layer = params["layers"]["0"]["mlp"]
    assert layer["experts"]["gate_up"]["kernel"].a.shape == (4, 16, 2)
    assert not jax.tree.leaves(partition(layer["router"])[0])
    per_expert = 2 * (16 + 24) + 2 * (12 + 16)
    assert count(layer["experts"])[0] == 4 * per_expert
    added = adapt(jax.random.key(0), params, {PFEIFFER: bottleneck(3)})
    assert added["layers"]["0"]["mlp"]["adapter"].down.shape == (16, 3)
    mesh, stacked = make_mesh(expert=4, fsdp=2), stack_layers(params)
    spec = param_shardings(stacked, mesh)["layers"]["mlp"]["experts"]["gate_up"]["kernel"].b.spec
    assert tuple(spec) == (None, "expert", None, "tensor")


def test_what_a_mesh_or_a_scan_cannot_do_is_refused(task):
    params, batch, _ = task
    with pytest.raises(ValueError, match="expert=8 does not divide the 4 experts"):
        param_shardings(params, make_mesh(expert=8))
    mixed = dataclasses.replace(
        CONFIG, num_layers=2, experts=dataclasses.replace(EXPERTS, dense_layers=(0,))
    )
    model = Decoder(mixed, scan_layers=True)
    with pytest.raises(ValueError, match="layers of two kinds cannot be scanned"):
        jax.eval_shape(model.init, jax.random.key(0), model.example_input())
    dense = Decoder(dataclasses.replace(CONFIG, experts=None))
    shapes = jax.eval_shape(dense.init, jax.random.key(0), dense.example_input())["params"]
    with pytest.raises(ValueError, match="this model has no experts"):
        jax.eval_shape(supervised(dense.forward, router=RouterTerms(1.0)), shapes, batch, None)
    with pytest.raises(ValueError, match="3 of 2 experts"):
        Experts(count=2, per_token=3, width=4)
