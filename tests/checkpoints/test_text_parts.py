"""The text parts of models that read images, against transformers' own on texts."""

import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.checkpoints import CheckpointError, load_model, save_model
from jaxft.models import config_of

hf = pytest.importorskip("transformers")
torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")

TEXT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
IMAGES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
SOUNDS = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
IMAGES |= dict(image_size=28, patch_size=14)
QWEN = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
STATES = TEXT | dict(
    head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6,
    linear_value_head_dim=5, layer_types=["linear_attention", "full_attention"],
    rope_parameters=dict(MROPE, mrope_interleaved=True, partial_rotary_factor=0.5),
)  # fmt: skip
EXPERTS = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=12,
)
WHOLE = dict(
    text_config={k: v for k, v in STATES.items() if k != "intermediate_size"} | EXPERTS,
    vision_config=QWEN,
)
MODELS = {
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeConfig(**WHOLE),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=dict(TEXT, head_dim=8, sliding_window=4), vision_config=IMAGES, mm_tokens_per_image=4
    ),
    "gemma4": lambda: hf.Gemma4Config(
        text_config=dict(
            TEXT, head_dim=8, global_head_dim=12, sliding_window=4, num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
            hidden_size_per_layer_input=6, vocab_size_per_layer_input=61,
        ),
        vision_config=IMAGES | dict(num_key_value_heads=2, head_dim=8, position_embedding_size=8),
        audio_config=dict(SOUNDS, subsampling_conv_channels=[4, 2], output_proj_dims=16),
    ),
    "qwen3_vl": lambda: hf.Qwen3VLConfig(
        text_config=dict(TEXT, head_dim=8, rope_parameters=MROPE | dict(mrope_interleaved=True)),
        vision_config=dict(QWEN, deepstack_visual_indexes=[0]),
    ),
    "mistral3": lambda: hf.Mistral3Config(
        text_config=dict(TEXT, model_type="mistral", head_dim=8, sliding_window=None),
        vision_config=dict(IMAGES, model_type="pixtral", head_dim=8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*only the text part is loaded")
def test_texts_have_transformers_logits_and_go_back_as_a_text_model(name, tmp_path):
    torch.manual_seed(0)
    theirs = hf.AutoModelForImageTextToText.from_config(MODELS[name](), attn_implementation="eager")
    theirs = theirs.float().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_model(tmp_path / "theirs")
    tokens = np.arange(12)[None] * 7 % 50 + 3
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    run = jax.jit(lambda params: model.apply({"params": params}, tokens).logits)
    np.testing.assert_allclose(run(params), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    save_model(tmp_path / "ours", model, params)
    opened = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert opened.config.model_type == model.config.family
    with torch.no_grad():
        found = opened(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_experts_of_a_layer_in_one_tensor_are_read(tmp_path):
    """Qwen3.5's own files have them so; transformers writes, and reads, one tensor for each expert too."""
    theirs = hf.AutoModelForCausalLM.from_config(hf.Qwen3_5MoeConfig(**WHOLE).text_config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "apart")
    theirs.config.save_pretrained(tmp_path / "joined")
    names = {n: n.replace("model.", "model.language_model.", 1) for n in theirs.state_dict()}
    tensors = {names[n]: p.numpy() for n, p in theirs.state_dict().items()}
    save_file(tensors | {"mtp.norm.weight": tensors[names["model.norm.weight"]]},
              tmp_path / "joined" / "model.safetensors")  # fmt: skip
    _, apart = load_model(tmp_path / "apart")
    _, joined = load_model(tmp_path / "joined")
    chex.assert_trees_all_equal(joined, apart)


def test_rotary_parameters_of_images_mean_those_of_texts():
    file = {"model_type": "qwen3_5_text"} | STATES
    plain = {k: v for k, v in STATES["rope_parameters"].items() if not k.startswith("mrope")}
    assert config_of(file) == config_of(file | {"rope_parameters": plain})


def test_it_is_said_and_early_files_are_read():
    early = TEXT | dict(
        model_type="qwen3_vl", tie_word_embeddings=True, vision_config={},
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="qwen3_vl: only the text part is loaded, a qwen3"):
        config = config_of(early)
    plain = {k: v for k, v in early.items() if k not in ("vision_config", "rope_scaling")}
    assert config == config_of(plain | {"model_type": "qwen3"})
    with pytest.raises(CheckpointError, match="text_config is 3, expected an object"):
        config_of(json.loads('{"model_type": "gemma3", "text_config": 3}'))
