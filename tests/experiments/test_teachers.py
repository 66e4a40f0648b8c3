"""sft.py and reinforce.py with a teacher, run small, and a server's columns on their way to the objective."""

import json

import jax
import numpy as np
import pytest

from experiments import reinforce, sft
from experiments.cli import flags, teachers
from jaxft.checkpoints import load_model, save_model
from jaxft.generation import ScoredBatches, served_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model of the same tokenizer with other params."""
    path = tmp_path_factory.mktemp("teacher")
    model, params = load_model("tiny")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype), params)
    save_model(path / "model", model, params, tokenizer_from="tiny")
    return str(path / "model")


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_sft_distils_a_model_on_a_mesh(teacher, tmp_path):
    settings = dict(smoke=True, accuracy=False, teacher=teacher, fsdp=2, context=4)
    settings |= dict(
        distil_weight=1.0, learning_rate=1e-2, distil_beta=0.0, output_dir=str(tmp_path)
    )
    sft.main(flags.replace(sft.Config(), **settings))
    found = rows(tmp_path)
    assert all(row["loss"] == row["divergence"] != row["task_loss"] for row in found)
    assert 0 < found[-1]["divergence"] < found[0]["divergence"]
    names = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()[:20000]
    assert b"lora_A" in names and b"teacher" not in names


def test_reinforce_distils_on_the_samples_of_the_student(teacher, tmp_path):
    settings = dict(smoke=True, teacher=teacher, distil_beta=1.0, output_dir=str(tmp_path))
    metrics = reinforce.main(flags.replace(reinforce.Config(), **settings))
    found = rows(tmp_path)
    assert metrics["steps"] == 4 and {*reinforce.SHOWN, "task_loss"} <= set(found[0])
    assert all(row["loss"] == row["divergence"] > 0 for row in found)


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
