"""Exchanged bytes and memory of a real step on devices that are not here."""

import dataclasses
import json
import math
import re
import runpy
import sys
from typing import get_args

import jax
import pytest

import jaxft.compile as compile_module
from benchmarks import scale
from experiments.lab import sources
from jaxft.models import config_of, family_of
from jaxft.models.presets import PRESETS
from jaxft.parallel import mesh_context
from jaxft.parallel.compiled import exchanged_bytes
from jaxft.train import bounds
from jaxft.train.ahead import EXPERIENCE, Name
from tests.aot import run_aot

SMALL = dict(
    model_type="llama", vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
    rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=512,
)  # fmt: skip


ENCODER = dict(
    model_type="roberta", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, max_position_embeddings=34, type_vocab_size=1, pad_token_id=1,
)  # fmt: skip
DECODER = SMALL | dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16,
)  # fmt: skip
PALIGEMMA = dict(
    model_type="paligemma", image_token_index=63, projection_dim=32,
    text_config=DECODER | dict(model_type="gemma", tie_word_embeddings=True),
    vision_config=dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, image_size=16, patch_size=4,
    ),
)  # fmt: skip
QWEN_VL = DECODER | dict(
    model_type="qwen2_5_vl", image_token_id=63,
    rope_scaling=dict(type="mrope", mrope_section=[4, 2, 2]), vision_config=dict(
        depth=1, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32,
        fullatt_block_indexes=[0], window_size=16,
    ),
)  # fmt: skip
KEY = jax.random.key(0)
# Settings that are refused once devices are known, and why.
REFUSED = [
    (dict(topology="h100:8", fsdp=3), "does not fill 8 devices"),
    (dict(topology="h100:8", context=2, length=9), "--length 9 must be a multiple of --context 2"),
    (dict(topology="h100:8", objective="grpo", response=9, length=9), "must lie below --length 9"),
    (
        dict(topology="h100:8", share_prompts=4),
        "--share-prompts 4 needs --objective grpo, ppo, nft",
    ),
    (dict(topology="h100:8", objective="dpo", model="roberta-base"), "dpo needs a language model"),
    (dict(topology="h100:8", objective="classify"), "classify needs an encoder of text"),
    (dict(topology="h100:8", media=1), "--media 1 needs a model that reads images or sounds"),
    (dict(topology="h100:8", model="paligemma-3b", media=-1), "at least 1 of them"),
    (
        dict(topology="h100:8", model="paligemma-3b", media=1, objective="grpo", share_prompts=2),
        "--share-prompts needs --media 0",
    ),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Figures of LoRA and of full fine-tuning on eight H100s, sharded by FSDP."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(SMALL))
    return run_aot(
        f"""
        import json
        from jaxft.compile import Config, compile_step
        run = lambda adapter, **more: compile_step(
            Config(
                model={str(path)!r}, adapter=adapter, topology="h100:8", length=256, rank=8, **more
            )
        )
        figures = {{name: run(name) for name in ("lora", "full")}}
        figures["context"] = run("lora", fsdp=4, context=2)
        figures["grpo"] = run("lora", objective="grpo", response=64)
        figures["refused"] = []
        for config in {[config for config, _ in REFUSED]!r}:
            try:
                compile_step(Config(**config))
            except ValueError as error:
                figures["refused"].append(str(error))
        from benchmarks.scale import PAPERS
        figures["lion"] = compile_step(PAPERS["lion"])
        print(json.dumps(figures))
        """
    )


def sizes():
    """(kernels of a layer, head) in numbers."""
    layer = 512 * (512 + 256 + 256 + 512) + 3 * 512 * 1024
    return layer, 512 * 4096


def test_fsdp_exchanges_kernels_and_not_activations(figures):
    """Two gathers of the frozen kernels in bfloat16, one of the head, and nothing of the rows' size."""
    layer, head = sizes()
    count = lambda kind: figures["lora"]["collectives"].get(kind, (0, 0))[1]
    ideal = 2 * (2 * 3 * layer + head)
    adapters = 4 * figures["lora"]["trains"]
    assert ideal <= count("all-gather") <= 1.1 * ideal + 4 * adapters
    # Only gradients of the adapters are added up; those of frozen kernels never exist.
    assert count("all-reduce") + count("reduce-scatter") <= 2.5 * adapters


def test_context_adds_keys_and_values_and_moves_no_other_activations(figures):
    layer, head = sizes()
    gathered = lambda name: figures[name]["collectives"]["all-gather"][1]
    # Of two rows, in bfloat16: forward, again for the block, again for the scores. And ids of tokens.
    keys, ids = 2 * (2 * 256 * 4 * 64) * 2, 4 * 2 * 256
    added = gathered("context") - gathered("lora")
    assert 3 * 3 * keys <= added <= 3 * 3 * (keys + ids) + 8 * ids
    hidden = 2 * 256 * 512 * 2
    assert figures["context"]["collectives"]["all-to-all"][1] <= hidden  # the embedded tokens


def test_an_update_of_grpo_exchanges_as_little(figures):
    """The head once more: log-probs keep the direction of their gradient from the forward pass."""
    layer, head = sizes()
    assert figures["grpo"]["fits"]
    sft, grpo = (figures[name]["collectives"]["all-gather"][1] for name in ("lora", "grpo"))
    assert grpo <= sft + 1.1 * 2 * head


def test_full_fine_tuning_scatters_each_gradient_once(figures):
    layer, head = sizes()
    full = figures["full"]["collectives"]
    scattered = full["reduce-scatter"][1] + full["all-reduce"][1]
    # bfloat16 gradients of the layers in shards; the head's in float32, whole, and of the embedding.
    assert scattered <= 1.1 * (2 * 3 * layer / 8 + 2 * 4 * head) + 4 * head
    assert full["all-gather"][1] <= 1.1 * (2 * 2 * 3 * layer + 4 * head) + 4 * head


def test_memory_and_operations(figures):
    layer, head = sizes()
    for name, frozen in (("lora", 2), ("full", 4)):
        found = figures[name]
        assert found["fits"] and found["tokens"] == 2 * 8 * 256
        total = 3 * layer + 2 * head
        state = total * frozen + (2 * total * 4 if name == "full" else 0)
        assert state / 8 <= found["argument_bytes"] <= 1.3 * state / 8 + 2e6
    # Forward, recomputed, and by activations: 2 a parameter and token; training adds one.
    flops = lambda passes, head_passes: 2 * 4096 * (3 * layer * passes + head * head_passes) / 8
    assert figures["lora"]["step_flops"] == flops(3, 2)
    assert figures["full"]["step_flops"] == flops(4, 3)


def test_the_step_of_a_paper_s_full_preset(figures):
    """SmolLM2-135M on one device: LoRA and one momentum train, in float32, and nothing is exchanged."""
    found = figures["lion"]
    assert found["fits"] and found["tokens"] == 16 * 64 and not found["collectives"]
    kernels = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
    norms = 30 * 2 * 576 + 576
    lora = 30 * 8 * ((576 + 576) * 2 + (576 + 192) * 2 + (576 + 1536) * 3)
    assert found["trains"] == lora
    state = 4 * (30 * kernels + 49152 * 576 + norms + 2 * lora)
    assert state <= found["argument_bytes"] <= state + 1e5


@pytest.mark.parametrize(
    "name, group", [*((name, 1) for name in get_args(Name)), *((name, 4) for name in EXPERIENCE)]
)
def test_the_step_of_every_objective_can_be_laid_out_and_traced(name, group, tmp_path):
    """A changed signature, column or tree of params shows here, and not hours into `make scale`."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ENCODER if name == "classify" else DECODER))
    config = compile_module.Config(
        model=str(path), adapter="full", rank=60 if name == "classify" else 4, rows=1, length=16,
        response=8, topology="v5e:2x4", objective=name, share_prompts=group,
    )  # fmt: skip
    step, state, batch, _ = compile_module.lay_out_step(config, jax.devices())
    with mesh_context(batch["tokens"].sharding.mesh):
        after, metrics = jax.eval_shape(step, state, batch)
    assert "loss" in metrics
    assert batch["tokens"].shape == {1: (8, 16), 4: (8, 4, 16)}[group] or name in ("dpo", "hypo")
    kinds = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert kinds(after) == kinds(state)


# Models that read images, with M entries in their columns: one of 4 x 4 patches of 4 pixels, or two squares
# of 2 x 2 patches.
IMAGES = {
    "paligemma": (PALIGEMMA, 1, {"images": (16, 16, 3)}),
    "qwen2_5_vl": (QWEN_VL, 2, {"patches": (4, 48), "places": (4, 3)}),
}


@pytest.mark.parametrize(
    "kind, name, target", [("paligemma", "grpo", "all-linear"), ("qwen2_5_vl", "sft", "language")]
)
def test_the_step_of_a_model_that_reads_images(kind, name, target, tmp_path):
    settings, media, shapes = IMAGES[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    config = compile_module.Config(
        model=str(path), rank=4, rows=1, length=16, response=8, topology="v5e:2x4", objective=name,
        media=media, target=target, remat="dots",
    )  # fmt: skip
    step, state, batch, model = compile_module.lay_out_step(config, jax.devices())
    assert {k: batch[k].shape for k in shapes} == {k: (8, media, *v) for k, v in shapes.items()}
    with mesh_context(batch["tokens"].sharding.mesh):
        after, metrics = jax.eval_shape(step, state, batch)
    assert "loss" in metrics
    frozen = bounds.frozen_towers(model, state.params)
    assert frozen == ({"vision"} if target == "language" else set())
    # A layer has four projections of its width and an MLP; GridVision's is gated, and joins 2 x 2 patches.
    width, inner, tokens = 16, 24, 8 * 16
    if kind == "paligemma":
        numbers = 16 * (48 * width + 4 * width**2 + 2 * width * inner + width * 32)
    else:
        numbers = 8 * (4 * width**2 + 3 * width * inner) + 2 * (64**2 + 64 * 32)
    assert bounds.dense_flops(model.config.towers[0], batch) == 2 * 8 * numbers
    (layer, head), passes = (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48, 64 * 32), 2
    text = 2 * tokens * passes * (3 * layer + head)
    found = bounds.matmul_flops(config, model, tokens, batch, frozen)
    assert found == text + (1 if frozen else passes) * 2 * 8 * numbers
    mesh = dict(batch["tokens"].sharding.mesh.shape)
    moved = lambda config: bounds.ideal_exchanged(config, model, mesh, tokens, frozen)
    vision = 2 * sum(
        math.prod(x.shape)
        for x in jax.tree.leaves(
            jax.eval_shape(model.init, KEY, model.example_input())["params"]["vision"]
        )
    )
    assert moved(config) - moved(dataclasses.replace(config, media=0)) == vision * (
        1 if frozen else 2
    )


@pytest.mark.parametrize("kind", IMAGES)
def test_the_step_on_pairs_about_images_has_them_once_a_pair(kind, tmp_path):
    """All params train except those of the part for images, with --adapter full --target language."""
    settings, media, shapes = IMAGES[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    config = compile_module.Config(
        model=str(path), adapter="full", target="language", rows=1, length=16, topology="v5e:2x4",
        objective="dpo", media=media,
    )  # fmt: skip
    step, state, batch, model = compile_module.lay_out_step(config, jax.devices())
    assert {k: batch[k].shape for k in shapes} == {k: (8, media, *v) for k, v in shapes.items()}
    with mesh_context(batch["tokens"].sharding.mesh):
        _, metrics = jax.eval_shape(step, state, batch)
    assert "loss" in metrics and batch["tokens"].shape == (8, 2, 16)
    assert bounds.frozen_towers(model, state.params) == {"vision"}


def test_presets_that_read_images_have_the_sizes_of_the_checkpoints():
    """Numbers of params as the hub counts them."""
    counts = {"qwen2.5-vl-3b": 3_754_622_976, "qwen2.5-vl-7b": 8_292_166_656}
    for name, count in (counts | {"paligemma-3b": 2_923_466_480}).items():
        config = config_of(PRESETS[name])
        model = family_of(config).module(config, scan_layers=True)
        shapes = jax.eval_shape(model.init, KEY, model.example_input())["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_every_paper_has_a_full_preset_and_a_row_of_its_step():
    scripts = sources.scripts()
    assert set(scale.PAPERS) == set(scripts)
    preset = re.compile(r'preset: Literal\["small", ("\w+", )?"full"\]')
    without = {slug for slug, path in scripts.items() if not preset.search(path.read_text("utf-8"))}
    assert not without
    page = scale.PAGE.read_text("utf-8")
    assert page.endswith(scale.papers_section(scale.papers_lines(page)))


def test_bytes_of_loops_and_halves():
    text = """
body (p: f32[4]) -> f32[4] {
  %g = bf16[8,16]{1,0} all-gather(%x), dimensions={0}
  %s = (f32[2]{0}, f32[16]{0}) all-gather-start(%y), dimensions={0}
  %d = f32[16]{0} all-gather-done(%s)
}

cond (p: f32[4]) -> pred[] {
}

ENTRY main (a: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %r = (f32[10]{0}, bf16[10]{0}) all-reduce(%b, %c), to_apply=%add
  %f = bf16[128,8]{1,0} fusion(%r), kind=kCustom, calls=%all-reduce-scatter.1.clone.1, metadata={}
  %v = (bf16[64,8]{1,0}, u32[], token[]) recv(%t), frontend_attributes={handler="xla_megascale_runtime"}
  %o = bf16[6,8]{1,0} fusion(%v), kind=kLoop, calls=%fused
  %t = bf16[48,8]{1,0} ragged-all-to-all(%o, %z, %i, %n, %j, %m), replica_groups={{0,1}}
  %u = bf16[6,8]{1,0} ragged-all-to-all(%t, %z, %i, %n, %j, %m), replica_groups={{0,1}}
}
"""
    assert exchanged_bytes(text) == {
        "all-gather": (10, 5 * (8 * 16 * 2 + 16 * 4)),
        "all-reduce": (1, 2 * 10 * (4 + 2)),
        "reduce-scatter": (1, 128 * 8 * 2),
        "between slices": (1, 64 * 8 * 2),
        "ragged-all-to-all": (2, 2 * 6 * 8 * 2),  # not the room for the rows of all devices
    }


def test_a_collective_that_overlaps_with_fusions_counts_where_it_starts():
    """XLA:TPU repeats it, with its channel, in each fusion that computes beside it, also in other loops."""
    text = """
start (p: bf16[8,4]) -> (bf16[8,4], bf16[8,64]) {
  %g = bf16[8,64]{1,0} all-gather(%p), channel_id=7, dimensions={1}
  ROOT %c = (bf16[8,4]{1,0}, bf16[8,64]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

beside (p: bf16[8,4]) -> (bf16[8,4], bf16[8,64]) {
  %h = bf16[8,64]{1,0} all-gather(%p), channel_id=7, dimensions={1}
}

body (p: f32[4]) -> f32[4] {
  %f = (bf16[8,4]{1,0}, bf16[8,64]{1,0}) fusion(%p), kind=kCustom, calls=%beside
}

cond (p: f32[4]) -> pred[] {
}

ENTRY main (a: f32[4]) -> f32[4] {
  %async-collective-start.9 = (bf16[8,4]{1,0}, bf16[8,64]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %w = f32[4]{0} while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    assert exchanged_bytes(text) == {"all-gather": (1, 8 * 64 * 2)}
    twice = text.replace(" fusion(%p), kind=kCustom, calls=%beside", " fusion(%p), calls=%start")
    twice = twice.replace("%f = (", "%async-collective-start.2 = (")
    assert exchanged_bytes(twice) == {"all-gather": (6, 6 * 8 * 64 * 2)}


def test_trips_of_a_product_that_gathers_as_it_goes():
    """XLA:TPU's windowed products count in u32, in loops within the loop over layers."""
    text = """
window (p: u32[]) -> u32[] {
  %p = bf16[1,256,16]{1,2,0} collective-permute-done(%s)
}

fewer (p: u32[]) -> pred[] {
  %c = u32[]{:T(128)} constant(7), metadata={}
}

body (p: f32[4]) -> f32[4] {
  %v = u32[] while(%a), condition=%fewer, body=%window
}

cond (p: f32[4]) -> pred[] {
  %n = s32[] constant(3)
}

ENTRY main (a: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%a), condition=%cond, body=%body
}
"""
    assert exchanged_bytes(text) == {"collective-permute": (21, 21 * 256 * 16 * 2)}
    # Unrolled, it counts by two, and so goes round half as often: 4 times for 7.
    by_two = text.replace(
        "  %p = bf16",
        "  %two = u32[] constant(2)\n  %g = u32[] get-tuple-element(%x), index=1\n"
        "  %more = u32[]{:T(128)} add(%g, %two)\n  ROOT %t = (f32[], u32[]) tuple(%f, %more)\n  %p = bf16",
    ).replace("  %c = u32", "  %i = u32[] get-tuple-element(%x), index=1\n  %c = u32")
    assert exchanged_bytes(by_two) == {"collective-permute": (12, 12 * 256 * 16 * 2)}


def test_settings_that_devices_cannot_take_are_refused(figures):
    for said, (_, message) in zip(figures["refused"], REFUSED, strict=True):
        assert message in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "neither a preset (llama3-1b"),
        (["--topology", "v9z:2"], "is not a topology"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(compile_module.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_plain_fsdp_exchanges_two_gathers_and_the_gradients(figures):
    layer, head = sizes()
    everything = (
        3 * layer + 2 * head + 7 * 512
    )  # embedding and head, two norms a layer and the last
    gather = 2 * everything
    assert figures["lora"]["ideal_exchanged_bytes"] == 2 * gather
    assert figures["full"]["ideal_exchanged_bytes"] == 3 * gather
    assert figures["context"]["ideal_exchanged_bytes"] is None
