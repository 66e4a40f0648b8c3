"""Properties of every family's codec: round trips, and the keys that it says it reads."""

from collections.abc import Mapping

import jax
import pytest

from jaxft.models import FAMILIES, CheckpointError, config_of
from jaxft.models.hf_keys import complete
from jaxft.models.stacking import layers_in
from jaxft.models.towers import TEXT_PARTS

DECODER = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=8192,
)  # fmt: skip
WINDOWS = dict(sliding_window=4, use_sliding_window=True, max_window_layers=2)
ENCODER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8,
    patch_size=4,
)  # fmt: skip
# Each head has its own keys and values, which come from a latent vector.
LATENT = {name: value for name, value in DECODER.items() if name != "head_dim"} | dict(
    num_key_value_heads=4, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
    num_experts_per_tok=2, n_routed_experts=8, moe_intermediate_size=16,
)  # fmt: skip
GROUPS = dict(n_group=4, topk_group=2, q_lora_rank=8, n_shared_experts=2, first_k_dense_replace=1)
T5 = dict(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2)
BART = dict(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=2)
STATES = DECODER | dict(head_dim=16)  # a quarter of its features turns
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=12,
)
FULL, LINEAR = "full_attention", "linear_attention"
SOUND = dict(d_model=32, encoder_layers=1, encoder_attention_heads=4, max_source_positions=8)
PICTURES = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
GRIDS = dict(
    depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2,
    temporal_patch_size=2, window_size=16, out_hidden_size=32, fullatt_block_indexes=[0],
)  # fmt: skip
LLAMA_SEES = dict(
    text_config=DECODER | dict(model_type="llama"),
    vision_config=PICTURES,
    image_token_id=3,
    scale_factor=2,
)
TURNS = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 2, 2])
ENCODERS = ("bert", "roberta", "xlm-roberta", "vit")
SPLIT_ROPE = {"full_attention": dict(factor=8.0, rope_type="linear"), "sliding_attention": {}}
GEMMA4 = dict(
    per_layer_config={"2": {"head_dim": 16}, "6": {"head_dim": 16, "num_key_value_heads": 2}},
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["full_attention"],
    num_kv_shared_layers=3, use_double_wide_mlp=True, attention_k_eq_v=True, hidden_size_per_layer_input=0,
    enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=8,
)  # fmt: skip
GEMMA4["per_layer_config"]["5"] = GEMMA4["per_layer_config"]["2"]
FILES = {
    "gpt2": [dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4)],
    "gemma3_text": [DECODER | WINDOWS, DECODER | dict(rope_parameters=SPLIT_ROPE)],
    "gemma4_text": [DECODER | WINDOWS, DECODER | GEMMA4],
    "bert": [ENCODER],
    "roberta": [ENCODER],
    "xlm-roberta": [ENCODER],
    "t5": [T5, T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)],
    "bart": [BART],
    "mbart": [BART],
    "marian": [BART],
    "whisper": [
        dict(vocab_size=61, d_model=48, encoder_layers=1, decoder_layers=2, max_source_positions=8)
    ],
    "qwen2_audio": [
        dict(
            text_config=DECODER | dict(model_type="qwen2"), audio_config=SOUND, audio_token_index=3
        )
    ],
    "idefics3": [LLAMA_SEES],
    "smolvlm": [LLAMA_SEES],
    "paligemma": [
        dict(
            text_config=DECODER | dict(model_type="gemma"),
            vision_config=PICTURES,
            image_token_index=3,
            projection_dim=32,
        )
    ],
    "llava": [
        dict(
            text_config=DECODER | dict(model_type="llama"),
            vision_config=PICTURES,
            image_token_index=3,
        )
        | other
        for other in (
            {},
            dict(
                vision_feature_layer=[0, -1],
                vision_feature_select_strategy="full",
                multimodal_projector_bias=False,
                projector_hidden_act="relu",
                tie_word_embeddings=True,
            ),
        )
    ],
    "qwen2_5_vl": [
        dict(
            text_config=DECODER | dict(model_type="qwen2_5_vl_text", rope_parameters=TURNS),
            vision_config=GRIDS,
            image_token_id=3,
            vision_start_token_id=4,
            vision_end_token_id=5,
        )
    ],
    "qwen2_vl": [
        dict(
            text_config=DECODER | dict(model_type="qwen2_vl_text", rope_parameters=TURNS),
            vision_config=dict(
                depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4, mlp_ratio=2
            ),
            image_token_id=3,
        )
    ],
    "vit": [ENCODER],
    "deepseek_v2": [
        LATENT | dict(topk_method="greedy"),
        LATENT | GROUPS | dict(topk_method="group_limited_greedy"),
    ],
    "qwen3_next": [
        STATES
        | EXPERTS
        | dict(mlp_only_layers=[1, 4], layer_types=None, full_attention_interval=3),
    ],
    "qwen3_5_text": [STATES, STATES | dict(layer_types=[FULL, LINEAR] * 3 + [LINEAR])],
    "qwen3_5_moe_text": [STATES | EXPERTS],
    "deepseek_v3": [LATENT | GROUPS, LATENT | GROUPS | dict(q_lora_rank=None)],
}


