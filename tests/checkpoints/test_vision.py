"""Models that read images against transformers': logits, gradients, caches, files and adapters."""

import dataclasses
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image

from jaxft import data
from jaxft.adapters import adapt, combine, full, load_adapter, lora, merge, partition, save_adapter
from jaxft.adapters.peft.model import model_of
from jaxft.checkpoints import CheckpointError, load_model, save_model
from jaxft.checkpoints.assemble import disassemble
from jaxft.data import readers
from jaxft.generation import SamplingConfig, generate
from jaxft.models import FAMILIES, config_of, family_of, stack_layers
from jaxft.models.family import find_family
from jaxft.models.hf_keys import NO_EFFECT
from jaxft.models.hf_vision import ragged_positions
from jaxft.models.idefics3 import record as idefics3
from jaxft.models.llava import record as llava
from jaxft.models.paligemma import record as paligemma
from jaxft.models.prefixes import prefix_of
from jaxft.models.qwen2_5_vl import record as qwen2_5_vl
from jaxft.models.qwen2_vl import record as qwen2_vl
from jaxft.objectives import supervised
from tests import vision_models

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")
pil_clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

# Images of two samples: one wide that is split, and two, of which one is split into four.
SIZES = [[(9, 30)], [(16, 16), (40, 37)]]
SMOLVLM = vision_models.smolvlm_json(300, 290)


@pytest.fixture(scope="module", params=["smolvlm", "paligemma2", "qwen2_5_vl", "llava"])
def pair(request, tmp_path_factory):
    """(torch model, directory of its files, our model, our params)."""
    path = tmp_path_factory.mktemp(request.param)
    theirs = vision_models.write(path, request.param)
    return theirs, path, *load_model(path)


