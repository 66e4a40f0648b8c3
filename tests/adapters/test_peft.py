"""Our adapters in PEFT and PEFT's in ours, on random models of three families."""

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
    ALL_NORMS,
    IA3_INPUTS,
    IA3_OUTPUTS,
    AdapterError,
    adapt,
    dora,
    full,
    ia3,
    load_adapter,
    loha,
    lokr,
    lora,
    merge,
    monarch,
    paca,
    pissa,
    quantised,
    save_adapter,
    vera,
)
from jaxft.checkpoints import load_model
from jaxft.models import stack_layers
from tests.small_models import jitted, trained

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
transformers = pytest.importorskip("transformers", reason="pip install 'jaxft[test]'")
peft = pytest.importorskip("peft", reason="parity tests need peft: pip install 'jaxft[test]'")
families = pytest.importorskip("tests.checkpoints.families")

TOKENS = np.arange(3, 15)[None]


@pytest.fixture(scope="module", params=["smollm2", "qwen3", "gpt2"])
def pair(request, tmp_path_factory):
    theirs = families.torch_model(request.param)
    path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(path)
    return path, type(theirs), *load_model(path)


def adapted_and_trained(params, rules):
    return trained(adapt(jax.random.key(1), params, rules))


def ours(model, params):
    """Logits of merged params, so that one program serves all adapters of a model."""
    return np.asarray(jitted(model)({"params": merge(params)}, jnp.asarray(TOKENS)).logits)


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
    adapted = adapted_and_trained(params, rules)
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
    save_adapter(tmp_path, model.config, adapted_and_trained(params, {ALL_LINEAR: lora(2)}))
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
    check(whole | {name: whole[name][:1]}, r"has shape \(1, \d+\), .* need \([26], \d+\)")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(tmp_path, model.config, params)


def test_what_peft_cannot_hold_is_not_lost_in_silence(pair, tmp_path):
    _, _, model, params = pair
    save = lambda rules: save_adapter(
        tmp_path, model.config, adapt(jax.random.key(0), params, rules)
    )
    with pytest.raises(AdapterError, match="nothing trains"):
        save({"layers/0/mlp/up/kernel": quantised("int8", 8)})
    with pytest.raises(AdapterError, match="'layers/0/mlp/up/kernel' trains and is not a norm"):
        save({"layers/0/mlp/up/kernel": full()})
    with pytest.raises(AdapterError, match="trains as MonarchWeight, which PEFT does not have"):
        save({"layers/0/mlp/up/kernel": monarch(blocks=2)})
    with pytest.raises(AdapterError, match="one type, params have LORA at .*, IA3 at"):
        save({"layers/1/.*/up/kernel": ia3(), ALL_LINEAR: lora(2)})
    with pytest.raises(AdapterError, match="LoRA and DoRA together"):
        save({"layers/1/.*/up/kernel": dora(2), ALL_LINEAR: lora(2)})
    if model.config.tie_embeddings:
        with pytest.raises(AdapterError, match="embedding trains, which is tied"):
            save({"embed/.*": full(), IA3_OUTPUTS: ia3()})
    message = "share the random matrices|query, key and value in one matrix"
    with pytest.raises(AdapterError, match=message):
        save({ALL_LINEAR: vera(4)})
    if model.config.family == "gpt2":
        for rule in (loha(2), lokr(2), paca(2)):
            with pytest.raises(AdapterError, match="Conv1D of GPT-2, which .* does not support"):
                save({ALL_LINEAR: rule})


RULES = {
    "dora": {ALL_LINEAR: dora(3, 6.0)},
    "dora of a part": {"layers/.*/(key|up)/kernel": dora(3, 6.0)},
    "ia3": {IA3_OUTPUTS: ia3(), IA3_INPUTS: ia3("input")},
    "norms": {ALL_NORMS: full()},
    "some norms": {"layers/1/.*norm/scale": full()},
    "pissa": {ALL_LINEAR: pissa(3, 6.0)},
    "lora beside": {ALL_LINEAR: lora(2), "final_norm/.*": full()},
    "vera": {"layers/.*/(gate|up|down)/kernel": vera(5, shape=(48, 48), seed=2)},
    "loha": {ALL_LINEAR: loha(2, 3.0), "head/kernel": loha(3, 4.0)},
    "lokr": {ALL_LINEAR: lokr(2, 3.0)},
    "lokr full": {ALL_LINEAR: lokr(24, 3.0, factor=4)},
}
# Every type once; GPT-2 has its own layers, Qwen 3 an output projection and more norms.
IN = {
    "smollm2": list(RULES),
    "gpt2": ["dora", "ia3", "norms", "lora beside"],
    "qwen3": ["loha", "norms"],
}


@pytest.mark.parametrize(
    "pair, name", [(family, name) for family in IN for name in IN[family]], indirect=["pair"]
)
def test_peft_opens_every_type_of_ours(pair, name, tmp_path):
    path, kind, model, params = pair
    rules = {k: v for k, v in RULES[name].items() if k != "head/kernel" or "head" in params}
    adapted = adapted_and_trained(params, rules)
    save_adapter(tmp_path, model.config, adapted, base_model=str(path), base=params)
    base = kind.from_pretrained(path, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    close(ours(model, adapted), logits)
    assert np.abs(logits - ours(model, params)).max() > 0.02
    close(ours(model, load_adapter(tmp_path, model.config, params)), logits)


def test_projections_of_gated_deltanets(tmp_path):
    theirs = families.torch_model("qwen3_5")
    theirs.save_pretrained(tmp_path / "base")
    model, params = load_model(tmp_path / "base")
    adapted = adapted_and_trained(params, {ALL_LINEAR: lora(2)})
    save_adapter(tmp_path, model.config, adapted, base_model=str(tmp_path / "base"))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"} <= {
        *settings["target_modules"]
    }
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        close(ours(model, adapted), opened(torch.tensor(TOKENS)).logits.numpy())
    chex.assert_trees_all_equal(load_adapter(tmp_path, model.config, params), adapted)


def test_peft_opens_biases_beside_lora(tmp_path):
    path = pathlib.Path(__file__).parent / "fixtures" / "base"
    model, params = load_model(path)
    rules = {"layers/.*/query/kernel": lora(2), "layers/.*/query/bias": full()}
    adapted = adapted_and_trained(params, rules)
    save_adapter(tmp_path, model.config, adapted, base_model=str(path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "lora_only"
    base = transformers.LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        close(ours(model, adapted), theirs(torch.tensor(TOKENS)).logits.numpy())
    rules = {"layers/.*/query/kernel": lora(2), "layers/.*/key/bias": full()}
    with pytest.raises(AdapterError, match="no biases, all biases, or those of adapted layers"):
        save_adapter(tmp_path, model.config, adapted_and_trained(params, rules))


@pytest.mark.parametrize("pair", ["smollm2", "gpt2"], indirect=True)
def test_a_pissa_file_needs_its_own_base(pair, tmp_path):
    _, _, model, params = pair
    adapted = adapted_and_trained(params, {ALL_LINEAR: pissa(3, 6.0)})
    other = jax.tree.map(lambda leaf: leaf + 0.5, params)
    with pytest.raises(AdapterError, match="neither that of `base` nor PiSSA.s residual"):
        save_adapter(tmp_path, model.config, adapted, base=other)
