"""The text parts of models that read images, against transformers' own on texts."""

import json

import jax
import numpy as np
import pytest

from jaxft.checkpoints import CheckpointError, load_model, save_model
from jaxft.models import config_of

hf = pytest.importorskip("transformers")
torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")

TEXT = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
IMAGES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
IMAGES |= dict(image_size=28, patch_size=14)
QWEN = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
MODELS = {
    "gemma3": lambda: hf.Gemma3Config(
        text_config=dict(TEXT, head_dim=8, sliding_window=4), vision_config=IMAGES, mm_tokens_per_image=4
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config=dict(TEXT, rope_parameters=MROPE),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2), tie_word_embeddings=True,
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


def test_it_is_said_and_early_files_are_read():
    early = TEXT | dict(
        model_type="qwen2_vl", tie_word_embeddings=True, vision_config={},
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="qwen2_vl: only the text part is loaded, a qwen2"):
        config = config_of(early)
    plain = {k: v for k, v in early.items() if k not in ("vision_config", "rope_scaling")}
    assert config == config_of(plain | {"model_type": "qwen2"})
    with pytest.raises(CheckpointError, match="text_config is 3, expected an object"):
        config_of(json.loads('{"model_type": "gemma3", "text_config": 3}'))
