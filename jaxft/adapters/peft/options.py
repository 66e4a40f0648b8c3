"""The options of adapter_config.json, by peft_type: which are read, and which have no effect or are refused.

The table is checked against the installed peft by tests/adapters/test_peft_options.py. Written for 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxft.adapters.errors import AdapterError
from jaxft.adapters.peft.files import Settings

# The options of every PEFT config; they describe the adapter's origin, not its computation.
COMMON = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision "
    "task_type".split()
)


class Options(NamedTuple):
    """The options of one peft_type, with PEFT's default if that is needed."""

    reads: Mapping[str, Any]  # option -> its value if absent
    # Options of training, of initial values that the file replaces, or of how a product is computed.
    no_effect: frozenset[str] = frozenset()
    refused: Mapping[
        str, Any
    ] = {}  # option -> its neutral value; any other changes the computation
    required: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """All options, without the ones common to all types."""
        return self.no_effect.union(self.reads, self.refused, self.required)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TARGETS = dict(target_modules=None, exclude_modules=None, modules_to_save=None)
_LAYERS = dict(layers_to_transform=None, layers_pattern=None)
_PATTERNS = dict(rank_pattern={}, alpha_pattern={})
_LORA_READS = dict(
    **_TARGETS, **_LAYERS, **_PATTERNS,
    r=8, lora_alpha=8, bias="none", use_rslora=False, use_dora=False, lora_bias=False,
    init_lora_weights=True, trainable_token_indices=None, target_parameters=None,
)  # fmt: skip
# PEFT itself corrects fan_in_fan_out by the layer's type; tied weights follow from the tensors.
_LORA_NO_EFFECT = _words(
    "fan_in_fan_out ensure_weight_tying lora_dropout megatron_core loftq_config eva_config corda_config "
    "lora_ga_config qalora_group_size runtime_config"
)
_LORA_REFUSED = dict(
    megatron_config=None, velora_config=None, alora_invocation_tokens=None, use_qalora=False,
    monteclora_config=None, layer_replication=None, use_bdlora=None,
    arrow_config=None, kasa_config=None,
)  # fmt: skip
_LYCORIS = dict(**_TARGETS, **_LAYERS, **_PATTERNS, r=8, alpha=8)
_LYCORIS_NO_EFFECT = _words("rank_dropout module_dropout use_effective_conv2d init_weights")
_SOFT = _words("token_dim num_attention_heads num_layers")

