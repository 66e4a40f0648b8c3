"""Gives absent keys of config.json transformers' defaults, and refuses unsupported values.

transformers is optional, so each family has a table of its configuration class's keys;
tests/models/test_config_keys.py compares the tables with the classes of the installed transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from json import dumps
from typing import Any

from jaxft.models.errors import CheckpointError

# Known to transformers, without effect on hidden states or logits. They include dropout: from_pretrained
# returns models in evaluation mode, and jaxft's models have no dropout in training either.
NO_EFFECT = frozenset(
    "architectures model_type transformers_version dtype torch_dtype name_or_path _name_or_path "
    "initializer_range use_cache pretraining_tp gradient_checkpointing chunk_size_feed_forward "
    "output_hidden_states output_attentions return_dict tie_last_hidden_states attn_implementation "
    "id2label label2id num_labels problem_type classifier_dropout encoder_stride "
    "pad_token_id bos_token_id eos_token_id "
    "attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob "
    "attention_probs_dropout_prob summary_type summary_use_proj summary_activation "
    "summary_proj_to_labels summary_first_dropout".split()
)
# Keys that transformers' base class, or its functions for all models, read.
COMMON: dict[str, Any] = {
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "pruned_heads": None,  # transformers 4
    "transformers_weights": None,  # another file of weights
    "fusion_config": None,
}


# Counts that must be at least 1.
COUNTS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim max_position_embeddings n_embd n_inner n_layer n_head n_positions num_channels "
    "type_vocab_size sliding_window_pattern no_rope_layer_interval original_max_position_embeddings "
    "d_model d_kv d_ff num_layers num_decoder_layers num_heads encoder_layers decoder_layers num_mel_bins "
    "max_source_positions max_target_positions "
    "encoder_ffn_dim decoder_ffn_dim encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size "
    "shared_expert_intermediate_size decoder_sparse_step n_routed_experts n_shared_experts n_group "
    "topk_group kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
    "linear_num_value_heads full_attention_interval "
    "global_head_dim num_global_key_value_heads vocab_size_per_layer_input top_k_experts".split()
)
# Numbers that must not be negative, infinite or NaN (which Python's JSON allows).
_EPSILONS = frozenset({"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"})


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys that transformers knows in the config.json of one model_type.

    Attributes:
        defaults: the value of each absent key. A key that the codec does not read
            must have this value, or another false one if this is false.
        nullable: keys that are read and may be null although their default is not.
        unchecked: keys that are read and whose type the codec checks.
        neutral: for keys that are not read, the values equivalent to the default; for a key that is not
            listed, any false value is if the default is false.
        no_effect: keys without effect on this family, besides NO_EFFECT.
        aliases: another name of a key -> the key; if a file has both, the alias counts.
    """

    defaults: Mapping[str, Any]
    nullable: frozenset[str] = frozenset()
    unchecked: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    no_effect: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def renamed(self, json: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json without aliases of keys."""
        others = {self.aliases[name]: json[name] for name in self.aliases if name in json}
        return {name: json[name] for name in json if name not in self.aliases} | others

    def with_floats(self, json: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json with 50.0 for 50 if the class has a float, which transformers 5 requires."""
        kind = lambda name: _KINDS.get(name) or type(self.defaults.get(name))
        whole = {name for name in json if type(json[name]) is int and kind(name) is float}
        return {name: float(json[name]) if name in whole else json[name] for name in json}


def complete(json: Mapping[str, Any], keys: Keys, reads: frozenset[str]) -> dict[str, Any]:
    """The config.json with transformers' defaults for absent keys.

    Keys that transformers does not know are ignored, as in transformers.

    Args:
        json: the file.
        keys: of its model_type.
        reads: the keys that the codec looks at.

    Raises:
        CheckpointError: for a key that has an effect in transformers but not here, or whose value has a
            type other than transformers'.
    """
    family, json = json.get("model_type"), keys.renamed(json)
    for name, default in keys.defaults.items():
        if name not in json:
            continue
        value = json[name]
        if name in reads and name not in keys.unchecked:
            _check_type(family, name, value, default, name in keys.nullable)
            _check_range(name, value)
        elif name not in reads and not _neutral(value, default, keys.neutral.get(name)):
            raise CheckpointError(
                f"config.json: {name} is {dumps(value)}, which jaxft's {family} does not compute; expected "
                f"{dumps(default)}. Use transformers for this model, or correct the file if its weights were "
                "trained otherwise."
            )
    return {**keys.defaults, **json}


def check_multiple(json: Mapping[str, Any], whole: str, part: str) -> None:
    """Raises CheckpointError if the size under the key `whole` is not a multiple of that under `part`."""
    if json[part] is not None and json[whole] % json[part]:
        raise CheckpointError(
            f"config.json: {whole} is {json[whole]} and {part} {json[part]}, expected a divisor of it; "
            "correct the file."
        )


def _neutral(value: Any, default: Any, others: tuple[Any, ...] | None) -> bool:
    if others is not None:
        return value == default or value in others
    return value == default or not (value or default)


_KINDS: dict[str, type] = {  # of keys whose default is null, or that are not read
    "initializer_range": float,
    "num_key_value_heads": int,
    "head_dim": int,
    "n_inner": int,
    "pooler_output_size": int,
    "original_max_position_embeddings": int,
    "decoder_start_token_id": int,
    "forced_bos_token_id": int,
    "forced_eos_token_id": int,
    "num_decoder_layers": int,
    "decoder_vocab_size": int,
    "scale_decoder_outputs": bool,
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "hidden_activation": str,
    "clip_qkv": float,
    "sliding_window": int,
    "mlp_only_layers": list,
    "n_group": int,
    "topk_group": int,
    "num_experts_per_tok": int,
    "num_experts": int,
    "top_k_experts": int,
    "moe_intermediate_size": int,
    "num_global_key_value_heads": int,
    "layer_types": list,
    "no_rope_layers": list,
    "rope_scaling": dict,
    "rope_parameters": dict,
}
_EXPECTED = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a name",
    list: "a list",
    dict: "an object",
}


def _check_type(family: Any, name: str, value: Any, default: Any, nullable: bool) -> None:
    if value is None and (default is None or nullable):
        return
    kind = _KINDS[name] if default is None else type(default)
    allowed = (float, int) if kind is float else kind
    right = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if not right:
        raise CheckpointError(
            f"config.json: {name} is {dumps(value)}, expected {_EXPECTED[kind]}; correct the file, or leave "
            f"{name} out for {dumps(default)}, the default of {family}."
        )


def _check_range(name: str, value: Any) -> None:
    if value is None:
        return
    if name in COUNTS and value < 1:
        raise CheckpointError(
            f"config.json: {name} is {value}, expected 1 or more; correct the file."
        )
    if name in _EPSILONS and not 0 <= value < float("inf"):
        raise CheckpointError(
            f"config.json: {name} is {value}, expected a small positive number; correct the file."
        )
