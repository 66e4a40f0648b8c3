"""Files beside the weights: special ids and who stops at them, indexes, quantised kinds, tokenizers."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.checkpoints import (
    CheckpointError,
    end_tokens,
    load_model,
    load_tokenizer,
    open_model,
    save_model,
)
from jaxft.checkpoints.assemble import layer_shapes
from jaxft.checkpoints.tensor_files import INDEX, open_tensors
from jaxft.data import Renderer
from jaxft.generation import generate
from jaxft.models import Decoder, DecoderConfig
from jaxft.models.special_ids import SpecialIds, read_special_ids
from jaxft.rewards import measure_accuracy
from tests.data import small_tokenizers as small

END, TURN = 1, 4  # </s> and <|im_end|> of the small tokenizers
ABSENT = "absent"
ANYWHERE = {"bos_token_id": 0, "pad_token_id": 2}


def edit(file, **changes):
    """Sets keys of a JSON file, made if needed; ABSENT drops one."""
    found = json.loads(file.read_text()) if file.exists() else {}
    found = {k: v for k, v in (found | changes).items() if v is not ABSENT}
    file.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A Llama whose greedy answer is TURN for ever, with the small tokenizer."""
    path = tmp_path_factory.mktemp("origin")
    tokenizer = small.tokenizer(small.CHATML)
    config = DecoderConfig(len(tokenizer), 16, 16, 1, 2, 2, 8, max_length=64, tie_embeddings=False)
    model = Decoder(config)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), layer_shapes(model))
    one = zeros["head"]["kernel"].copy()
    one[:, TURN] = 1
    ends = {"head": {"kernel": one}, "final_norm": {"scale": np.ones(16, np.float32)}}
    embed = {"embedding": np.ones((config.vocab_size, 16), np.float32)}
    save_model(path, model, zeros | ends | {"embed": embed})
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def place(origin, tmp_path):
    """(directory, function that sets what its files say)."""
    path = shutil.copytree(origin, tmp_path / "model")

    def says(eos=ABSENT, generation=ABSENT, tokenizer=None, template=None, **settings):
        edit(path / "config.json", eos_token_id=eos, **ANYWHERE)
        (path / "generation_config.json").unlink(missing_ok=True)
        if generation is not ABSENT:
            edit(path / "generation_config.json", eos_token_id=generation, **settings)
        edit(path / "tokenizer_config.json", eos_token=tokenizer or ABSENT)
        (path / "chat_template.jinja").unlink(missing_ok=True)
        if template:
            (path / "chat_template.jinja").write_text(template)
        return path

    return says


