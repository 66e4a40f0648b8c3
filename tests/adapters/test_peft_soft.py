"""Prompts and prefixes in PEFT, and PEFT's in ours, on random models of several families."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import (
    ALL_LINEAR,
    AdapterError,
    adapt,
    load_adapter,
    lora,
    merge,
    prefix,
    prompt,
    save_adapter,
)
from jaxft.checkpoints import load_model
from jaxft.models import stack_layers
from jaxft.weights import prefix_mlp

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
peft = pytest.importorskip("peft", reason="parity tests need peft: pip install 'jaxft[test]'")
families = pytest.importorskip("tests.checkpoints.families")

# PEFT calls transformers by names that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOKENS = np.arange(3, 15)[None]
CASES = [
    # Gemma scales its embeddings; its windows hide virtual tokens like any others.
    *(("prompt", family) for family in ("smollm2", "gpt2", "gemma2")),
    *(("prefix", family) for family in ("gpt2", "qwen3", "gemma2")),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    kind, family = request.param
    theirs = families.torch_model(family)
    path = tmp_path_factory.mktemp(family)
    theirs.save_pretrained(path)
    return kind, path, type(theirs), *load_model(path)


def config(kind, length=3):
    make = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    return make(task_type="CAUSAL_LM", num_virtual_tokens=length)


def ours(model, params):
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(TOKENS)).logits)


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(y).max())


def test_we_open_pefts_and_its_gradient_is_ours(case, tmp_path):
    kind, path, cls, model, params = case
    base = cls.from_pretrained(path, attn_implementation="eager")
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, config(kind)).eval()
    theirs.save_pretrained(tmp_path)
    logits = theirs(torch.tensor(TOKENS)).logits[:, -TOKENS.shape[1] :]
    weights = torch.cos(torch.arange(logits.numel()).float()).reshape(logits.shape)
    (logits * weights).sum().backward()
    embedding = theirs.prompt_encoder["default"].embedding.weight.grad.numpy()

    loaded = load_adapter(tmp_path, model.config, params)
    close(ours(model, loaded), logits.detach().numpy())
    close(ours(model, load_adapter(tmp_path, model.config, stack_layers(params))), logits.detach())
    loss = lambda leaf: jnp.sum(
        model.apply({"params": {**loaded, kind: leaf}}, jnp.asarray(TOKENS)).logits
        * jnp.asarray(weights.numpy())
    )
    grad = jax.jit(jax.grad(loss))(loaded[kind])
    scale = model.config.embedding_scale if kind == "prompt" else 1.0
    close(np.asarray(grad) / scale, embedding)
    assert np.abs(logits.detach().numpy() - ours(model, params)).max() > 0.1


def test_peft_opens_ours(case, tmp_path):
    kind, path, cls, model, params = case
    rules = {"prompt": prompt(ids=[4, 9, 2, 7]), "prefix": prefix(4, scale=0.5)}
    adapted = adapt(jax.random.key(1), params, {kind: rules[kind]})
    save_adapter(tmp_path, model.config, adapted, base_model=str(path))
    base = cls.from_pretrained(path, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits[:, -TOKENS.shape[1] :].numpy()
    close(ours(model, adapted), logits)
    again = load_adapter(tmp_path, model.config, params)
    np.testing.assert_allclose(again[kind], adapted[kind], rtol=1e-6)


def test_the_mlp_is_pefts():
    settings = config("prefix", 4)
    settings.token_dim, settings.num_layers, settings.encoder_hidden_size = 6, 2, 5
    settings.prefix_projection = True
    theirs = peft.PrefixEncoder(settings)
    first, _, second = theirs.transform
    arrays = [theirs.embedding.weight, first.weight.T, first.bias, second.weight.T, second.bias]
    node = prefix_mlp(jax.random.key(0), (4, 24), 6, 5)
    leaves, tree = jax.tree.flatten(node)
    assert [leaf.shape for leaf in leaves] == [tuple(array.shape) for array in arrays]
    copied = tree.unflatten([jnp.asarray(array.detach().numpy()) for array in arrays])
    expected = theirs(torch.arange(4)[None])[0].detach().numpy()
    np.testing.assert_allclose(copied.to_dense(), expected, atol=1e-6)


@pytest.mark.parametrize("case", [("prefix", "smollm2")], indirect=True, ids="-".join)
def test_an_mlp_is_folded_away_in_the_file(case, tmp_path):
    _, _, _, model, params = case
    adapted = adapt(jax.random.key(1), params, {"prefix": prefix(2, hidden=4)})
    save_adapter(tmp_path, model.config, adapted)
    loaded = load_adapter(tmp_path, model.config, params)
    np.testing.assert_allclose(loaded["prefix"], merge(adapted)["prefix"], atol=1e-6)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], indirect=True, ids="-".join)
def test_damage_is_named(case, tmp_path):
    kind, _, _, model, params = case
    rules = {"prompt": prompt(3), "prefix": prefix(3)}
    save_adapter(tmp_path, model.config, adapt(jax.random.key(1), params, {kind: rules[kind]}))
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = load_file(file)

    def check(tensors, message):
        save_file(tensors, file)
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path, model.config, params)

    tensor = whole["prompt_embeddings"]
    check({"other": tensor}, "missing key 'prompt_embeddings'")
    check(whole | {"other": tensor}, "surplus key 'other'")
    check({"prompt_embeddings": tensor[:2]}, r"has shape \(2, \d+\), the model and the config need")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(tmp_path, model.config, params)
    save_file(whole, file)
    settings.write_text(json.dumps({"peft_type": "P_TUNING"}))
    with pytest.raises(AdapterError, match="peft_type 'P_TUNING' is not supported"):
        load_adapter(tmp_path, model.config, params)
    settings.unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config.json"):
        load_adapter(tmp_path, model.config, params)
    both = adapt(jax.random.key(1), params, rules)
    for adapted in (both, adapt(jax.random.key(1), params, {ALL_LINEAR: lora(1), **rules})):
        with pytest.raises(AdapterError, match="trains; PEFT's format holds one"):
            save_adapter(tmp_path, model.config, adapted)
    with pytest.raises(AdapterError, match="nothing trains"):
        save_adapter(tmp_path, model.config, adapt(jax.random.key(1), params, {}))
