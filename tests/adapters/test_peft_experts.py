"""LoRA on experts in PEFT's files, both ways: stacked parameters, and modules of single experts."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import adapt, as_lora, dora, load_adapter, lora, merge, paca, save_adapter
from jaxft.adapters.errors import AdapterError
from jaxft.checkpoints import load_model
from tests.small_models import jitted

torch = pytest.importorskip("torch", reason="needs torch: pip install 'jaxft[test]'")
peft = pytest.importorskip("peft")
families = pytest.importorskip("tests.checkpoints.families")

# PEFT says so of any pattern of a parameter, and applies it.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
TOKENS = np.arange(9)[None] * 7 % 58 + 3


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe", "gpt_oss", "gemma4_moe"])
def base(request, tmp_path_factory):
    """(family, directory of the base model, our model, our params)."""
    path = tmp_path_factory.mktemp(request.param)
    families.torch_model(request.param).save_pretrained(path)
    return request.param, path, *load_model(path)


def logits_of_peft(base, adapter):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").float()
    theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


def logits(model, params):
    """Logits of merged params, so that one program serves all adapters of a model."""
    return np.asarray(jitted(model)({"params": merge(params)}, TOKENS).logits)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("names", [("gate_up", "down"), ("down",)], ids=str)
def test_ours_open_in_peft_and_come_back(base, names, tmp_path):
    family, path, model, params = base
    rules = {rf".*/experts/({'|'.join(names)})/kernel": lora(3, 5.0)}
    rules |= {".*/query/kernel": lora(2, 8.0)}
    adapted = adapt(jax.random.key(0), params, rules)
    noise = lambda p, leaf: leaf + 0.1 if p[-1].name in "ab" else leaf  # B starts from 0
    adapted = jax.tree_util.tree_map_with_path(
        lambda p, leaf: noise(p, leaf) if hasattr(p[-1], "name") else leaf, adapted
    )
    save_adapter(tmp_path, model.config, adapted, base_model=str(path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    module = "experts" if family == "gemma4_moe" else "mlp.experts"
    assert settings["target_parameters"] == sorted(f"{module}.{name}_proj" for name in names)
    assert settings["target_modules"] == ["q_proj"]
    expected = logits(model, adapted)
    close(expected, logits_of_peft(path, tmp_path))
    again = load_adapter(tmp_path, model.config, params)
    close(logits(model, again), expected)


def test_modules_of_single_experts_are_read_as_peft_reads_them(base, tmp_path):
    family, path, model, params = base
    if family in ("gpt_oss", "gemma4_moe"):
        return  # which have had one parameter for all experts from the start
    mixtral = family == "mixtral"
    places = "block_sparse_moe" if mixtral else "mlp"
    modules = ["w1", "w3", "w2"] if mixtral else ["gate_proj", "up_proj", "down_proj"]
    experts, config, rng = model.config.experts, model.config, np.random.default_rng(0)
    tensors = {}
    for layer in range(config.num_layers):
        for e in range(experts.count):
            for i, name in enumerate(modules):
                sides = (config.hidden_size, experts.width)
                inputs, outputs = sides if i < 2 else sides[::-1]
                key = f"base_model.model.model.layers.{layer}.{places}.experts.{e}.{name}.lora_"
                draw = lambda *shape: 0.3 * rng.normal(size=shape).astype(np.float32)
                tensors[f"{key}A.weight"] = draw(2, inputs)
                tensors[f"{key}B.weight"] = draw(outputs, 2)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    settings = dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=6, lora_dropout=0.0)
    settings |= dict(target_modules=modules, base_model_name_or_path=str(path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapted = load_adapter(tmp_path, model.config, params)
    close(logits(model, adapted), logits_of_peft(path, tmp_path))


@pytest.mark.parametrize(
    "which, change, message",
    [
        ("lora_A", lambda x: x[:-1], "lora_A.weight. has shape"),
        ("lora_A", lambda x: x.T, "lora_A.weight. has shape"),
        ("lora_B", lambda x: x.reshape(-1), "lora_B.weight. has shape"),
        ("lora_B", lambda x: None, "missing key .*lora_B"),
        (None, 3, "target_parameters=3 must be a list of names"),
        (None, [3], r"target_parameters=\[3\] must be a list of names"),
    ],
)
def test_files_that_do_not_fit_are_refused(base, which, change, message, tmp_path):
    """Shapes and kinds of values that the file of an adapter of experts may have by mistake."""
    _, _, model, params = base
    save_adapter(
        tmp_path,
        model.config,
        adapt(jax.random.key(0), params, {".*/experts/down/kernel": lora(2)}),
    )
    if which is None:
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_parameters": change}))
    else:
        file = tmp_path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if which in name)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = np.ascontiguousarray(changed)
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path, model.config, params)


def test_parameters_that_the_model_lacks_are_refused(base, tmp_path):
    _, _, model, params = base
    adapted = adapt(jax.random.key(0), params, {".*/experts/down/kernel": lora(2)})
    save_adapter(tmp_path, model.config, adapted)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"target_parameters": ["mlp.experts.up_proj"]}
    file.write_text(json.dumps(settings))
    with pytest.raises(
        AdapterError, match="names no parameters.*jaxft knows down_proj, gate_up_proj"
    ):
        load_adapter(tmp_path, model.config, params)


@pytest.mark.parametrize("rule", [paca(2), dora(2), lora(2)], ids=["paca", "dora", "lora"])
def test_experts_under_any_adapter_become_lora(rule):
    kernel = jax.random.normal(jax.random.key(0), (3, 6, 5))
    params = {"layers": {"0": {"mlp": {"experts": {"down": {"kernel": kernel}}}}}}
    params = adapt(jax.random.key(1), params, {".*kernel": rule})
    params = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.dtype != np.int32 else leaf, params)
    converted, lost = as_lora(params, 5)
    found, wanted = jax.tree.leaves(merge(converted)), jax.tree.leaves(merge(params))
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    assert lost.overall < 1e-6