OPTIONS: dict[str, Options] = {
    "LORA": Options(_LORA_READS, _LORA_NO_EFFECT, _LORA_REFUSED),
    "ADALORA": Options(
        dict(**_TARGETS, **_LAYERS, rank_pattern=None, lora_alpha=8, init_r=12, bias="none"),
        _LORA_NO_EFFECT
        | _words(
            "r init_lora_weights use_rslora alpha_pattern target_r tinit tfinal deltaT beta1 beta2 "
            "orth_reg_weight total_step"
        ),
        dict(
            **_LORA_REFUSED, target_parameters=None, use_dora=False, lora_bias=False,
            trainable_token_indices=None,
        ),
    ),
    "VBLORA": Options(
        dict(
            **_TARGETS, **_LAYERS, r=4, num_vectors=256, vector_length=256, topk=2,
            save_only_topk_weights=False, bias="none",
        ),
        _words("vblora_dropout fan_in_fan_out init_vector_bank_bound init_logits_std"),
    ),
    "HRA": Options(
        dict(**_TARGETS, **_LAYERS, r=8, apply_GS=False, bias="none"), _words("init_weights")
    ),
    "LOHA": Options(_LYCORIS, _LYCORIS_NO_EFFECT),
    "LOKR": Options(
        dict(**_LYCORIS, decompose_factor=-1),
        _LYCORIS_NO_EFFECT | {"rank_dropout_scale"},
        dict(decompose_both=False),
    ),
    "VERA": Options(
        dict(
            target_modules=None, modules_to_save=None, **_LAYERS,
            r=256, projection_prng_key=0, save_projection=True, bias="none",
        ),
        _words("vera_dropout d_initial fan_in_fan_out init_weights"),
    ),
    "RANDLORA": Options(
        dict(
            target_modules=None, modules_to_save=None, **_LAYERS,
            r=32, randlora_alpha=640, save_projection=True, bias="none",
        ),
        # The file contains the bases, so their generator does not matter.
        _words("randlora_dropout fan_in_fan_out init_weights projection_prng_key sparse very_sparse"),
    ),
    "OFT": Options(
        dict(
            **_TARGETS, **_LAYERS, r=0, bias="none", coft=False, eps=6e-5, block_share=False,
            use_cayley_neumann=True, num_cayley_neumann_terms=5,
        ),
        _words("module_dropout fan_in_fan_out init_weights"),
        required=_words("oft_block_size"),
    ),
    "BOFT": Options(
        dict(
            **_TARGETS, **_LAYERS, boft_block_size=4, boft_block_num=0, boft_n_butterfly_factor=1,
            bias="none",
        ),
        _words("boft_dropout fan_in_fan_out init_weights"),
    ),
    "IA3": Options(
        dict(**_TARGETS, feedforward_modules=None), _words("fan_in_fan_out init_ia3_weights")
    ),
    "LN_TUNING": Options(_TARGETS),
    "TRAINABLE_TOKENS": Options(
        dict(target_modules=None), _words("init_weights"), required=_words("token_indices")
    ),
    "PROMPT_TUNING": Options(
        dict(num_transformer_submodules=None),
        _SOFT
        | _words(
            "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs"
        ),
        dict(modules_to_save=None),
        _words("num_virtual_tokens"),
    ),
    "PREFIX_TUNING": Options(
        dict(num_transformer_submodules=None),
        # The file contains the projection's result.
        _SOFT | _words("init_weights encoder_hidden_size prefix_projection"),
        dict(modules_to_save=None),
        _words("num_virtual_tokens"),
    ),
    "PACA": Options(
        dict(**_TARGETS, **_LAYERS, **_PATTERNS, bias="none"),
        _words("fan_in_fan_out paca_dropout init_paca_weights"),
        dict(layer_replication=None),
        _words("r paca_alpha"),
    ),
}  # fmt: skip

# How PEFT matches the keys of rank_pattern and alpha_pattern: at a name's end.
AT_END = r"(.*\.)?({})$"
# Types that PEFT has and jaxft lacks.
OTHERS = _words(
    "ADAMSS ADAPTION_PROMPT BEFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA "
    "LILY MISS MULTITASK_PROMPT_TUNING OSF P_TUNING PEANUT POLY PSOFT PVERA ROAD SHADOW SHIRA "
    "SUPERTUNING TINYLORA UNILORA WAVEFT XLORA"
)
_NO_MERGE = _words(
    "ADAPTION_PROMPT CARTRIDGE CPT MULTITASK_PROMPT_TUNING P_TUNING POLY SHADOW XLORA"
)
_WHY = {
    "target_parameters": "it names parameters of mixture-of-experts layers, which AdaLoRA cannot adapt",
    "layer_replication": "it builds a model of more layers; save that model merged",
    "num_transformer_submodules": "decoders have one",
}

_ABSENT = {
    "oft_block_size": ": the file is of PEFT before 0.14, whose OFT no later PEFT reads; merge it there"
}


def with_defaults(settings: Settings) -> Settings:
    """The settings with PEFT's value for each absent option, checked.

    Raises:
        AdapterError: for an unsupported peft_type, an unsupported option that changes the computation,
            an option that neither PEFT nor jaxft knows, or a value of a wrong type.
    """
    kind = settings.get("peft_type")
    if kind not in OPTIONS:
        raise AdapterError(
            f"peft_type {kind!r} is not supported; expected {', '.join(OPTIONS)}{_hint(kind)}."
        )
    options = OPTIONS[kind]
    for name in sorted(options.required - settings.keys()):
        raise AdapterError(f"adapter_config.json has no {name!r}{_ABSENT.get(name, '')}.")
    for name, value in settings.items():
        if name in options.refused and not _neutral(value, options.refused[name]):
            why = _WHY.get(name, "it changes what the adapter computes")
            raise AdapterError(f"{name}={value!r} is not supported for {kind}: {why}.")
        unknown = name not in COMMON and name not in options.names
        if unknown and not _neutral(value, None):
            raise AdapterError(
                f"{name}={value!r} is not an option of {kind} that is known here; if it only mattered in "
                "training, delete it from adapter_config.json."
            )
    settings = {**options.reads, **settings}
    _check_values(settings, options)
    return settings