def theirs(path):
    """The number of tokens that transformers' generate gives, of 3 at most."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    out = model.generate(torch.tensor([[5, 6]]), do_sample=False, max_new_tokens=3, pad_token_id=2)
    return out.shape[1] - 2


# What config.json, generation_config.json, tokenizer_config.json and the template say; all ids that end.
SAID = [
    ([END, TURN], ABSENT, "</s>", None, {END, TURN}),
    (END, [END, TURN], "</s>", None, {END, TURN}),
    (TURN, None, "</s>", None, {END, TURN}),
    (None, TURN, None, None, {TURN}),
    (None, ABSENT, "</s>", small.CHATML, {END, TURN}),
    (ABSENT, ABSENT, "<|im_end|>", None, {TURN, 2}),  # 2: Llama's default, special here
    (ABSENT, TURN, None, None, {TURN, 2}),
]


@pytest.mark.parametrize("eos, generation, tokenizer, template, ends", SAID)
def test_a_model_stops_at_every_id_that_a_file_names_and_does_so_once_saved(
    place, tmp_path, eos, generation, tokenizer, template, ends
):
    path = place(eos, generation, tokenizer, template, top_k=7)
    model, params = load_model(path)
    found = load_tokenizer(path)
    stops = end_tokens(found, model.config)
    assert set(stops) == ends
    save_model(tmp_path / "out", model, params, tokenizer_from=path)
    assert theirs(tmp_path / "out") == 1
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings.get("top_k") == (None if generation is ABSENT else 7)
    assert set(end_tokens(found, load_model(tmp_path / "out")[0].config)) >= ends - {2}
    # Without a tokenizer the files say what they said.
    save_model(tmp_path / "bare", model, params)
    assert load_model(tmp_path / "bare")[0].config.special == model.config.special
    if generation is not None:  # A null there hides config.json from transformers.
        assert theirs(tmp_path / "bare") == theirs(path)


def test_transformers_reads_the_ids_that_are_written(place, tmp_path):
    import transformers

    path = place([7, TURN], generation=9, tokenizer="</s>", temperature=0.3, do_sample=True)
    save_model(tmp_path, *load_model(path))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [7, TURN], 2)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (settings.eos_token_id, settings.temperature, settings.do_sample) == (9, 0.3, True)


def test_answers_that_are_verified_end_at_the_template_s_token(place):
    path = place(END, tokenizer="</s>")
    model, params = load_model(path)
    renderer = Renderer(load_tokenizer(path), template="chatml")  # not the tokenizer's own
    records = [{"prompt": "hi", "completion": ""}]
    lengths = []
    verifier = lambda completion, record: not lengths.append(len(completion))
    assert measure_accuracy(model, params, renderer, records, verifier, max_new_tokens=3).rate == 1
    assert end_tokens(renderer.tokenizer, model.config, renderer.template) == (TURN, END)


def test_a_tokenizer_without_an_end_takes_that_of_the_files(place):
    found = load_tokenizer(place(END, generation=[END, TURN]))
    assert found.eos_token_id == END
    (tokenised,) = Renderer(found)({"prompt": "hi", "completion": "ho"})
    assert tokenised.tokens[-1] == END


def test_ids_may_lie_in_text_config_be_null_or_absent():
    default = SpecialIds(bos=1, eos=(2,))
    read = lambda config, generation=None: read_special_ids(config, generation or {}, default)
    assert read({"text_config": {"eos_token_id": 5}, "bos_token_id": 3}).ends == (5,)
    assert read({"eos_token_id": None, "bos_token_id": None}) == SpecialIds()
    assert read({}) == SpecialIds(bos=1, eos=(2,), assumed=True)
    assert read({"vocab_size": 2}) == SpecialIds(bos=1)
    assert read({"eos_token_id": 2}, {"eos_token_id": [2], "bos_token_id": 1}).generation == ""
    with pytest.raises(CheckpointError, match="eos_token_id is 'x', expected an id, a list"):
        read({}, {"eos_token_id": "x"})


def shards(path, **named):
    """Two shards instead of the whole file, and the index that names them."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {}
    for file, part in zip(files, (names[:3], names[3:]), strict=True):
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    return weight_map | named


FIRST = "model-00001-of-00002.safetensors"
INDEXES = [
    ("{", "model.safetensors.index.json: damaged, not valid JSON"),
    ("{}", "not an index of shards.*weight_map"),
    ('{"weight_map": {"a": 3}}', "not an index of shards.*names no files"),
    ("[]", "expected a JSON object"),
    ({"a": "../x.safetensors"}, "'../x.safetensors' points outside"),
    ({"a": "b/../../x.safetensors"}, "points outside"),
    ({"a": "/x.safetensors"}, "points outside"),
    ({"a": "model-9.safetensors"}, "1 of its 3 files are missing: model-9.safetensors"),
    ({"a": FIRST}, f"names tensor 'a' in {FIRST}, which does not hold it"),
    (None, "holds the shards model-00001-of-00002.safetensors.* without model.safetensors.index"),
]


