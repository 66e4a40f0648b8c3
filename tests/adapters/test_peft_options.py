"""Options of adapters that PEFT knows: the same logits here, or an error by the option's own name."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import (
    AdapterError,
    adapt,
    as_lora,
    dora,
    full,
    ia3,
    load_adapter,
    lora,
    merge,
    paca,
    save_adapter,
)
from jaxft.adapters.peft.options import COMMON, OPTIONS, OTHERS, with_defaults
from tests.small_models import trained

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
transformers = pytest.importorskip("transformers", reason="pip install 'jaxft[test]'")
peft = pytest.importorskip("peft", reason="parity tests need peft: pip install 'jaxft[test]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it is asked for here.
peft_base = pytest.importorskip("tests.adapters.peft_base")
Base, SIZES, TOKENS, close = (getattr(peft_base, n) for n in ("Base", "SIZES", "TOKENS", "close"))
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    path = tmp_path_factory.mktemp("bases")
    untied = transformers.LlamaConfig(**SIZES, attention_bias=True)
    tied = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=24, n_layer=1, n_head=2, n_positions=32)
    return {
        "untied": Base(path / "untied", untied),
        "tied": Base(path / "tied", tied),
        "gpt2": Base(path / "gpt2", gpt2),
    }


def lora_config(**options):
    defaults = dict(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.LoraConfig(**defaults | options)


TIED = "tied to its embeddings.*untie the base first"
# (base, options of LoRA, None where the logits must be PEFT's, or the error)
LORA = {
    "head": ("untied", dict(target_modules=["q_proj", "lm_head"]), None),
    "head, tied": ("tied", dict(target_modules=["q_proj", "lm_head"]), TIED),
    "embedding": ("untied", dict(target_modules=["q_proj", "embed_tokens"]), None),
    "embedding, tied": ("tied", dict(target_modules=["q_proj", "embed_tokens"]), TIED),
    "both, tied": ("tied", dict(target_modules=["embed_tokens"], ensure_weight_tying=True), None),
    "head saved": ("untied", dict(modules_to_save=["lm_head"]), None),
    "head saved, tied": ("tied", dict(modules_to_save=["lm_head"]), TIED),
    "embedding saved, tied": ("tied", dict(modules_to_save=["embed_tokens"]), TIED),
    "both saved, tied": (
        "tied", dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True), None
    ),
    "tokens": ("untied", dict(trainable_token_indices=[3, 10]), None),
    "tokens, tied": ("tied", dict(trainable_token_indices=[3, 10]), None),
    "tokens of the head": (
        "untied", dict(trainable_token_indices={"lm_head": [3]}), "trainable_token_indices of 'lm_head'"
    ),
    "lora_bias": ("untied", dict(lora_bias=True), None),
    "lora_bias without bias": (
        "tied", dict(lora_bias=True, target_modules=["o_proj"]), "lora_bias=true adds a bias"
    ),
    "pissa": ("untied", dict(init_lora_weights="pissa", use_rslora=True), None),
    "pissa, fused": ("gpt2", dict(init_lora_weights="pissa", target_modules=["c_attn"]), None),
    "olora": ("untied", dict(init_lora_weights="olora"), None),
    "olora, fused": (
        "gpt2", dict(init_lora_weights="olora", target_modules=["attn.c_proj"]), "GPT-2's Conv1D"
    ),
    "pissa_niter_4": ("untied", dict(init_lora_weights="pissa_niter_4"), "a random part"),
    "gaussian": ("untied", dict(init_lora_weights="gaussian"), None),
    "orthogonal": ("untied", dict(init_lora_weights="orthogonal", r=4), None),
    "wte": ("gpt2", dict(target_modules=["wpe", "c_proj"]), None),
    "excluded": (
        "untied", dict(target_modules="all-linear", exclude_modules=r".*layers\.0\..*|.*mlp.*"), None
    ),
    "saved and targeted": (
        "untied", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["up_proj"]), None
    ),
    "one layer": (
        "untied",
        dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], layers_pattern="layers"),
        None,
    ),
    "dora on an embedding": (
        "untied", dict(target_modules=["embed_tokens"], use_dora=True), "use_dora on the embedding"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LORA)
def test_lora_is_pefts_or_refused_by_name(name, bases, tmp_path):
    which, options, message = LORA[name]
    base = bases[which]
    base.write(tmp_path, lora_config(**options))
    if message is None:
        theirs = base.pefts(tmp_path)
        close(base.logits(tmp_path), theirs)
        assert np.abs(theirs - np.asarray(base.apply(base.params))).max() > 0.02
    else:
        with pytest.raises(AdapterError, match=message):
            base.logits(tmp_path)


def test_the_table_has_the_options_of_the_installed_peft():
    classes = {
        str(getattr(k, "value", k)): c for k, c in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    assert classes.keys() == (OPTIONS.keys() - {"PACA"}) | OTHERS
    for kind in OPTIONS.keys() - {"PACA"}:
        fields = {f.name: f for f in dataclasses.fields(classes[kind]) if f.name not in COMMON}
        assert fields.keys() == OPTIONS[kind].names, kind
        for name, neutral in {**OPTIONS[kind].reads, **OPTIONS[kind].refused}.items():
            field = fields[name]
            makes = field.default_factory is not dataclasses.MISSING
            assert neutral == (field.default_factory() if makes else field.default), (kind, name)


def test_every_option_that_changes_the_result_and_is_not_read_is_refused():
    for kind, options in OPTIONS.items():
        settings = {"peft_type": kind, **dict.fromkeys(options.required, 1)}
        for name in options.refused:
            with_defaults(settings | {name: options.refused[name]})
            with pytest.raises(AdapterError, match=f"^{name}=.* is not supported for {kind}"):
                with_defaults(settings | {name: {"r": 2}})
        for name in options.no_effect:
            with_defaults(settings | {name: {"r": 2}})


@pytest.fixture(scope="module")
def written(bases, tmp_path_factory):
    """A LoRA of PEFT with its torch model, for what is changed in its files."""
    path = tmp_path_factory.mktemp("written")
    options = dict(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    return path, bases["untied"].write(path, lora_config(**options))


def changed(written, tmp_path, tensors=lambda tensors: tensors, **settings):
    """A copy of the adapter with other tensors and settings; ... takes a setting away."""
    path, _ = written
    given = json.loads((path / CONFIG).read_text()) | settings
    given = {name: value for name, value in given.items() if value is not ...}
    (tmp_path / CONFIG).write_text(json.dumps(given))
    save_file(tensors(load_file(path / FILE)), tmp_path / FILE)
    return tmp_path


def renamed(change):
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


PREFIX = "base_model.model."
NAMES = {
    "compiled": renamed(lambda n: n.replace(PREFIX, PREFIX + "_orig_mod.")),
    "compiled outside": renamed(lambda n: "_orig_mod." + n),
    "of FSDP": renamed(lambda n: n.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")),
    "of DDP": renamed(lambda n: "module." + n),
    "with the adapter's name": renamed(lambda n: re.sub("(lora_[AB])", r"\1.mine", n)),
    "without the prefix": renamed(lambda n: n.removeprefix(PREFIX)),
    "of a bare model": renamed(lambda n: n.replace(PREFIX + "model.layers", PREFIX + "layers")),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_tools_are_read(name, bases, written, tmp_path):
    base = bases["untied"]
    close(base.logits(changed(written, tmp_path, NAMES[name])), base.logits(written[0]))


def test_a_raw_state_dict_is_read(bases, written, tmp_path):
    """The form of `torch.save(model.state_dict())`: the base model too, and adapters by name."""
    base, (path, model) = bases["untied"], written
    state = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    close(base.logits(changed(written, tmp_path, lambda _: state)), base.logits(path))
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight"
    moved = state | {key: 2 * state[key]}
    with pytest.raises(AdapterError, match=r"q_proj.base_layer.weight' .* differs from this model"):
        base.logits(changed(written, tmp_path, lambda _: moved))
    two = state | {n.replace("default", "other"): t for n, t in state.items() if "lora_" in n}
    with pytest.raises(AdapterError, match="holds the adapters default, other; save a single one"):
        base.logits(changed(written, tmp_path, lambda _: two))


def without(part):
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


Q = f"{PREFIX}model.layers.0.self_attn.q_proj."
REFUSED = {
    "null alpha": (dict(lora_alpha=None), "lora_alpha=None must be a number"),
    "null rank": (dict(r=None), "r=None must be a positive integer"),
    "rank 0": (dict(r=0), "r=0 must be a positive integer"),
    "rank as text": (dict(r="3"), "r='3' must be a positive"),
    "no pattern": (dict(rank_pattern={"(q_proj": 2}), r"rank_pattern: '\(q_proj' is not a regular exp"),
    "star": (dict(alpha_pattern={"*q_proj": 2}), r"alpha_pattern: '\*q_proj' is not a regular exp"),
    "rank of a pattern": (dict(rank_pattern={"q_proj": "2"}), "rank_pattern\\['q_proj'\\]='2'"),
    "pattern as list": (dict(rank_pattern=["q_proj"]), "rank_pattern=\\['q_proj'\\] must be an object"),
    "targets": (dict(target_modules="*q_proj"), "target_modules: '\\*q_proj' is not a regular exp"),
    "targets as number": (dict(target_modules=3), "target_modules=3 must be a list"),
    "excluded": (dict(exclude_modules="["), "exclude_modules: '\\[' is not a regular exp"),
    "saved as text": (dict(modules_to_save="lm_head"), "modules_to_save='lm_head' must be a list"),
    "layers of a pattern": (
        dict(target_modules=".*q_proj", layers_to_transform=[1]), "layers_to_transform needs a list"
    ),
    "pattern of no layers": (dict(layers_pattern="layers"), "layers_pattern has no effect without"),
    "layers": (dict(layers_to_transform="1"), "layers_to_transform='1' must be"),
    "eva": (dict(init_lora_weights="evil"), "init_lora_weights='evil' .* expected true, false"),
    "corda": (dict(init_lora_weights="corda"), "'corda' .* path_initial_model_for_weight_conversion"),
    "lora_ga": (dict(init_lora_weights="lora_ga"), "'lora_ga' is not supported"),
    "loftq": (dict(init_lora_weights="loftq"), "'loftq' is not supported: it quantised the base"),
    "experts": (dict(target_parameters=["experts.up"]), "target_parameters=.*since it has no experts"),
    "unheard of": (dict(use_moonlight=True), "use_moonlight=True is not an option of LORA"),
    "another type": (dict(peft_type="SHIRA"), "peft_type 'SHIRA' .* merge it into its model with PEFT"),
    "no module": (dict(target_modules=["nothing"]), "surplus key .*does not name its module"),
    "another model": (
        dict(tensors=renamed(lambda n: n.replace("layers.1", "layers.7"))), "missing key .*layers.1"
    ),
    "another family": (
        dict(tensors=renamed(lambda n: n.replace("q_proj", "Wqkv"))), "missing key|no such module"
    ),
    "more layers": (
        dict(tensors=lambda t: t | {Q.replace("0", "9") + "lora_A.weight": t[Q + "lora_A.weight"]}),
        "adapter is for another model: this one has no such module",
    ),
    "half a file": (dict(tensors=without("lora_B")), "missing key .*lora_B.weight"),
    "another tower": (
        dict(tensors=renamed(lambda n: n.replace(".model.layers.0", ".vision_tower.model.layers.0"))),
        "missing key .*model.layers.0",
    ),
    "two biases": (dict(lora_bias=True, bias="all"), "lora_bias=true with bias='all'"),
    "vocabulary": (
        dict(tensors=lambda t: t | {f"{PREFIX}lm_head.weight": np.zeros((70, 24), np.float32)}),
        r"vocabulary of 70 tokens \(lm_head\), the model one of 64. Resize .*resize_token_embeddings\(70",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_name(name, bases, written, tmp_path):
    change, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        base = bases["untied"]
        load_adapter(changed(written, tmp_path, **change), base.model.config, base.params)


WITHOUT_EFFECT = dict(
    fan_in_fan_out=True, lora_dropout=0.3, qalora_group_size=4, ensure_weight_tying=True,
    loftq_config={"loftq_bits": 2}, target_parameters=[], rank_pattern={}, exclude_modules=[],
)  # fmt: skip


def test_options_without_effect_have_none_in_peft_either(bases, written, tmp_path):
    path = changed(written, tmp_path, **WITHOUT_EFFECT)
    close(bases["untied"].logits(path), bases["untied"].pefts(path))


@pytest.mark.parametrize("settings", [dict(lora_alpha=..., r=...), dict(rank_pattern=None)])
def test_absent_and_null_options_are_pefts_defaults(settings, bases, tmp_path):
    base = bases["untied"]
    base.write(tmp_path, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = base.logits(tmp_path)
    close(base.logits(changed((tmp_path, None), tmp_path, **settings)), before)


@pytest.mark.parametrize("which", ["untied", "tied"])
def test_a_resized_vocabulary_is_read_on_a_base_that_was_resized(which, bases, tmp_path):
    base = bases[which]
    base.write(tmp_path / "adapter", lora_config(), resize=70)
    with pytest.raises(AdapterError, match="a vocabulary of 70 tokens .*resize_token_embeddings"):
        base.logits(tmp_path / "adapter")
    larger = Base(
        tmp_path / "base",
        base.torch().config.__class__(
            **SIZES | dict(vocab_size=70),
            **(dict(tie_word_embeddings=True) if which == "tied" else dict(attention_bias=True)),
        ),
    )
    other = peft.PeftModel.from_pretrained(larger.torch(), tmp_path / "adapter").eval()
    file = load_file(tmp_path / "adapter" / FILE)
    saved = load_adapter(tmp_path / "adapter", larger.model.config, larger.params)
    np.testing.assert_array_equal(
        merge(saved)["embed"]["embedding"], file["base_model.model.model.embed_tokens.weight"]
    )
    with torch.no_grad():
        close(larger.logits(tmp_path / "adapter"), other(torch.tensor(TOKENS)).logits.numpy())


def of(kind, **options):
    return getattr(peft, kind)(task_type="CAUSAL_LM", **options)


BANK = dict(
    r=2, num_vectors=7, vector_length=8, topk=3, target_modules=["q_proj", "k_proj", "down_proj"]
)
OTHER_TYPES = {
    "tokens": ("untied", lambda: of("TrainableTokensConfig", token_indices=[10, 3])),
    "tokens, tied": ("tied", lambda: of("TrainableTokensConfig", token_indices=[10, 3])),
    "adalora": (
        "untied",
        lambda: of("AdaLoraConfig", target_modules=["q_proj"], init_r=4, target_r=2, total_step=10),
    ),
    "vblora": ("untied", lambda: of("VBLoRAConfig", **BANK)),
    "vblora, only k": ("untied", lambda: of("VBLoRAConfig", **BANK, save_only_topk_weights=True)),
    "hra": ("untied", lambda: of("HRAConfig", r=3, target_modules=["q_proj", "k_proj"])),
    "hra, orthogonal": ("untied", lambda: of("HRAConfig", r=3, target_modules=["up_proj"], apply_GS=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_other_types_are_read(name, bases, tmp_path):
    which, make = OTHER_TYPES[name]
    base = bases[which]
    base.write(tmp_path, make())
    theirs = base.pefts(tmp_path)
    close(base.logits(tmp_path), theirs)
    assert np.abs(theirs - np.asarray(base.apply(base.params))).max() > 0.02


def test_the_ranks_that_adalora_kept_are_read(bases, tmp_path):
    """Its scale is that of all ranks it began with, whatever is kept."""
    base = bases["untied"]
    config = peft.AdaLoraConfig(
        target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM"
    )
    config.rank_pattern = {
        f"model.layers.{i}.self_attn.q_proj.lora_E.default": kept
        for i, kept in enumerate([[True, False, True, False], [False] * 4])
    }
    base.write(tmp_path, config)
    close(base.logits(tmp_path), base.pefts(tmp_path))


WRITTEN = {
    "head and embedding": ("untied", {"(head/kernel|embed/embedding)": lora(2, 3.0)}),
    "tied embedding": ("tied", {"embed/embedding": lora(2, 3.0)}),
    "tied, whole": ("tied", {"embed/embedding": full(), ".*query/kernel": lora(2)}),
    "tokens": ("tied", {"embed/embedding": paca(3)}),
    "tokens beside LoRA": ("tied", {"embed/embedding": paca(3), ".*query/kernel": lora(2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_peft_opens_what_is_written_on_embeddings(name, bases, tmp_path):
    which, rules = WRITTEN[name]
    base = bases[which]
    adapted = trained(adapt(jax.random.key(1), base.params, rules))
    save_adapter(tmp_path, base.model.config, adapted, base_model=str(base.path), base=base.params)
    theirs = base.pefts(tmp_path)
    close(np.asarray(base.apply(merge(adapted))), theirs)
    close(base.logits(tmp_path), theirs)
    assert np.abs(theirs - np.asarray(base.apply(base.params))).max() > 0.02


@pytest.mark.parametrize("rule, rank", [(paca(3), None), (dora(2), 24)], ids=["paca", "dora"])
def test_peft_opens_other_adapters_as_lora(rule, rank, bases, tmp_path):
    base = bases["untied"]
    adapted = adapt(jax.random.key(1), base.params, {"layers/.*/(query|down)/kernel": rule})
    converted, lost = as_lora(trained(adapted), rank)
    assert lost.overall < 1e-9
    save_adapter(tmp_path, base.model.config, converted)
    close(np.asarray(base.apply(merge(trained(adapted)))), base.pefts(tmp_path))


def test_what_pissa_and_olora_took_out_of_the_base_is_written_back(bases, tmp_path):
    """A file that was saved without conversion, and is saved again, is plain LoRA."""
    base = bases["untied"]
    base.write(tmp_path / "olora", lora_config(init_lora_weights="olora"))
    loaded = load_adapter(tmp_path / "olora", base.model.config, base.params)
    save_adapter(tmp_path / "again", base.model.config, loaded, base=base.params)
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["r"] == 6
    close(base.pefts(tmp_path / "again"), base.pefts(tmp_path / "olora"))


def test_dora_over_what_pissa_left_is_refused(bases, tmp_path):
    """Its file would be DoRA over the whole kernel."""
    base = bases["untied"]
    base.write(tmp_path, lora_config(init_lora_weights="olora", use_dora=True))
    loaded = load_adapter(tmp_path, base.model.config, base.params)
    with pytest.raises(AdapterError, match="DoraWeight over another kernel than that of `base`"):
        save_adapter(tmp_path / "again", base.model.config, loaded, base=base.params)


def test_what_peft_has_no_place_for_on_embeddings_is_refused(bases, tmp_path):
    base = bases["untied"]
    for rule, message in ((dora(2), "not supported on embeddings"), (ia3(), "does not have there")):
        adapted = adapt(jax.random.key(1), base.params, {"embed/embedding": rule})
        with pytest.raises(AdapterError, match=message):
            save_adapter(tmp_path, base.model.config, adapted)
