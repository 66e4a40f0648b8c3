"""Our adapters in PEFT and PEFT's in ours, on random models of three families."""

import importlib.util
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import (
    ALL_LINEAR,
    AdapterError,
    adapt,
    combine,
    full,
    load_adapter,
    lora,
    partition,
    save_adapter,
)
from jaxft.checkpoints import load_model
from jaxft.models import stack_layers

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
peft = pytest.importorskip("peft", reason="parity tests need peft: pip install 'jaxft[test]'")
_spec = importlib.util.spec_from_file_location(
    "families", pathlib.Path(__file__).parents[1] / "checkpoints" / "families.py"
)
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

TOKENS = np.arange(3, 15)[None]


@pytest.fixture(scope="module", params=["smollm2", "qwen3", "gpt2"])
def pair(request, tmp_path_factory):
    theirs = families.torch_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    return path, type(theirs), *load_model(path)


def trained(params, rules):
    """Adapted, with A and B as after training."""
    trainable, frozen = partition(adapt(jax.random.key(1), params, rules))
    move = lambda x: x + 0.1 * jnp.sin(1.0 + jnp.arange(x.size)).reshape(x.shape)
    return combine(jax.tree.map(move, trainable), frozen)


def ours(model, params):
    return np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)).logits)


def close(x, y):
    chex.assert_trees_all_close(x, y, rtol=0, atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize(
    "rules",
    [
        {ALL_LINEAR: lora(4, 8.0)},
        {r"layers/.*/(query|value)/kernel": lora(3, 8.0)},
        {r"layers/1/.*/(key|down)/kernel": lora(2), r"layers/0/mlp/up/kernel": lora(5, 1.0)},
    ],
)
def test_peft_opens_our_adapter(pair, rules, tmp_path):
    path, kind, model, params = pair
    adapted = trained(params, rules)
    save_adapter(tmp_path, model.config, adapted, base_model=str(path))
    base = kind.from_pretrained(path, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    close(ours(model, adapted), logits)
    assert np.abs(logits - ours(model, params)).max() > 0.1
    again = load_adapter(tmp_path, model.config, params)
    close(ours(model, again), logits)
    if model.config.family != "gpt2":  # There the fused rank is another.
        chex.assert_trees_all_equal(again, adapted)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_open_pefts_adapter(pair, use_rslora, tmp_path):
    path, kind, model, params = pair
    base = kind.from_pretrained(path, attn_implementation="eager")
    targets = ["c_attn"] if model.config.family == "gpt2" else ["q_proj", "down_proj"]
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        use_rslora=use_rslora,
        init_lora_weights=False,
        fan_in_fan_out=model.config.family == "gpt2",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    close(ours(model, load_adapter(tmp_path, model.config, params)), logits)
    stacked = load_adapter(tmp_path, model.config, stack_layers(params))
    close(ours(model, stacked), logits)


def test_lost_and_foreign_keys_are_errors(pair, tmp_path):
    _, _, model, params = pair
    save_adapter(tmp_path, model.config, trained(params, {ALL_LINEAR: lora(2)}))
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    name = sorted(whole)[0]

    def check(tensors, message):
        save_file(tensors, file)
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path, model.config, params)

    check({k: v for k, v in whole.items() if k != name}, "missing key")
    module = name.rsplit(".lora_", 1)[0]
    check({k: v for k, v in whole.items() if not k.startswith(module + ".")}, "missing key")
    check(whole | {"base_model.model.extra.lora_A.weight": whole[name]}, "surplus key")
    check(whole | {name: whole[name][:1]}, "has rank 1, the config says")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(tmp_path, model.config, params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora"):
        load_adapter(tmp_path, model.config, params)


def test_what_peft_cannot_hold_is_not_lost_in_silence(pair, tmp_path):
    _, _, model, params = pair
    with pytest.raises(AdapterError, match=r"'final_norm/\w+' trains but is no LoRA weight"):
        rules = {ALL_LINEAR: lora(2), "final_norm/.*": full()}
        save_adapter(tmp_path, model.config, adapt(jax.random.key(0), params, rules))