@pytest.fixture(scope="module")
def parts(pair):
    """The two samples, rendered with the files' own processor."""
    path = pair[1]
    renderer = renderer_of(path)
    image = lambda size: {"type": "image", "image": vision_models.image(sum(size), *size)}
    rows = [
        {"messages": [
            {"role": "user", "content": [*map(image, sizes), {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "A cat."},
        ]}
        for sizes in SIZES
    ]  # fmt: skip
    return data.render([data.normalise(row) for row in rows], renderer, 512)


def renderer_of(path):
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    return data.Renderer(tokenizer, media=data.media_readers(path, tokenizer))


def rows(parts, together=False):
    """A batch in which each sample has a row and, if `together`, both have one more."""
    packs = [[part] for part in parts] + [list(parts)] * together
    width = max(sum(len(part.tokens) for part in pack) for pack in packs)
    made = [data.batching.padded_row(pack, width) for pack in packs]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    shown = [[one for part in pack for one in part.media] for pack in packs]
    return batch | data.media_columns(shown, shown[0])


def pictures(batch):
    """The columns of the images."""
    return {name: batch[name] for name in ("images", "patches", "places") if name in batch}


def grid_inputs(theirs, batch):
    """Those of Qwen2.5-VL: patches of two equal frames, and rows and columns of each image."""
    there = batch["places"][..., 0, 0] > 0
    patches, places = batch["patches"][there], batch["places"][there]
    patches = patches.reshape(-1, 3, 1, 16).repeat(2, axis=2).reshape(len(patches) * 4, -1)
    places = places.reshape(-1, 3)
    image = np.cumsum((places[:, :2] == 1).all(axis=1))
    grid = [[1, *places[image == i, :2].max(axis=0)] for i in range(1, image[-1] + 1)]
    kinds = (batch["tokens"] == theirs.config.image_token_id).astype(int)
    return dict(
        pixel_values=torch.tensor(patches),
        image_grid_thw=torch.tensor(np.array(grid)),
        mm_token_type_ids=torch.tensor(kinds),
    )


def inputs(theirs, batch):
    """The arguments of a torch model."""
    if theirs.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        mask = torch.tensor((batch["segment_ids"] > 0).astype(int))
        own = dict(input_ids=torch.tensor(batch["tokens"]).long(), attention_mask=mask)
        return own | grid_inputs(theirs, batch)
    pixels = torch.tensor(np.moveaxis(batch["images"], -1, -3))
    mask = torch.tensor((batch["segment_ids"] > 0).astype(int))
    given = dict(
        input_ids=torch.tensor(batch["tokens"]).long(), attention_mask=mask, pixel_values=pixels
    )
    if theirs.config.model_type not in ("paligemma", "llava"):
        return given
    pixels = pixels.flatten(0, 1)
    answer = np.cumsum(batch.get("loss_mask", np.zeros(batch["tokens"].shape)) > 0, axis=1) > 0
    real = pixels.abs().sum((1, 2, 3)) > 0
    kinds = dict(token_type_ids=torch.tensor(answer.astype(int)))
    kinds = kinds if theirs.config.model_type == "paligemma" else {}
    return given | dict(pixel_values=pixels[real]) | kinds


def chosen(model, params, target):
    """The names of the torch modules of a target's kernels."""
    family = family_of(model.config)
    pattern = re.compile(family.targets.pattern(target))
    linears = model_of(family, model.config, params).linears
    return {x.name for x in linears if all(map(pattern.fullmatch, x.paths))}


def close(ours, theirs, share=1e-4):
    theirs = np.asarray(theirs)
    chex.assert_trees_all_close(np.asarray(ours), theirs, rtol=0, atol=share * np.abs(theirs).max())


@pytest.fixture(scope="module")
def found(pair, parts):
    """(gradients, logits) by one program of a row for each sample and a row of both: each is there twice."""
    _, _, model, params = pair
    batch = jax.tree.map(jnp.asarray, rows(parts, together=True))

    def loss(params):
        prediction = model.forward(params, batch)
        objective = supervised(lambda *_, **__: prediction)
        return objective(params, batch, None)[0], prediction.logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def wanted(pair, parts):
    """(logits of each sample, gradients) of the torch model."""
    theirs, batch = pair[0], rows(parts)
    labels = torch.tensor(np.where(batch["loss_mask"] > 0, batch["tokens"], -100).astype(np.int64))
    theirs.zero_grad()
    out = theirs(**inputs(theirs, batch), labels=labels)
    out.loss.backward()
    logits = [
        row[: len(part.tokens)].detach().numpy()
        for row, part in zip(out.logits, parts, strict=True)
    ]
    return logits, {
        name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None
    }


def test_logits_of_padded_and_packed_rows(parts, found, wanted):
    *padded, packed = found[1]
    for row, logits in zip(padded, wanted[0], strict=True):
        close(row[: len(logits)], logits)
    close(packed, np.concatenate(wanted[0]))


@pytest.mark.parametrize("kind", ["idefics3", "paligemma", "llava_full", "qwen2_vl"])
def test_other_models_of_the_same_modules(kind, tmp_path):
    theirs = vision_models.write(tmp_path, kind)
    model, params = load_model(tmp_path)
    image = {"type": "image", "image": vision_models.image(0, 9, 30)}
    row = data.normalise({"messages": [
        {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "A cat."},
    ]})  # fmt: skip
    batch = rows(data.render([row], renderer_of(tmp_path), 512))
    with torch.no_grad():
        expected = theirs(**inputs(theirs, batch)).logits
    close(jax.jit(lambda p: model.forward(p, batch).logits)(params), expected)
    save_model(tmp_path / "ours", model, params)
    chex.assert_trees_all_equal(load_model(tmp_path / "ours")[1], params)
    reopened = type(theirs).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(reopened[name], x) for name, x in theirs.state_dict().items())
    every = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert chosen(model, params, "all-linear") == every


def test_gradients_of_text_projection_and_vision(pair, found, wanted):
    _, _, model, _ = pair
    entries = family_of(model.config).huggingface.entries(model.config)
    ours = dict(disassemble(entries, found[0]))
    unused = {name for name in ours if name not in wanted[1]}  # after the layer that is read
    assert not unused if model.config.family != "llava" else len(unused) == 18
    assert set(wanted[1]) == set(ours) - unused and not any(ours[name].any() for name in unused)
    for name, gradient in wanted[1].items():
        scale = max(np.abs(gradient).max(), 1e-3)
        chex.assert_trees_all_close(ours[name], gradient, rtol=0, atol=3e-4 * scale)


def test_a_sampler_answers_as_transformers_does(pair, parts):
    theirs, path, model, params = pair
    prompts = [part.tokens[: int(np.argmax(part.loss_mask > 0))] for part in parts]
    columns = pictures(rows(parts))
    greedy = SamplingConfig(6, temperature=0.0)
    out = generate(
        model, params, [p.tolist() for p in prompts], jax.random.key(0), greedy, columns=columns
    )
    for i, prompt in enumerate(prompts):
        own = {name: column[i : i + 1] for name, column in columns.items()}
        own |= {"tokens": prompt[None], "segment_ids": np.ones((1, len(prompt)))}
        given = inputs(theirs, own)
        # No sampler of ours writes the token of an image.
        never = {"suppress_tokens": [tower.token for tower in model.config.towers]}
        more = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        answer = theirs.generate(**given, **more, **never)
        assert out.tokens[i].tolist() == answer[0, len(prompt) :].tolist()


def test_it_is_the_image_that_is_read(pair, parts, found):
    _, _, model, params = pair
    batch = rows(parts)
    name, *_ = pictures(batch)
    run = jax.jit(lambda pictures: model.forward(params, batch | pictures).logits)
    other = run(pictures(batch) | {name: -batch[name]})[1]
    there = batch["segment_ids"][1] > 0
    assert np.abs(np.asarray(other - found[1][1, : len(other)]))[there].max() > 0.1
    enough = sum(one.reader.counts(one.media)[name] for one in parts[1].media)
    few = {name: column[:, : enough - 1] for name, column in pictures(batch).items()}
    few = jax.jit(lambda pictures: model.forward(params, batch | pictures).logits)(few)
    assert np.isnan(few[1]).any()  # placeholders without an image


def test_files_survive_a_round_trip_bit_for_bit(pair, parts, tmp_path):
    theirs, path, model, params = pair
    save_model(tmp_path, model, stack_layers(params), tokenizer_from=path)
    again, params_again = load_model(tmp_path)
    assert again.config == model.config
    chex.assert_trees_all_equal(params_again, params)
    reopened = type(theirs).from_pretrained(tmp_path)
    for (name, mine), (_, original) in zip(
        reopened.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert torch.equal(mine, original), name
    renderer_of(tmp_path)  # The processor's files are there too.
    changed = dataclasses.replace(model.config, max_length=256, norm_eps=1e-3, source="")
    again = config_of(
        family_of(changed).huggingface.write(changed) | {"model_type": changed.family}
    )
    assert again == changed


def test_targets_are_the_linear_layers_of_each_part(pair):
    theirs, _, model, params = pair
    every = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    language = {name for name in every if ".text_model." in name or ".language_model." in name}
    assert chosen(model, params, "all-linear") == every
    assert chosen(model, params, "language") == language
    assert chosen(model, params, "vision") == every - language


def test_adapters_go_to_peft_and_back(pair, parts, tmp_path):
    peft = pytest.importorskip("peft")
    theirs, path, model, params = pair
    # Each part of a model by one of the families; names of left-out modules end alike.
    target = {"smolvlm": "language", "qwen2_5_vl": "vision", "llava": "vision"}
    target = target.get(model.config.family, "all-linear")
    pattern = family_of(model.config).targets.pattern(target)
    adapted = adapt(jax.random.key(0), params, {pattern: lora(2)})
    trained, frozen = partition(adapted)
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    adapted = combine(trained, frozen)
    save_adapter(tmp_path, model.config, adapted, base_model=str(path))
    again = load_adapter(tmp_path, model.config, params)
    # Qwen's query, key and value are one matrix in the file, with one LoRA of the summed rank.
    chex.assert_trees_all_close(merge(again), merge(adapted), rtol=0, atol=1e-6)
    batch = rows(parts)
    logits = jax.jit(lambda p: model.forward(p, batch).logits)(adapted)
    with torch.no_grad():
        reopened = peft.PeftModel.from_pretrained(type(theirs).from_pretrained(path), tmp_path)
        expected = reopened(**inputs(theirs, batch)).logits
    for row, given, part in zip(logits, expected, parts, strict=True):
        close(row[: len(part.tokens)], given[: len(part.tokens)])


def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(pair, parts):
    """The residuals of the gradient hold no activation of the tower, whose images are many."""
    _, _, model, params = pair
    batch = jax.tree.map(jnp.asarray, rows(parts))
    name, *_ = pictures(batch)
    for column in pictures(batch):
        batch[column] = jnp.tile(batch[column], (1, 3, *[1] * (batch[column].ndim - 2)))
    count = batch[name].shape[1]

    def kept(target):
        pattern = family_of(model.config).targets.pattern(target)
        trained, frozen = partition(adapt(jax.random.key(0), params, {pattern: lora(2)}))
        loss = lambda t: supervised(model.forward)(combine(t, frozen), batch, None)[0]
        backward = jax.eval_shape(lambda t: jax.vjp(loss, t)[1], trained)
        sizes = (count * len(batch[name]),) if name == "images" else (count, 4 * count)
        return [
            x.shape
            for x in jax.tree.leaves(backward)
            if set(sizes) & set(x.shape[:2]) and x.ndim > 2
        ]

    assert kept("vision") and not kept("language")


@pytest.mark.parametrize("own", [True, False], ids=["own template", "none"])
def test_a_conversation_of_llava_is_that_of_its_processor(own, tmp_path):
    """With the token that the tokenizer puts in front of a text, which the template lacks."""
    tokenizer = vision_models.tokenizer("llava")
    tokenizer.bos_token, begin = "<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    tokenizer.chat_template = readers.LLAVA_TEMPLATE if own else None
    settings = vision_models.CROPS
    config = vision_models.VISION | {"model_type": "clip_vision_model"}
    token = tokenizer.convert_tokens_to_ids("<image>")
    file = {"model_type": "llava", "vision_config": config, "image_token_index": token}
    file |= {"text_config": vision_models.TEXT | {"vocab_size": 300}}
    (tmp_path / "config.json").write_text(json.dumps(file))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    renderer = data.Renderer(tokenizer, media=data.media_readers(tmp_path, tokenizer))
    theirs = hf.LlavaProcessor(
        pil_clip.CLIPImageProcessorPil(**settings), tokenizer, patch_size=4,
        num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template=readers.LLAVA_TEMPLATE,
    )  # fmt: skip
    picture = vision_models.image(0, 9, 30)
    row = lambda image: {"messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]},
    ]}  # fmt: skip
    given = row(Image.fromarray(picture))["messages"]
    wanted = theirs.apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    record = data.normalise_question(row(picture))
    assert renderer.prompt(record) == wanted["input_ids"][0].tolist()
    columns = data.prompt_columns(renderer, [record])
    np.testing.assert_array_equal(
        np.moveaxis(np.asarray(columns["images"])[0], -1, 1), wanted["pixel_values"]
    )


def test_positions_of_patches_are_those_that_torch_computes():
    for side in (2, 3, 7, 14, 26, 27, 32):
        config = hf.Idefics3VisionTransformer.config_class(
            hidden_size=2, image_size=side, patch_size=1, num_attention_heads=1
        )
        table = hf.models.idefics3.modeling_idefics3.Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            for parameter in table.patch_embedding.parameters():
                parameter.zero_()
            ids = torch.arange(side**2, dtype=torch.float32)
            table.position_embedding.weight.copy_(ids[:, None].expand(-1, 2))
            found = table(
                torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool)
            )
        assert found[0, :, 0].int().tolist() == list(ragged_positions(side))