@pytest.mark.parametrize("index, message", INDEXES)
def test_a_damaged_index_is_named(place, index, message):
    path = place()
    weight_map = shards(path)
    if index is not None:
        damaged = isinstance(index, str)
        text = index if damaged else json.dumps({"weight_map": weight_map | index})
        (path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_model(path)


def test_a_pointer_and_a_damaged_tokenizer_are_named(place):
    path = place()
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    with pytest.raises(CheckpointError, match="a Git LFS pointer.*git lfs pull"):
        open_model(path)
    (path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read .*download"):
        load_tokenizer(path)


def test_named_templates_in_files_are_copied_and_a_model_may_be_saved_in_its_place(place, tmp_path):
    path = place()
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = {"default": small.CHATML, "rag": "R"}
    tokenizer.save_pretrained(path)
    model, params = load_model(path)
    for there in (tmp_path / "out", path):
        save_model(there, model, params, tokenizer_from=path)
        assert load_tokenizer(there).chat_template == tokenizer.chat_template


def test_a_tokenizer_of_its_own_code_is_refused_without_a_question(place, monkeypatch):
    path = place()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (path / "tokenizer.json").unlink()
    auto = {"AutoTokenizer": ["code.Mine", None]}
    edit(path / "tokenizer_config.json", tokenizer_class="Mine", auto_map=auto)
    with pytest.raises(CheckpointError, match="code of its own .* never runs"):
        load_tokenizer(path)


def test_a_whole_file_goes_before_an_index_and_an_index_before_order(place):
    path = place()
    whole = load_file(path / "model.safetensors")
    weight_map = shards(path)
    # The second shard holds an older copy of a tensor of the first.
    name = next(name for name, file in weight_map.items() if file == FIRST)
    later = path / FIRST.replace("00001", "00002", 1)
    save_file(load_file(later) | {name: whole[name] + 1}, later)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(open_tensors(path)[name], whole[name])
    save_file(whole | {name: whole[name] + 2}, path / "model.safetensors")
    np.testing.assert_array_equal(open_tensors(path)[name], whole[name] + 2)


Q = "quantization_config"
QUANTISED = [
    ({Q: {"quant_method": "gptq", "bits": 4}}, r"quantised \(GPTQ, 4 bit: quantization_config"),
    ({Q: {"quant_method": "awq", "bits": 4}}, "AWQ, 4 bit"),
    ({Q: {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes, 8 bit"),
    ({"text_config": {Q: {"quant_method": "compressed-tensors"}}}, "compressed-tensors"),
    ({"compression_config": {"format": "pack"}}, "compressed-tensors"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bit"),
    *(({Q: {"quant_method": kind}}, kind) for kind in
      "fp8 fbgemm mxfp4 hqq eetq quanto torchao aqlm vptq higgs spqr bitnet new_one".split()),
]  # fmt: skip


@pytest.mark.parametrize("keys, message", QUANTISED)
def test_quantised_checkpoints_are_refused_by_kind_before_names_are_compared(place, keys, message):
    path = place()
    edit(path / "config.json", **keys)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"(?i)quantised.*{message}.*--quantise"):
        open_model(path)


def rename(ending, dtype):
    def change(tensors):
        tensors["model.layers.0.mlp.up_proj" + ending] = tensors.pop(
            "model.layers.0.mlp.up_proj.weight"
        ).astype(dtype)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (rename(".qweight", np.int32), "GPTQ or AWQ: tensor"),
        (rename(".weight_packed", np.int32), "compressed-tensors: tensor"),
        (rename(".weight", np.int8), "of type int8: tensor .*up_proj.*floats were expected"),
        (rename(".weight", np.uint8), "of type uint8"),
        (rename(".weight", ml_dtypes.float8_e4m3fn), "of type float8_e4m3fn"),
        ("quantize_config.json", "GPTQ, 3 bit: quantize_config.json"),
    ],
)
def test_quantised_tensors_are_refused_where_no_config_names_them(place, change, message):
    path = place()
    if isinstance(change, str):
        edit(path / change, bits=3)
    else:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_model(path)


def test_tokenizers_that_do_not_belong_to_the_model_are_refused(place, tmp_path):
    path = place(TURN, tokenizer="</s>")
    edit(path / "config.json", vocab_size=300)
    with pytest.raises(CheckpointError, match="306 tokens with ids up to 305.* 300 rows: .*id 300"):
        load_tokenizer(path)
    edit(path / "config.json", vocab_size=306)
    # Gemma 3's text models have embeddings without the row of an image.
    found = load_tokenizer(path)
    found.add_tokens(["<image_soft_token>"])
    found.save_pretrained(path)
    model, params = load_model(path)
    assert end_tokens(load_tokenizer(path), model.config) == (END, TURN)
    with pytest.raises(ValueError, match=r"ids 5\.\.306, but .* 306 rows"):
        generate(model, params, [[5, 306]], jax.random.key(0))
    found.add_tokens(["<more>"])
    with pytest.raises(CheckpointError, match="'<more>' .id 307. has none"):
        save_model(tmp_path / "out", model, params, tokenizer_from=found)
    load_model(tmp_path / "out")  # The trained model is not lost.


@pytest.mark.parametrize(
    "said, message",
    [
        (dict(eos=400), "config.json: eos_token_id 400 lies outside the embedding of 306 rows"),
        (dict(eos=1, generation=[1, 306]), "generation_config.json: eos_token_id 306 lies outside"),
        (dict(eos=None), "no token ends a text"),
    ],
)
def test_special_ids_that_cannot_be_met_are_refused(place, said, message):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(place(**said))