# tests/checkpoints/test_text_parts.py has the others.
OWN = [family for family in FAMILIES if family not in TEXT_PARTS]
families = pytest.mark.parametrize("family", OWN, ids=lambda family: family.name)


class Recorder(Mapping):
    """A config.json that keeps the names of the keys that are looked at."""

    def __init__(self, json):
        self.json, self.seen = json, set()

    def __getitem__(self, key):
        self.seen.add(key)
        return self.json[key]

    def __iter__(self):
        raise AssertionError("a codec that goes through all keys cannot say which it reads")

    def __len__(self):
        return len(self.json)


def files(family):
    return FILES.get(family.name, [DECODER, DECODER | WINDOWS])


@families
def test_a_codec_reads_the_keys_that_it_lists(family):
    seen = set()
    for json in files(family):
        codec = family.huggingface
        recorder = Recorder(complete(json, codec.keys, codec.reads))
        family.huggingface.read(recorder, ())
        seen |= recorder.seen
    assert seen == family.huggingface.reads


@families
def test_what_a_codec_writes_it_reads_again(family):
    for json in files(family):
        names = {"pooler.dense.weight"} if family.name in ENCODERS else set()
        config = config_of({"model_type": family.name, **json}, names)
        written = {"model_type": family.name, **family.huggingface.write(config)}
        assert config_of(written, names) == config and config.family == family.name
        model = family.module(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
        entries = family.huggingface.entries(config)
        assert {path for entry in entries for path in entry.paths} == paths
        assert layers_in(shapes, family.layers).keys() == set(map(str, range(config.num_layers)))
        if family.gguf is not None:
            held = {path for entry in family.gguf.entries(config) for path in entry.paths}
            assert held == paths


def test_a_token_for_images_or_sounds_outside_the_vocabulary_is_refused():
    checked = set()
    for family in OWN:
        for json in files(family):
            for key in {"image_token_id", "image_token_index", "audio_token_index"} & set(json):
                config = config_of({"model_type": family.name, **json})
                assert config.towers[0].token == json[key]
                for token in (-1, config.vocab_size):
                    with pytest.raises(CheckpointError, match=f"{key} is {token}, expected one of"):
                        config_of({"model_type": family.name, **json, key: token})
                checked.add(family.name)
    towers = {family.name for family in OWN if family.targets.parts}
    assert checked == towers


def test_positions_by_layer_are_refused_where_a_family_has_one_kind():
    with pytest.raises(ValueError, match="that differ by layer are supported for Gemma 3"):
        config_of({"model_type": "mistral", **DECODER, "rope_parameters": SPLIT_ROPE})
