"""The scripts with a model that reads images."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, generate, preference, reinforce, sft
from experiments.cli import flags
from jaxft import checkpoints, data
from tests import vision_models

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, and rows of questions about pictures beside it."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("vision")
    vision_models.write(path / "model")
    rng = np.random.default_rng(0)
    rows, pairs = [], []
    for i, name in enumerate([*COLOURS] * 8):
        picture = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (16, 16, 3)), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(path / f"{i}.png")
        rows.append({"question": "Which colour?", "answer": name, "images": [f"{i}.png"]})
        other = next(word for word in COLOURS if word != name)
        pairs.append(
            {"prompt": "Which colour?", "chosen": name, "rejected": other, "images": [f"{i}.png"]}
        )
        pairs[-1]["prompt"] = [{"role": "user", "content": "Which colour?"}]
    for kind, lines in (("rows", rows), ("pairs", pairs)):
        (path / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(place, name, **given):
    own = dict(
        model=str(place / "model"), max_length=128, batch_size=4, output_dir=str(place / name)
    )
    return own | dict(rank=2, alpha=4.0, learning_rate=1e-2, save_steps=1000) | given


def run(script, place, name, **given):
    return script.main(flags.replace(script.Config(), **settings(place, name, **given)))


def test_sft_learns_from_images_and_generate_and_evaluate_take_them(place, capsys):
    rows = str(place / "rows.jsonl")
    metrics = run(
        sft, place, "sft", data=(rows,), eval_data=rows, max_steps=30, eval_steps=30, target="all-linear",
        max_new_tokens=6,
    )  # fmt: skip
    assert metrics["last_loss"] < 0.2 * metrics["first_loss"]
    adapter = str(place / "sft" / "adapter")
    trained = dict(model=str(place / "model"), adapter=adapter)
    for name, image in (("red", "0.png"), ("blue", "1.png")):
        config = generate.Config(prompt=("Which colour?",), image=(str(place / image),))
        assert generate.main(flags.replace(config, **trained, max_new_tokens=6)) == [name]
    config = flags.replace(evaluate.Config(), **trained, data=rows, max_length=128)
    assert evaluate.main(config)["loss"] < 0.2 * metrics["first_loss"]


def test_preferences_and_rewards_of_images_train(place):
    pairs, rows = str(place / "pairs.jsonl"), str(place / "rows.jsonl")
    metrics = run(
        preference, place, "dpo", data=(pairs,), eval_data=pairs, max_steps=8, eval_steps=8, target="vision",
    )  # fmt: skip
    assert metrics["last_loss"] < metrics["first_loss"]
    metrics = run(
        reinforce, place, "grpo", data=(rows,), eval_data=rows, max_steps=2, prompts_per_step=2, group_size=2,
        max_new_tokens=3, target="language",
    )  # fmt: skip
    assert metrics["steps"] == 2


def test_wrong_images_end_a_run_before_it_starts(place, tmp_path):
    row = {"question": "Which colour?", "answer": "red", "images": [str(place / "0.png")]}
    (tmp_path / "broken.png").write_bytes(b"no image")
    wrong = [
        (row | {"images": [str(tmp_path / "broken.png")]}, "cannot be read"),
        (row | {"question": "<image><image>?"}, "2 <image> in the text and 1 images"),
        (row | {"images": ["https://x.org/a.png"]}, "download the file"),
    ]
    for line, message in wrong:
        (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(data.DataError, match=message):
            run(
                sft,
                place,
                "wrong",
                data=(str(tmp_path / "rows.jsonl"),),
                eval_data=str(place / "rows.jsonl"),
            )
    rows = str(place / "rows.jsonl")
    with pytest.raises(data.DataError, match="text model cannot be shown"):
        run(sft, place, "wrong", data=(rows,), eval_data=rows, model="tiny")
    with pytest.raises(data.DataError, match="text model cannot be shown"):
        config = generate.Config(prompt=("a",), image=(str(place / "0.png"),))
        generate.main(flags.replace(config, model="tiny"))
    assert checkpoints.load_model(place / "model")[0].config.towers