def compiled(option: str, pattern: Any, form: str = "{}") -> re.Pattern:
    """The pattern of an option, put into `form` as PEFT does.

    Raises:
        AdapterError: if it is not a regular expression.
    """
    try:
        return re.compile(form.format(pattern))
    except re.error as error:
        raise AdapterError(
            f"{option}: {pattern!r} is not a regular expression ({error})."
        ) from None


def _hint(kind) -> str:
    if kind not in OTHERS:
        return ""
    if kind in _NO_MERGE:
        return "; it cannot be merged into a kernel, so use it in PEFT"
    return "; merge it into its model with PEFT (merge_and_unload, save_pretrained) and load that model"


def _neutral(value, neutral) -> bool:
    return value == neutral or value in (None, False, "", "none") or value == [] or value == {}


def _check_values(settings: Settings, options: Options) -> None:
    counts = ("r", "init_r", "num_virtual_tokens", "num_vectors", "vector_length", "topk")
    for name in counts:
        if name == "r" and settings["peft_type"] == "OFT":
            continue  # 0 where oft_block_size is given.
        if name in options.names - options.no_effect:
            _check(settings, name, _is_positive_int, "a positive integer")
    for name in ("lora_alpha", "alpha", "paca_alpha", "randlora_alpha"):
        if name in options.names - options.no_effect:
            _check(
                settings, name, _is_number, "a number; without one PEFT cannot scale the adapter"
            )
    for name, fits in (("rank_pattern", _is_positive_int), ("alpha_pattern", _is_number)):
        table = settings.get(name) if name in options.reads else None
        if name == "rank_pattern" and settings["peft_type"] == "ADALORA":
            continue  # Lists of kept ranks.
        if table is not None and not isinstance(table, Mapping):
            raise AdapterError(f"{name}={table!r} must be an object of pattern and number.")
        for key, value in (table or {}).items():
            compiled(name, key, AT_END)
            if not fits(value):
                raise AdapterError(f"{name}[{key!r}]={value!r} must be a number that fits.")
    _check_names(settings)


def _check_names(settings: Settings) -> None:
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = settings.get(name)
        if isinstance(value, str):
            compiled(name, value)
        elif not _is_list(value, str):
            raise AdapterError(
                f"{name}={value!r} must be a list of names, or a regular expression."
            )
    if not _is_list(settings.get("modules_to_save"), str):
        raise AdapterError(
            f"modules_to_save={settings['modules_to_save']!r} must be a list of names."
        )
    for name in settings.get("modules_to_save") or ():
        compiled("modules_to_save", name)
    only, places = settings.get("layers_to_transform"), settings.get("layers_pattern")
    if not isinstance(only, int) and not _is_list(only, int):
        raise AdapterError(
            f"layers_to_transform={only!r} must be a layer's number, or a list of them."
        )
    if not isinstance(places, str) and not _is_list(places, str):
        raise AdapterError(f"layers_pattern={places!r} must be a pattern, or a list of them.")
    for place in [places] if isinstance(places, str) else places or ():
        compiled("layers_pattern", place)
    if only is not None and isinstance(settings.get("target_modules"), str):
        raise AdapterError(
            "layers_to_transform needs a list of target_modules, not a pattern; name the layers in "
            "the pattern."
        )
    if places and only is None:
        raise AdapterError("layers_pattern has no effect without layers_to_transform; give both.")


def _check(settings, name, fits: Callable[[Any], bool], expected: str) -> None:
    if not fits(settings[name]):
        raise AdapterError(f"{name}={settings[name]!r} must be {expected}.")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_list(value: Iterable | None, kind: type) -> bool:
    return value is None or isinstance(value, list) and all(isinstance(x, kind) for x in value)
