"""Damaged, surplus, foreign and sharded files; bfloat16; meshes."""

import functools
import json
import math
import operator
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.adapters import ALL_LINEAR, adapt, combine, lora, merge, partition
from jaxft.checkpoints import (
    CheckpointError,
    load_model,
    model_shapes,
    models,
    open_model,
    save_model,
)
from jaxft.checkpoints.assemble import disassemble
from jaxft.checkpoints.tensor_files import open_tensors, save_tensors
from jaxft.models import Decoder, config_of, family_of, tiny_config
from jaxft.parallel import make_mesh
from tests.small_models import start


@pytest.fixture
def saved(tmp_path):
    model = Decoder(tiny_config(vocab_size=64))
    params = start(model)
    save_model(tmp_path, model, params)
    return tmp_path, model, params


def rewrite(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_surplus_and_misshapen_tensors_are_named(saved):
    path, *_ = saved
    rewrite(path, lambda t: t.update(extra=np.zeros(2, np.float32)))
    with pytest.raises(CheckpointError, match="surplus tensor 'model.extra'"):
        load_model(path)
    rewrite(path, lambda t: (t.pop("extra"), t.pop("model.layers.1.mlp.up_proj.weight")))
    with pytest.raises(CheckpointError, match="missing tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_model(path)
    rewrite(path, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((2, 3), "f4")}))
    with pytest.raises(CheckpointError, match=r"up_proj.weight' has shape \(2, 3\).*\(256, 96\)"):
        load_model(path)


