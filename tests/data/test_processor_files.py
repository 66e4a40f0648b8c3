"""Settings of processors of images and clips: both kinds of files, their forms, and wrong values of each."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxft import data
from jaxft.data import DataError, Media
from jaxft.data import __main__ as inspection
from jaxft.models import config_of
from jaxft.models.errors import CheckpointError
from tests import audio_models, vision_models
from tests.data.test_audio import RATE, tone

KINDS = {"smolvlm": vision_models.PROCESSOR, "qwen2_5_vl": vision_models.GRID}
PICTURE = Media("image", vision_models.image(0, 24, 40))
WRONG = [
    None,
    "bicubic",
    -1,
    0,
    1.5,
    [],
    [0.5],
    {},
    {"longest_edge": "a"},
    True,
    "0.5",
    [0, 0, 0],
    float("nan"),
]


def config(kind):
    """The config.json of a small model, without its weights."""
    tokens = vision_models.tokenizer(kind)
    if kind == "smolvlm":
        return vision_models.smolvlm_json(len(tokens), tokens.convert_tokens_to_ids("<image>"))
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
    text = vision_models.TEXT | dict(vocab_size=len(tokens), rope_parameters=rope)
    image = tokens.convert_tokens_to_ids("<|image_pad|>")
    return dict(
        model_type=kind,
        text_config=text,
        vision_config=vision_models.QWEN_VISION,
        image_token_id=image,
    )


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    """(directory, tokenizer, settings) of a kind."""
    path = tmp_path_factory.mktemp(request.param)
    (path / "config.json").write_text(json.dumps(config(request.param)))
    return path, vision_models.tokenizer(request.param), KINDS[request.param]


def reader(place, settings, name="preprocessor_config.json", part=None):
    path, tokenizer, _ = place
    for old in path.glob("*processor_config.json"):
        old.unlink()
    (path / name).write_text(json.dumps(settings if part is None else {part: settings}))
    (found,) = data.media_readers(path, tokenizer)
    return found


def test_equal_settings_of_all_files_and_forms(place):
    settings = place[2] | {"image_mean": [0.5] * 3}
    wanted = reader(place, settings)
    assert reader(place, settings, "processor_config.json", "image_processor") == wanted
    assert reader(place, settings | {"image_mean": 0.5}) == wanted
    assert (
        reader(place, settings | {"rescale_factor": None, "resample": settings["resample"]})
        == wanted
    )


def test_a_wrong_setting_is_refused_when_it_is_read(place):
    """Any value of any setting gives finite pixels, or one line."""
    for name in place[2]:
        for value in WRONG:
            try:
                made = reader(place, place[2] | {name: value})
            except (DataError, CheckpointError) as error:
                assert "\n" not in str(error)
                continue
            for array in made.arrays(PICTURE).values():
                assert np.isfinite(array).all() and len(array) == max(made.counts(PICTURE).values())


def test_the_inspection_of_a_file_reads_its_images(place):
    reader(place, place[2])
    path, tokenizer, _ = place
    tokenizer.save_pretrained(path)
    Image.fromarray(PICTURE.value).save(path / "a.png")
    row = {"question": "What?", "answer": "A cat.", "images": ["a.png"]}
    (path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = inspection.main(inspection.Config(str(path / "rows.jsonl"), str(path)))
    assert tokenizer.decode(tokenizer(reader(place, place[2]).text(PICTURE))["input_ids"]) in str(
        found
    )


def test_files_of_transformers_5_have_the_features_of_clips(tmp_path):
    hf = pytest.importorskip("transformers")
    tokenizer = audio_models.tokenizer()
    extract = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=320)
    hf.Qwen2AudioProcessor(extract, tokenizer, chat_template=audio_models.TEMPLATE).save_pretrained(
        tmp_path
    )
    assert not (tmp_path / "preprocessor_config.json").exists()
    text = audio_models.TEXT | {"vocab_size": len(tokenizer)}
    token = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    settings = dict(model_type="qwen2_audio", audio_config=audio_models.AUDIO, text_config=text)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"audio_token_index": token}))
    (tower,) = config_of(json.loads((tmp_path / "config.json").read_text())).towers
    (found,) = data.media_readers(tmp_path, tokenizer)
    assert found.features == data.read_log_mel(tmp_path, tower.mel, tower.places)
    assert (found.features.window, found.features.seconds) == (320, 1)
    samples = tone(0.3).astype(np.float32)
    theirs = extract(samples, sampling_rate=RATE, return_tensors="np").input_features[0].T
    np.testing.assert_allclose(found.features(samples), theirs, atol=2e-5)
    shutil.rmtree(tmp_path)
