"""A family from outside: one record, and all that loads, saves, shards and adapts reads it."""

import dataclasses
import json
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxft.adapters import (
    adapt,
    apply_named,
    count,
    intrinsic,
    intrinsic_apply,
    load_adapter,
    partition,
    prompt,
    save_adapter,
    save_checked,
    save_intrinsic,
)
from jaxft.checkpoints import CheckpointError, load_model, model_shapes, save_merged, save_model
from jaxft.models import (
    FAMILIES,
    Decoder,
    Entry,
    Family,
    HuggingFace,
    Prediction,
    Targets,
    layers_of,
    stack_layers,
    tiny_config,
    unstack_layers,
)
from jaxft.models.layers import Dense, Embed
from jaxft.objectives import supervised
from jaxft.parallel import make_mesh, param_shardings
from jaxft.train import muon_axes, state_bytes
from tests.small_models import trained


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """A residual network over single tokens."""

    vocab_size: int
    width: int
    depth: int
    family: str = "toy"


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _=None):
        return x + Dense(self.width, name="narrow")(
            nn.relu(Dense(2 * self.width, name="wide")(x))
        ), None


class Trunk(nn.Module):
    config: ToyConfig
    stacked: bool

    @nn.compact
    def __call__(self, x):
        config = self.config
        if self.stacked:
            scan = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=config.depth)
            return scan(config.width, name="blocks")(x, None)[0]
        return Blocks(config, name="blocks")(x)


class Blocks(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, x):
        for i in range(self.config.depth):
            x, _ = Block(self.config.width, name=str(i))(x)
        return x


class Output(NamedTuple):
    hidden: jax.Array
    logits: jax.Array


class Toy(nn.Module):
    config: ToyConfig
    dtype: Any = jnp.float32
    scan_layers: bool = False

    @nn.compact
    def __call__(self, tokens):
        trunk = self.variables.get("params", {}).get("trunk")
        stacked = self.scan_layers if trunk is None else "0" not in trunk["blocks"]
        x = Embed(self.config.vocab_size, self.config.width, name="table")(tokens, self.dtype)
        x = Trunk(self.config, stacked, name="trunk")(x)
        logits = Dense(self.config.vocab_size, name="readout")(x)
        return Output(x, logits.astype(jnp.float32))

    def example_input(self):
        return jnp.zeros((1, 1), jnp.int32)

    def forward(self, params, batch, key=None):
        hidden = self.apply({"params": params}, batch["tokens"]).hidden
        return Prediction(hidden, params["readout"]["kernel"])


def entries(config):
    result = [Entry("tok.weight", ("table/embedding",))]
    for i in range(config.depth):
        for theirs, ours in (("fc_in", "wide"), ("fc_out", "narrow")):
            path = f"trunk/blocks/{i}/{ours}/kernel"
            result.append(Entry(f"h.{i}.{theirs}.weight", (path,), transposed=True))
    return [*result, Entry("out_proj.weight", ("readout/kernel",), transposed=True)]


TOY = Family(
    name="toy",
    module=Toy,
    huggingface=HuggingFace(
        architecture="ToyModel",
        read=lambda json, names: ToyConfig(json["vocab"], json["width"], json["depth"]),
        write=lambda c: {"vocab": c.vocab_size, "width": c.width, "depth": c.depth},
        reads=frozenset({"vocab", "width", "depth"}),
        entries=entries,
        rename=lambda name: name.removeprefix("toy."),
        ignores=lambda name, config: name.endswith(".mask"),
        head="out_proj",
    ),
    layers="trunk/blocks",
    targets=Targets(linear=r"trunk/blocks/(\d+/)?(wide|narrow)/kernel"),
    rules=(
        (r".*/wide/kernel", PartitionSpec("fsdp", "tensor")),
        (r".*/narrow/kernel", PartitionSpec("tensor", "fsdp")),
    ),
)
KNOWN = (*FAMILIES, TOY)
PLACES = dict(targets=TOY.targets, layers=TOY.layers, stacked=TOY.stacked_axes)
CONFIG = ToyConfig(vocab_size=24, width=8, depth=3)
TOKENS = jnp.arange(6)[None]


@pytest.fixture
def folder(tmp_path):
    """A directory as another program would have written it: a prefix, a buffer, [out, in]."""
    rng, width = np.random.default_rng(0), CONFIG.width
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tensors = {"toy.tok.weight": make(24, width), "toy.out_proj.weight": make(24, width)}
    for i in range(CONFIG.depth):
        tensors[f"toy.h.{i}.fc_in.weight"] = make(2 * width, width)
        tensors[f"toy.h.{i}.fc_out.weight"] = make(width, 2 * width)
        tensors[f"toy.h.{i}.mask"] = make(1)
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"vocab": 24, "width": width, "depth": CONFIG.depth}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy", **sizes}))
    return tmp_path, tensors