@pytest.mark.parametrize(
    "name", ["smolvlm", "idefics3", "paligemma", "qwen2_5_vl", "qwen2_vl", "llava"]
)
def test_the_tables_of_keys_are_those_of_transformers(name):
    """A key that a new transformers adds, or a default that it changes, fails here."""
    family = find_family(name, FAMILIES)
    others = {
        "paligemma": paligemma,
        "qwen2_5_vl": qwen2_5_vl,
        "qwen2_vl": qwen2_vl,
        "llava": llava,
    }
    kinds = {"paligemma": "siglip_vision_model", "llava": "clip_vision_model"}
    module, vision = others.get(name, idefics3), kinds.get(name, f"{name}_vision")
    tables = [(family.huggingface.keys, hf.CONFIG_MAPPING[name])]
    tables.append((module._VISION_KEYS, hf.CONFIG_MAPPING[vision]))
    for keys, kind in tables:
        for field in dataclasses.fields(kind):
            if field.name in keys.defaults:
                default = keys.defaults[field.name]
                assert default == field.default or not (default or field.default), field.name
            else:
                assert field.name in NO_EFFECT | keys.no_effect, field.name


def test_a_prefix_ends_where_the_answer_of_its_segment_begins():
    rng = np.random.default_rng(0)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0], [1, 1, 2, 2, 2, 2, 2, 2, 0, 0]])
    trains = rng.integers(0, 2, segments.shape) * (segments > 0)
    found = prefix_of({"tokens": segments, "segment_ids": segments, "loss_mask": trains})
    for b, t in np.ndindex(segments.shape):
        before = [i for i in range(t + 1) if segments[b, i] == segments[b, t]]
        assert found[b, t] == (not trains[b, before].any())
    rollouts = {"tokens": segments, "completion_mask": np.ones((2, 3))}
    assert np.array_equal(prefix_of(rollouts), np.tile(np.arange(10) < 7, (2, 1)))
    assert prefix_of({"tokens": segments}).all()
    mask = prefix_of({"tokens": segments, "prefix_mask": trains})
    assert np.array_equal(mask, trains > 0)