def test_a_tied_output_projection_must_equal_the_embeddings(saved):
    path, _, params = saved
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    chex.assert_trees_all_equal(load_model(path)[1], params)
    rewrite(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(
        CheckpointError, match="lm_head.weight and model.embed_tokens.weight differ"
    ):
        load_model(path)


def test_truncated_file_pickle_and_unknown_architecture(saved):
    path, *_ = saved
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(path)
    file.rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights, which jaxft never loads"):
        load_model(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="model_type is 'mamba'; supported: llama"):
        load_model(path)
    with pytest.raises(CheckpointError, match="no such model"):
        load_model(path / "nowhere")


def test_shards_with_index(saved, tmp_path_factory):
    path, model, params = saved
    other = tmp_path_factory.mktemp("sharded")
    entries = family_of(model.config).huggingface.entries(model.config)
    save_tensors(other, disassemble(entries, params), shard_bytes=200_000)
    assert len(list(other.glob("model-*-of-*.safetensors"))) > 1
    chex.assert_trees_all_equal(open_tensors(other), open_tensors(path))
    (other / "config.json").write_text((path / "config.json").read_text())
    chex.assert_trees_all_equal(load_model(other)[1], params)


def test_bfloat16_survives(saved, tmp_path_factory):
    _, model, params = saved
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    other = tmp_path_factory.mktemp("half")
    save_model(other, model, half)
    assert json.loads((other / "config.json").read_text())["torch_dtype"] == "bfloat16"
    chex.assert_trees_all_equal(load_model(other)[1], half)


def test_a_saved_model_keeps_its_config_json(saved, tmp_path_factory):
    path, *_ = saved
    config = json.loads((path / "config.json").read_text()) | {"my_note": "kept", "pad_token_id": 3}
    del config["rope_scaling"], config["mlp_bias"]
    (path / "config.json").write_text(json.dumps(config))
    other = tmp_path_factory.mktemp("kept")
    save_model(other, *load_model(path))
    assert json.loads((other / "config.json").read_text()) == config


def test_adapted_params_are_saved_merged(saved, tmp_path_factory):
    _, model, params = saved
    trainable, frozen = partition(adapt(jax.random.key(1), params, {ALL_LINEAR: lora(4)}))
    adapted = combine(jax.tree.map(lambda leaf: leaf + 0.1, trainable), frozen)
    other = tmp_path_factory.mktemp("merged")
    save_model(other, model, adapted)
    chex.assert_trees_all_equal(load_model(other)[1], merge(adapted))


def test_loading_straight_into_shards(saved):
    path, model, params = saved
    mesh = make_mesh(fsdp=4, tensor=2)
    for scan_layers in (False, True):
        _, sharded = load_model(path, mesh=mesh, scan_layers=scan_layers)
        kernel = jax.tree.leaves(sharded["layers"])[0]
        query = sharded["layers"]["attention" if scan_layers else "0"]
        query = (query if scan_layers else query["attention"])["query"]["kernel"]
        assert query.addressable_shards[0].data.shape[-2:] == (24, 48), kernel.sharding
        logits = model.apply({"params": sharded}, jnp.arange(6)[None]).logits
        expected = model.apply({"params": params}, jnp.arange(6)[None]).logits
        chex.assert_trees_all_close(np.asarray(logits), np.asarray(expected), atol=1e-5)


class Recorder:
    """A tensor of a file that keeps the sizes of what was asked of it."""

    def __init__(self, tensor):
        self.tensor, self.sizes = tensor, []
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __getitem__(self, index):
        part = self.tensor[index]
        self.sizes.append(part.size)
        return part


GPT2 = config_of(
    {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64}
    | {"vocab_size": 64}
)


@pytest.mark.parametrize("config", [tiny_config(vocab_size=64), GPT2])  # GPT-2: 3 leaves a tensor
@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_host_reads_a_shard_of_a_layer_at_a_time(tmp_path, config, scan_layers):
    model = Decoder(config)
    save_model(tmp_path, model, start(model))
    opened = open_model(tmp_path)
    expected = load_model(opened, scan_layers=scan_layers)[1]
    records = {entry.name: Recorder(opened.read(entry)) for entry in opened.entries}
    opened = opened._replace(read=lambda entry: records[entry.name])
    mesh = make_mesh(fsdp=4, tensor=2)
    _, sharded = load_model(opened, mesh=mesh, scan_layers=scan_layers, dtype=jnp.bfloat16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), expected)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, sharded), jax.tree.map(np.asarray, half))
    for entry in opened.entries:
        for path in entry.paths:
            stacked = scan_layers and path.startswith("layers/")
            name = re.sub(r"layers/\d+", "layers", path) if stacked else path
            leaf = functools.reduce(operator.getitem, name.split("/"), sharded)
            shard = leaf.sharding.shard_shape(leaf.shape)[1 if stacked else 0 :]
            assert set(records[entry.name].sizes) == {math.prod(shard)}, path
            assert len(leaf.addressable_shards) == 8
        # Each part once, also where several devices hold it.
        total = sum(records[entry.name].sizes)
        assert total == records[entry.name].tensor.size, entry.name


def test_files_are_opened_once_for_shapes_and_values(saved, monkeypatch):
    path, _, params = saved
    opened = open_model(path)
    monkeypatch.setattr(models, "resolve", pytest.fail)
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert shapes(model_shapes(opened)) == shapes(params)
    chex.assert_trees_all_equal(load_model(opened)[1], params)
    assert shapes(load_model(open_model("tiny"))[1]) == shapes(model_shapes(open_model("tiny")))


def test_shapes_are_told_from_headers_alone(saved, monkeypatch):
    path, _, _ = saved

    def halve(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)

    rewrite(path, halve)
    describe = lambda leaf: (leaf.shape, leaf.dtype)
    loaded = [jax.tree.map(describe, load_model(path, scan_layers=s)[1]) for s in (False, True)]
    monkeypatch.setattr(models, "assemble", pytest.fail)
    shapes = [jax.tree.map(describe, model_shapes(path, scan_layers=s)) for s in (False, True)]
    assert shapes == loaded and shapes[0]["final_norm"]["scale"][1] == np.float16
    assert jax.tree.leaves(model_shapes("tiny", dtype=jnp.bfloat16))[0].dtype == jnp.bfloat16
