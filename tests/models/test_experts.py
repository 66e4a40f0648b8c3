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
from jaxft.models import Decoder, DecoderConfig, Experts, Latent, stack_layers
from jaxft.models.experts import _activation, mix, route
from jaxft.objectives import RouterTerms, supervised
from jaxft.parallel import make_mesh, param_shardings, shard_params, stacked_axes

# All that a mixture can have, and latent attention: so meshes split each of them.
EXPERTS = Experts(
    count=4, per_token=2, width=12, shared_width=8, bias=True, correction=True, sigmoid=True, groups=2,
    chosen_groups=1, group_best=2, scale=1.5, interleaved=True, swiglu=(1.5, 1.0),
)  # fmt: skip
CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=4, max_length=32, experts=EXPERTS, tie_embeddings=False,
    latent=Latent(rank=6, query_rank=8, plain=6, turned=4, value=6),
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
    gates, chosen = route(logits, Experts(4, 2, 3, normalised=normalised))
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
    activate = lambda both: jax.nn.silu(both[:, :3]) * both[:, 3:]
    np.testing.assert_allclose(mix(x, chosen, gates, up, down, activate), wanted, atol=1e-5)


LIMITED = Experts(8, 3, 1, groups=4, chosen_groups=2, scale=2.5, normalised=False)
CORRECTED = dataclasses.replace(
    LIMITED, sigmoid=True, correction=True, group_best=2, normalised=True
)


@pytest.mark.parametrize("experts", [LIMITED, CORRECTED], ids=["v2", "v3"])
@pytest.mark.parametrize("ties", [False, True])
def test_groups_limit_the_choice_and_a_correction_does_not_weigh(experts, ties):
    """DeepSeek's rules, one token at a time; of equals, the first."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-1, 2, (6, 8)) if ties else rng.normal(size=(6, 8))
    logits, correction = logits.astype(np.float32), np.zeros(8, np.float32)
    if experts.correction:
        correction = rng.integers(-1, 2, 8).astype(np.float32)  # larger than any score
    gates, chosen = route(jnp.asarray(logits), experts, jnp.asarray(correction))
    first = lambda values, k: np.argsort(-np.asarray(values), kind="stable")[:k]
    for token, (gate, choice) in enumerate(zip(gates, chosen, strict=True)):
        row = jnp.asarray(logits[token])
        scores = np.asarray(jax.nn.sigmoid(row) if experts.sigmoid else jax.nn.softmax(row))
        to_choose = scores + correction
        groups = np.sort(to_choose.reshape(4, 2))[:, -experts.group_best :].sum(1)
        allowed = np.isin(np.arange(8) // 2, first(groups, 2))
        wanted = first(np.where(allowed, to_choose, -np.inf), 3)
        assert wanted.tolist() == choice.tolist()
        share = scores[wanted].sum() if experts.normalised else 1
        np.testing.assert_allclose(gate, 2.5 * scores[wanted] / share, rtol=1e-5)


def test_biases_of_experts_and_the_clamped_swiglu():
    keys = jax.random.split(jax.random.key(1), 4)
    shapes = [(1, 3, 5), (2, 5, 6), (2, 3, 5)]
    x, up, down = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    biases = jax.random.normal(keys[3], (2, 6)), jax.random.normal(keys[3], (2, 5))
    chosen = jnp.array([[[1], [0], [1]]])
    moe = Experts(2, 1, 3, interleaved=True, swiglu=(1.7, 0.5))
    activate = _activation(dataclasses.replace(CONFIG, experts=moe))
    found = mix(x, chosen, jnp.ones((1, 3, 1)), up, down, activate, biases)
    for t, e in enumerate([1, 0, 1]):
        both = x[0, t] @ up[e] + biases[0][e]
        gate, linear = np.minimum(both[::2], 0.5), np.clip(both[1::2], -0.5, 0.5)
        wanted = ((linear + 1) * gate / (1 + np.exp(-1.7 * gate))) @ down[e] + biases[1][e]
        np.testing.assert_allclose(found[0, t], wanted, atol=1e-5)


@pytest.fixture(scope="module")
def task():
    """(adapted params, batch, one device's loss, metrics and gradients)."""
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: 5 * leaf + 0.05, params)  # biases too
    router = params["layers"]["0"]["mlp"]["router"]
    router["correction"] = jnp.array([0.3, -0.2, 0.0, 0.1])
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
    with pytest.raises(ValueError, match="do not have the 3 of a token"):
        Experts(count=4, per_token=3, width=4, groups=2)
