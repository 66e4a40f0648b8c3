"""Bottleneck adapters: the formula by torch, and their place in each sublayer by models that need none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import (
    HOULSBY,
    PFEIFFER,
    adapt,
    bottleneck,
    count,
    merge,
    mergeable,
    parallel_adapter,
    partition,
)
from jaxft.models import Decoder, DecoderConfig, Encoder, stack_layers
from jaxft.weights import Bottleneck, bottleneck_adapter
from tests import small_models
from tests.small_models import BERT, GEMMA, GPT2, KEY, LLAMA, VIT, base, large, trained

FAMILIES = {"llama": LLAMA, "gemma": GEMMA, "gpt2": GPT2, "bert": BERT, "vit": VIT}
families = pytest.mark.parametrize("name", FAMILIES)


def trains(adapted):
    return jax.tree.leaves(partition(adapted)[0])


def inputs(model):
    if isinstance(model, Encoder) and model.config.patch_size:
        return jax.random.normal(KEY, (2, 4, 4, 3))
    return jnp.asarray(np.random.default_rng(0).integers(0, 29, (2, 9)))


def hidden(model, params):
    return small_models.hidden(model, params, inputs(model))


def close(x, y, tolerance=5e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name, stacked", [("llama", False), ("gpt2", True), ("bert", True)])
def test_an_adapter_starts_from_the_base_model_and_alone_trains(name, stacked):
    model, plain = base(FAMILIES[name])
    params = stack_layers(plain) if stacked else plain
    for rule in (bottleneck(3), parallel_adapter(3)):
        for pattern, sublayers in ((PFEIFFER, 1), (HOULSBY, 2)):
            adapted = small_models.adapted(params, {pattern: rule})
            assert count(adapted)[0] == 2 * sublayers * 2 * 16 * 3
            downs = [np.reshape(n, (-1, 16, 3)) for n in trains(adapted)[::2]]
            assert len(np.unique(np.concatenate(downs)[:, 0, 0])) == 2 * sublayers
        close(hidden(model, adapted), hidden(model, plain))


@families
def test_a_linear_serial_adapter_is_one_more_factor_of_kernel_and_bias(name):
    model, params = base(FAMILIES[name])
    adapted = trained(
        small_models.adapted(params, {HOULSBY: bottleneck(3, activation=lambda h: h)})
    )
    folded = jax.tree.map(lambda x: x, params)
    for i in "01":
        for sublayer, last in (("attention", "out"), ("mlp", "down")):
            adapter = adapted["layers"][i][sublayer]["adapter"]
            factor = jnp.eye(16) + adapter.down @ adapter.up
            folded["layers"][i][sublayer][last] = {
                name: leaf @ factor for name, leaf in params["layers"][i][sublayer][last].items()
            }
    layout = stack_layers(adapted) if isinstance(model, Encoder) else adapted
    close(hidden(model, layout), hidden(model, folded))
    assert np.abs(hidden(model, adapted) - hidden(model, params)).max() > 0.1


def test_a_parallel_adapter_of_a_plain_mlp_is_a_wider_mlp():
    model, params = base(GPT2)
    gelu = lambda h: jax.nn.gelu(h, approximate=True)
    rules = {r"layers/.*mlp/adapter": parallel_adapter(3, 2.5, activation=gelu)}
    adapted = trained(small_models.adapted(params, rules))
    wide = jax.tree.map(lambda x: x, params)
    for i in "01":
        mlp, adapter = params["layers"][i]["mlp"], adapted["layers"][i]["mlp"]["adapter"]
        up, down = mlp["up"], mlp["down"]
        wide["layers"][i]["mlp"] = {
            "up": {
                "kernel": jnp.concatenate([up["kernel"], adapter.down], axis=1),
                "bias": jnp.pad(up["bias"], (0, 3)),
            },
            "down": down | {"kernel": jnp.concatenate([down["kernel"], 2.5 * adapter.up], axis=0)},
        }
    config = DecoderConfig(**{**vars(model.config), "intermediate_size": 27})
    close(hidden(model, adapted), hidden(Decoder(config), wide))


@pytest.mark.parametrize("name", ["llama", "gemma", "bert"])
def test_a_parallel_adapter_of_attention_adds_to_its_output(name):
    """Captured in the first block, before any norm of what attention gives."""
    model, params = base(FAMILIES[name])
    rule = parallel_adapter(3, 2.5, activation=jnp.tanh)
    adapted = trained(small_models.adapted(params, {r"layers/.*attention/adapter": rule}))

    def captured(params):
        apply = jax.jit(lambda p, x: model.apply(p, x, capture_intermediates=True))
        found = apply({"params": params}, inputs(model))[1]["intermediates"]
        block = found["layers"]["0"]
        x = found["embed_norm"] if name == "bert" else block["attention_norm"]
        y = block["attention"]["__call__"][0]
        return x["__call__"][0], y if name == "bert" else y[0]

    (x, before), (_, after) = captured(params), captured(adapted)
    adapter = adapted["layers"]["0"]["attention"]["adapter"]
    close(after, before + 2.5 * jnp.tanh(x @ adapter.down) @ adapter.up)


@pytest.mark.parametrize("reads", ["output", "input"])
def test_value_and_gradients_are_torch_s(reads):
    torch = pytest.importorskip("torch")
    adapter = bottleneck_adapter(KEY, 8, size=3, activation=jax.nn.gelu, scale=1.5, reads=reads)
    adapter = large(adapter)
    x, y = jax.random.normal(jax.random.key(1), (2, 5, 8))
    loss = lambda a, x, y: jnp.sum(jnp.sin(a(x, y)))
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(adapter, x, y)
    leaves = [torch.tensor(np.asarray(v), requires_grad=True) for v in (*vars_of(adapter), x, y)]
    down, up, tx, ty = leaves
    h = ty if reads == "output" else tx
    inner = torch.nn.functional.gelu(h @ down, approximate="tanh")
    expected = torch.sin(ty + 1.5 * inner @ up).sum()
    expected.backward()
    close(value, expected.item())
    for ours, theirs in zip((*vars_of(grads[0]), *grads[1:]), leaves, strict=True):
        close(ours, np.zeros(ours.shape) if theirs.grad is None else theirs.grad.numpy())


def vars_of(adapter):
    return adapter.down, adapter.up


def test_bad_input_is_explained_and_merging_names_the_adapter():
    model, params = base(LLAMA)
    raises = lambda message: pytest.raises(ValueError, match=message)
    with raises("bottleneck: size must be at least 1, got 0"):
        bottleneck(0)
    with raises("parallel_adapter: size must be at least 1, got -1"):
        parallel_adapter(-1)
    with raises(r"size must lie in 1..16, the features of the sublayer, got 17"):
        adapt(KEY, params, {HOULSBY: bottleneck(17)})
    with raises("which is not a sublayer"):
        adapt(KEY, params, {r"layers/.*/up/adapter": bottleneck(2)})
    with raises("no weight matches 'layers/mlp/adaptor'"):
        adapt(KEY, params, {r"layers/mlp/adaptor": bottleneck(2)})
    with raises("reads must be 'output' or 'input', got 'both'"):
        bottleneck_adapter(KEY, 4, size=2, reads="both")
    adapted = adapt(KEY, params, {PFEIFFER: bottleneck(2)})
    assert mergeable(params) and not mergeable(adapted)
    with raises("merge: layers/0/mlp/adapter is a bottleneck adapter"):
        merge(adapted)
    assert isinstance(adapted["layers"]["1"]["mlp"]["adapter"], Bottleneck)