def by_hand(tensors):
    """The logits, computed from the file."""
    x = tensors["toy.tok.weight"][np.asarray(TOKENS)]
    for i in range(CONFIG.depth):
        up = np.maximum(x @ tensors[f"toy.h.{i}.fc_in.weight"].T, 0)
        x = x + up @ tensors[f"toy.h.{i}.fc_out.weight"].T
    return x @ tensors["toy.out_proj.weight"].T


@pytest.mark.parametrize("scan_layers", [False, True])
def test_it_is_loaded_and_saved(folder, scan_layers, tmp_path_factory):
    path, tensors = folder
    with pytest.raises(CheckpointError, match="model_type is 'toy'"):
        load_model(path)
    model, params = load_model(path, scan_layers=scan_layers, families=KNOWN)
    assert isinstance(model, Toy) and model.config == CONFIG
    logits = TOY.forward(model, params, {"tokens": TOKENS}).logits
    chex.assert_trees_all_close(np.asarray(logits), by_hand(tensors), rtol=1e-4, atol=2e-4)
    shapes = model_shapes(path, scan_layers=scan_layers, families=KNOWN)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
    other = tmp_path_factory.mktemp("again")
    save_model(other, model, params, families=KNOWN)
    saved = {
        f"toy.{name}": tensor for name, tensor in load_file(other / "model.safetensors").items()
    }
    chex.assert_trees_all_equal(saved, {n: t for n, t in tensors.items() if "mask" not in n})
    config = json.loads((other / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("toy", ["ToyModel"])
    chex.assert_trees_all_equal(
        load_model(other, scan_layers=scan_layers, families=KNOWN)[1], params
    )
    with pytest.raises(CheckpointError, match="model_type is 'toy'"):
        save_model(other, model, params)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_it_is_sharded_by_its_own_rules(folder, scan_layers):
    mesh = make_mesh(fsdp=4, tensor=2)
    path, tensors = folder
    model, params = load_model(path, mesh=mesh, scan_layers=scan_layers, families=KNOWN)
    blocks = params["trunk"]["blocks"]
    block = blocks if scan_layers else blocks["1"]
    stack = (None,) if scan_layers else ()
    assert block["wide"]["kernel"].sharding.spec == PartitionSpec(*stack, "fsdp", "tensor")
    assert block["narrow"]["kernel"].sharding.spec == PartitionSpec(*stack, "tensor", "fsdp")
    assert params["table"]["embedding"].sharding.is_fully_replicated  # no rule names it
    logits = jax.jit(model.apply)({"params": params}, TOKENS).logits
    chex.assert_trees_all_close(np.asarray(logits), by_hand(tensors), rtol=1e-4, atol=2e-4)
    adapted = apply_named(params, "lora", rank=2, **PLACES)
    specs = param_shardings(adapted, mesh, TOY.rules, TOY.layers)
    lora = (specs["trunk"]["blocks"] if scan_layers else specs["trunk"]["blocks"]["1"])["wide"]
    assert lora["kernel"].a.spec == PartitionSpec(*stack, "fsdp", None)
    assert lora["kernel"].b.spec == PartitionSpec(*stack, None, "tensor")


@pytest.mark.parametrize("scan_layers", [False, True])
def test_all_linear_and_pefts_names_are_its_own(folder, scan_layers, tmp_path_factory):
    path, _ = folder
    model, params = load_model(path, scan_layers=scan_layers, families=KNOWN)
    adapted = trained(apply_named(params, "lora", rank=2, target="all-linear", **PLACES))
    assert count(adapted)[0] == CONFIG.depth * 2 * 2 * (8 + 16)
    out = tmp_path_factory.mktemp("adapter")
    save_checked(out, model, adapted, params, families=KNOWN)
    names = load_file(out / "adapter_model.safetensors")
    assert len(names) == CONFIG.depth * 4
    assert names["base_model.model.h.2.fc_in.lora_A.weight"].shape == (2, 8)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["fc_in", "fc_out"]
    again = load_adapter(out, model.config, params, families=KNOWN)
    chex.assert_trees_all_equal(partition(again)[0], partition(adapted)[0])
    # PEFT's "all-linear" leaves the output projection out, whatever its name.
    (out / "adapter_config.json").write_text(
        json.dumps(settings | {"target_modules": "all-linear"})
    )
    again = load_adapter(out, model.config, params, families=KNOWN)
    chex.assert_trees_all_equal(partition(again)[0], partition(adapted)[0])
    difference = save_merged(tmp_path_factory.mktemp("merged"), model, adapted, families=KNOWN)
    assert difference.largest <= 1e-5 * difference.scale


def test_an_objective_reads_its_forward(folder):
    path, tensors = folder
    model, params = load_model(path, families=KNOWN)
    adapted = apply_named(params, "lora", rank=2, **PLACES)
    loss, _ = jax.jit(supervised(model.forward))(adapted, {"tokens": TOKENS}, None)
    log_probs = jax.nn.log_softmax(by_hand(tensors)[0, :-1])
    expected = -np.mean(np.take_along_axis(log_probs, np.asarray(TOKENS)[0, 1:, None], axis=1))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_stacking_finds_layers_that_lie_deeper():
    params = Toy(CONFIG).init(jax.random.key(0), TOKENS)["params"]
    stacked = stack_layers(params, TOY.layers)
    assert stacked["trunk"]["blocks"]["wide"]["kernel"].shape == (3, 8, 16)
    chex.assert_trees_all_equal(unstack_layers(stacked, TOY.layers), params)
    chex.assert_trees_all_equal(stack_layers(stacked, TOY.layers), stacked)
    with pytest.raises(ValueError, match="no layers at 'layers'; params hold"):
        stack_layers(params)


def test_its_stacked_layers_have_the_subspace_of_separate_ones(folder, tmp_path_factory):
    path, _ = folder
    model, params = load_model(path, families=KNOWN)
    moved = trained(intrinsic(jax.random.key(2), params, 20, layers=TOY.layers))
    assert moved.lam.shape == (2 + 2 * CONFIG.depth,)
    out = tmp_path_factory.mktemp("intrinsic")
    save_intrinsic(out, moved)
    expected = jax.jit(intrinsic_apply)(moved)
    stacked = stack_layers(params, TOY.layers)
    again = load_adapter(out, model.config, stacked, families=KNOWN)
    chex.assert_trees_all_close(again, stack_layers(expected, TOY.layers), rtol=1e-6)


def test_what_reads_stacked_layers_is_told_where_they_lie():
    """Bytes of a run, matrices of muon and virtual tokens; of a sampler the model's own record."""
    shapes = jax.eval_shape(Toy(CONFIG, scan_layers=True).init, jax.random.key(0), TOKENS)["params"]
    mesh, place = make_mesh(fsdp=4, tensor=2), (TOY.rules, TOY.layers)
    blocks = 2 * CONFIG.depth * 8 * 16 * 4  # two kernels a block, each in 8 parts
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes)) - blocks + blocks // 8
    assert state_bytes(shapes, None, mesh, *place) == {"weights": weights}
    axes = muon_axes(shapes, TOY.layers)["trunk"]["blocks"]["wide"]["kernel"]
    assert (axes.reduction_axis, axes.output_axis) == (1, 2)

    layer = lambda width: {"attention": {"key": {"kernel": jnp.ones((3, 8, width))}}}
    params = {"table": {"embedding": jnp.ones((24, 8))}, "trunk": {"blocks": layer(4)}}
    made = apply_named(params, "prefix", rank=5, **PLACES)["prefix"]
    assert made.shape == (5, 3 * 2 * 4)
    rules = {"prompt": prompt(2, embedding="table/embedding")}
    assert adapt(jax.random.key(0), params, rules)["prompt"].shape == (2, 8)
    with pytest.raises(ValueError, match="prompt: .*, where 'embed/embedding' or .* must be"):
        adapt(jax.random.key(0), params, {"prompt": prompt(2)})

    mine = Decoder(dataclasses.replace(tiny_config(), family="mine"))
    assert layers_of(mine) == "layers" and layers_of(Toy(CONFIG)) is None


def test_a_head_that_trains_is_saved_whole(folder, tmp_path_factory):
    """The embedding of a model with a separate output projection is not tied."""
    path, _ = folder
    model, params = load_model(path, families=KNOWN)
    adapted = apply_named(params, "lora", rank=2, **PLACES)
    adapted["table"]["embedding"] = adapted["table"]["embedding"].value
    out = tmp_path_factory.mktemp("adapter")
    save_adapter(out, model.config, adapted, families=KNOWN)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["tok"]