@pytest.mark.parametrize("change, message", [
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "has a clip_vision_model there"),
    ({"text_config": {"model_type": "mistral"}}, "has a llama there"),
    ({"vision_feature_select_strategy": "cls"}, "expected default or full"),
    ({"vision_feature_layer": "last"}, "a layer or a list of layers"),
    ({"vision_feature_layer": 3}, "the outputs -3 to 2"),
    ({"multimodal_projector_bias": 1}, "expected true or false"),
])  # fmt: skip
def test_configs_of_llava_that_cannot_be_computed_are_refused(change, message):
    file = {"model_type": "llava", "image_token_index": 3, "vision_config": vision_models.VISION}
    file |= {"text_config": vision_models.TEXT | {"vocab_size": 30}}
    config_of(file)
    with pytest.raises(CheckpointError, match=message):
        config_of(file | change)


@pytest.mark.parametrize("change, message", [
    ({"text_config": {"model_type": "mistral"}}, "has a llama as its text part"),
    ({"vision_config": None}, "vision_config is None"),
    ({"vision_config": {"patch_size": [4, 8]}}, "squares"),
    ({"vision_config": {"patch_size": 5, "image_size": 16}}, "multiple of patch_size"),
    ({"image_token_id": 10**6}, "ids of the vocabulary"),
    ({"scale_factor": 3}, "multiple of the shuffle"),
])  # fmt: skip
def test_configs_that_cannot_be_computed_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_of(SMOLVLM | change)


def test_wrong_processors_are_refused(tmp_path):
    tokenizer, file = vision_models.tokenizer(), tmp_path / "preprocessor_config.json"
    (tmp_path / "config.json").write_text(json.dumps(SMOLVLM))
    wrong = [
        ({"max_image_size": {"longest_edge": 8}}, "squares of 8 pixels"),
        ({"do_resize": False}, "do_resize = False"),
        ({}, "take the tokenizer of this model"),
    ]
    for change, message in wrong:
        file.write_text(json.dumps(vision_models.PROCESSOR | change))
        with pytest.raises(data.DataError, match=message):
            data.media_readers(tmp_path, tokenizer)
    file.unlink()
    with pytest.raises(data.DataError, match="no preprocessor_config.json"):
        data.media_readers(tmp_path, tokenizer)
    assert data.media_readers("tiny", tokenizer) == ()


def test_all_params_of_a_part_train_alone(pair, parts):
    _, _, model, params = pair
    rules = {"vision/.*": full()}
    trained, _ = partition(adapt(jax.random.key(0), params, rules))
    assert {path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} == {"vision"}
