"""Makes fixtures/: adapters by Hugging Face PEFT on a tiny Llama, with its logits and gradients.

    python tests/adapters/make_fixtures.py

base/ holds the model; each case its adapter as PEFT writes it, and expected.safetensors: "logits" of
TOKENS, and under the adapter's own keys the gradients of the mean cross-entropy of the next token.
Made with peft 0.21.2, torch 2.13 and transformers 5.24. PaCA, which is in no release of PEFT, is computed
by torch as its authors' fork does, and written with the names of that.
"""

import json
import pathlib
import shutil
import tempfile

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
TOKENS = (np.arange(18).reshape(2, 9) * 7 + 3) % 64
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = dict(r=3, lora_alpha=5, target_modules=TARGETS)


def loha(**options):
    return peft.LoHaConfig(target_modules=TARGETS, **options)


def lokr(**options):
    return peft.LoKrConfig(target_modules=TARGETS, **options)


CASES = {
    "lora": peft.LoraConfig(**LORA),
    "rslora": peft.LoraConfig(**LORA, use_rslora=True),
    "lora_patterns": peft.LoraConfig(
        **LORA,
        rank_pattern={"v_proj": 2, r"layers\.1\..*q_proj": 4},
        alpha_pattern={"down_proj": 7},
        layers_to_transform=[1],
    ),
    "lora_bias": peft.LoraConfig(**LORA, bias="lora_only"),
    "lora_all_biases": peft.LoraConfig(**LORA, bias="all"),
    "lora_modules": peft.LoraConfig(**LORA, modules_to_save=["lm_head", "input_layernorm"]),
    "dora": peft.LoraConfig(**LORA, use_dora=True),
    "pissa": peft.LoraConfig(**LORA, init_lora_weights="pissa"),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": peft.VeraConfig(r=5, target_modules=TARGETS, projection_prng_key=3),
    "vera_key": peft.VeraConfig(
        r=5, target_modules=TARGETS, projection_prng_key=3, save_projection=False
    ),
    "loha": loha(r=2, alpha=3, rank_pattern={"q_proj": 3}),
    "lokr": lokr(r=2, alpha=3),
    "lokr_full": lokr(r=9, alpha=4, decompose_factor=2),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


def make_base(path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_bias=True,  # (IA)^3 scales it
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)


def base_model():
    model = transformers.LlamaForCausalLM.from_pretrained(FIXTURES / "base")
    return model.eval()


def logits_and_loss(model):
    tokens = torch.tensor(TOKENS)
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return logits, loss


def make_case(name, config, path):
    torch.manual_seed(sum(map(ord, name)))
    config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(base_model(), config).eval()
    with tempfile.TemporaryDirectory() as initial:
        if name == "pissa":
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(initial)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        logits, loss = logits_and_loss(model)
        loss.backward()
        if name == "pissa":  # The file holds the difference, which has other gradients.
            model.peft_config["default"].init_lora_weights = "pissa"
            model.save_pretrained(path, path_initial_model_for_weight_conversion=initial)
        else:
            model.save_pretrained(path)
    expected = {"logits": logits}
    if name != "pissa":
        config.save_projection = False
        gradients = {n: p.grad for n, p in trained.items()}
        expected |= peft.get_peft_model_state_dict(model, gradients, save_embedding_layers=False)
    save_file(
        {n: t.detach().contiguous() for n, t in expected.items()}, path / "expected.safetensors"
    )
    (path / "README.md").unlink(missing_ok=True)
    settings = json.loads((path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "base"
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_paca(path, rank=4, alpha=6):
    """y = x W^T with the columns `indices` of W replaced by (alpha / rank) paca_w: paca/layer.py."""
    torch.manual_seed(5)
    model = base_model()
    tensors, replaced = {}, {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in TARGETS:
            indices = torch.randperm(module.in_features)[:rank]
            weight = module.weight.detach()
            paca_w = weight[:, indices] / (alpha / rank)
            paca_w = (paca_w + 0.2 * torch.randn_like(paca_w)).requires_grad_()
            whole = weight.index_copy(1, indices, alpha / rank * paca_w)
            replaced[f"{name}.weight"] = whole
            key = f"base_model.model.{name}.paca_"
            tensors |= {key + "w": paca_w, key + "indices": indices}
    tokens = torch.tensor(TOKENS)
    logits = torch.func.functional_call(model, replaced, (tokens,)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {n: t.grad for n, t in tensors.items() if t.requires_grad}
    path.mkdir()
    save_file(
        {n: t.detach().contiguous() for n, t in tensors.items()}, path / "adapter_model.safetensors"
    )
    save_file({"logits": logits.detach().contiguous()} | gradients, path / "expected.safetensors")
    settings = {
        "peft_type": "PACA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "paca_alpha": alpha,
        "target_modules": TARGETS,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    shutil.rmtree(FIXTURES, ignore_errors=True)
    make_base(FIXTURES / "base")
    for name, config in CASES.items():
        make_case(name, config, FIXTURES / name)
    make_paca(FIXTURES / "paca")
