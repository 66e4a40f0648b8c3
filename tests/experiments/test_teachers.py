"""The teachers of sft.py and reinforce.py, whose runs are in test_scripts.py."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import reinforce, sft
from experiments.cli import flags, teachers
from jaxft import data
from jaxft.adapters import partition
from jaxft.checkpoints import load_model, load_tokenizer, save_model
from jaxft.generation import ScoredBatches, served_teacher
from jaxft.models import Decoder
from jaxft.parallel import make_mesh
from tests import small_models, vision_models


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model of the same tokenizer with other params."""
    path = tmp_path_factory.mktemp("teacher")
    model, params = load_model("tiny")
    rng = np.random.default_rng(0)
    move = lambda x: np.asarray(x) + 0.05 * rng.normal(size=x.shape).astype(x.dtype)
    params = jax.tree.map(move, params)
    save_model(path / "model", model, params, tokenizer_from="tiny")
    return str(path / "model")


def test_a_teacher_is_loaded_on_the_mesh_and_has_enough_positions(teacher):
    mesh, renderer = make_mesh(fsdp=2, tensor=4), data.Renderer(load_tokenizer("tiny"))
    given = config(sft, model="tiny", teacher=teacher, scan_layers=True, bfloat16=True)
    loaded = teachers.load(given, renderer, mesh, 512)
    params = teachers.beside(loaded, {"own": 1})
    kernel = params["teacher"]["layers"]["mlp"]["up"]["kernel"]
    assert not jax.tree.leaves(partition(params["teacher"])[0])
    assert len(kernel.value.sharding.device_set) == 8
    assert kernel.value.addressable_shards[0].data.size * 8 == kernel.value.size
    assert teachers.bare(loaded, params) == {"own": 1}
    with pytest.raises(ValueError, match="has 512 positions, and rows may have 513 tokens"):
        teachers.load(given, renderer, mesh, 513)


def config(script, **given):
    return flags.replace(script.Config(), **given)


def test_a_server_s_log_probs_become_columns_and_transforms(monkeypatch):
    """The server is asked for one likeliest token where the log-ratio of the sampled ones is the credit."""
    asked = []

    def post(url, body, **options):
        asked.append(body.get("prompt_logprobs", body.get("top_logprobs_num")))
        raise served_teacher.ServerError("reached")

    monkeypatch.setattr(served_teacher, "post", post)
    url = dict(teacher="http://host/v1", teacher_model="m", distil_top_k=5)
    batch = {"tokens": np.ones((1, 4), int), "completion_mask": np.ones((1, 2), bool)}
    batch |= {"segment_ids": batch["tokens"], "loss_mask": np.ones((1, 4))}
    loaded = teachers.Loaded(None, None, teachers._server(config(sft, **url).distil))
    scored = teachers.scored(config(sft, **url), loaded, iter([batch]))
    assert isinstance(scored, ScoredBatches) and teachers.beside(loaded, {"a": 1}) == {"a": 1}
    credit = url | {"distil_as": "credit"}
    for config_, calls in ((config(reinforce, **url), 5), (config(reinforce, **credit), 1)):
        (transform,) = teachers.transforms(config_, loaded)
        with pytest.raises(served_teacher.ServerError, match="reached"):
            transform(batch, None, None)
        assert asked[-1] == calls
    with pytest.raises(served_teacher.ServerError, match="reached"):
        next(scored)
    assert asked == [5, 1, 5]


def test_the_credit_of_a_model_is_a_transform_and_leaves_the_params(teacher):
    given = config(reinforce, teacher=teacher, distil_as="credit")
    loaded = teachers.Loaded(lambda *args: None, {}, None)
    assert len(teachers.transforms(given, loaded)) == 1
    assert teachers.transforms(config(reinforce, teacher=teacher), loaded) == []
    assert teachers.load(config(sft), None, None, 1) is None


def test_a_teacher_sees_what_the_student_sees(tmp_path):
    """Otherwise the places of images would be read as text."""
    student, other, text = (tmp_path / name for name in ("student", "other", "text"))
    for path in (student, other):
        vision_models.write_random(path)
    settings = other / "preprocessor_config.json"
    changed = json.loads(settings.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    settings.write_text(json.dumps(changed))
    tokens = load_tokenizer(student)
    config_of_text = dataclasses.replace(small_models.LLAMA, vocab_size=len(tokens))
    model = Decoder(config_of_text)
    save_model(text, model, model.init(jax.random.key(0), model.example_input())["params"])
    tokens.save_pretrained(text)
    renderer = data.Renderer(tokens, media=data.media_readers(student, tokens))
    load = lambda **given: teachers.load(
        config(sft, model=str(student), **given), renderer, None, 64
    )
    assert load(teacher=str(student)).forward is not None
    with pytest.raises(ValueError, match="reads images not at all, beside"):
        load(teacher=str(text))
    with pytest.raises(ValueError, match="reads images otherwise, beside"):
        load(teacher=str(other))
    with pytest.raises(ValueError, match="token ids, without the images that"):
        load(teacher="http://host/v1", teacher_model="m")


@pytest.mark.parametrize("column", ["source", "images", "patches", "audio", "audio_embeddings"])
def test_a_server_is_not_asked_about_half_of_a_prompt(column):
    server = served_teacher.sglang_teacher("http://host")
    batch = {"tokens": np.ones((1, 4), int), column: np.ones((1, 2, 3))}
    with pytest.raises(ValueError, match=f"has {column}, and a server is sent token ids only"):
        served_teacher.teacher_columns(server, batch, 4)
