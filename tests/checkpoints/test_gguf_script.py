"""merge.py writes GGUF files: the whole model with its tokenizer, or only the adapter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from experiments import merge as script
from experiments.cli import flags
from jaxft.adapters import merge, save_adapter
from jaxft.checkpoints import CheckpointError, load_model, load_tokenizer, save_model
from jaxft.checkpoints.assemble import layer_shapes
from jaxft.checkpoints.tiny import TEMPLATE, byte_tokenizer
from jaxft.models import Decoder, tiny_config
from jaxft.models.special_ids import SpecialIds
from jaxft.weights import Frozen, LoraWeight

CHAT = [{"role": "user", "content": "ab ab 12?"}]


@pytest.fixture
def base(tmp_path):
    """(directory of a model of one layer with its tokenizer, directory of an adapter, merged params)."""
    core = byte_tokenizer().backend_tokenizer
    vocabulary = core.get_vocab(with_added_tokens=False) | {"ab": 259}
    core.model = tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b")])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    config = dataclasses.replace(
        tiny_config(264), num_layers=1, special=SpecialIds(eos=(2, 5)), tie_embeddings=False
    )
    model, draw = Decoder(config), np.random.default_rng(0).standard_normal
    array = lambda *shape: jnp.asarray(0.2 * draw(shape), jnp.float32)
    params = jax.tree.map(lambda leaf: array(*leaf.shape), layer_shapes(model))
    save_model(tmp_path / "base", model, params, tokenizer_from=tokenizer)
    adapted = jax.tree.map(Frozen, params)
    attention, kernel = (tree["layers"]["0"]["attention"]["key"] for tree in (adapted, params))
    kernel = kernel["kernel"]
    attention["kernel"] = LoraWeight(kernel, array(96, 2), array(2, kernel.shape[1]), 4.0)
    save_adapter(tmp_path / "adapter", config, adapted)
    return tmp_path / "base", tmp_path / "adapter", merge(adapted)


def test_merge_script_writes_gguf_files(tmp_path, base, capsys):
    directory, adapter, merged = base
    run = lambda kind, adapter=adapter: script.main(
        script.Config(
            str(adapter), str(tmp_path / "out"), base=flags.Adapted(str(directory)), gguf=kind
        )
    )
    run("lora")
    run("f32", tmp_path / "out/adapter.gguf")
    shown = capsys.readouterr().out
    assert "adapter saved to" in shown and "model.gguf; read again: largest logit diff" in shown
    model, loaded = load_model(tmp_path / "out/model.gguf")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, merged)
    assert model.config.special.ends == (2, 5)
    ours, theirs = (load_tokenizer(p) for p in (directory, tmp_path / "out/model.gguf"))
    texts = [
        t.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"] for t in (ours, theirs)
    ]
    assert texts[0] == texts[1] and 259 in texts[0]


def test_merge_script_refuses_before_work(tmp_path):
    config = script.Config("no such adapter", str(tmp_path), base=flags.Adapted("tiny"), gguf="f16")
    with pytest.raises(CheckpointError, match="the tokenizer has no merges"):
        script.main(config)
