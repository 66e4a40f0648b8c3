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
    path = tmp_path_factory.mktemp("vision")
    vision_models.write_random(path / "model")
    rng = np.random.default_rng(0)
    rows, pairs = [], []
    for i, name in enumerate([*COLOURS] * 10):
        picture = np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, (16, 16, 3)), 0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(path / f"{i}.png")
        rows.append({"question": "Which colour?", "answer": name, "images": [f"{i}.png"]})
        other = next(word for word in COLOURS if word != name)
        pairs.append(
            {"prompt": "Which colour?", "chosen": name, "rejected": other, "images": [f"{i}.png"]}
        )
        pairs[-1]["prompt"] = [{"role": "user", "content": "Which colour?"}]
    files = {"rows": rows[:16], "held": rows[16:], "pairs": pairs[:16], "held_pairs": pairs[16:]}
    for kind, lines in files.items():
        (path / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(script, place, name, held="held", **given):
    own = dict(model=str(place / "model"), output_dir=str(place / name), save_steps=1000)
    own |= dict(learning_rate=1e-2, eval_data=str(place / f"{held}.jsonl")) | given
    return script.main(flags.replace(script.Config(), **own))


def test_sft_learns_from_images_and_generate_and_evaluate_take_them(place):
    rows = str(place / "rows.jsonl")
    how = dict(max_steps=40, eval_steps=40, max_length=64, batch_size=4, accuracy=False)
    metrics = run(sft, place, "sft", data=(rows,), adapter="full", **how)
    assert metrics["eval_loss"] < 0.1 * metrics["first_loss"]
    trained = dict(model=str(place / "sft" / "model"))
    for name, image in (("red", "0.png"), ("blue", "1.png")):
        config = generate.Config(prompt=("Which colour?",), image=(str(place / image),))
        assert generate.main(flags.replace(config, **trained, max_new_tokens=6)) == [name]
    config = flags.replace(evaluate.Config(), **trained, data=rows, max_length=64, max_new_tokens=6)
    assert evaluate.main(config)["accuracy"] > 0.9


def test_the_outputs_of_a_frozen_tower_are_computed_once(place):
    rows = (str(place / "rows.jsonl"),)
    how = dict(max_steps=2, eval_steps=2, max_length=64, batch_size=4, accuracy=False, data=rows)
    how |= dict(target="language", cache_tower=str(place / "towers"))
    plain = run(sft, place, "plain", **how | {"cache_tower": None})
    cached = run(sft, place, "cached", **how)
    for name in ("first_loss", "last_loss", "eval_loss"):
        np.testing.assert_allclose(cached[name], plain[name], rtol=2e-5)
    assert len(list((place / "towers").iterdir())) == 20
    with pytest.raises(ValueError, match="vision/.* trains"):
        run(sft, place, "trains", **how | {"target": "vision"})
    with pytest.raises(ValueError, match="neither --teacher nor --adapter intrinsic"):
        run(sft, place, "intrinsic", **how | {"adapter": "intrinsic", "target": "all-linear"})


def test_preferences_and_rewards_of_images_train(place):
    pairs, rows = str(place / "pairs.jsonl"), str(place / "rows.jsonl")
    how = dict(max_length=64, batch_size=4, max_steps=4, eval_steps=4, target="vision")
    metrics = run(preference, place, "dpo", "held_pairs", data=(pairs,), **how)
    assert metrics["last_loss"] < metrics["first_loss"]
    how = dict(prompts_per_step=2, group_size=2, max_steps=2, max_new_tokens=3, target="language")
    assert run(reinforce, place, "grpo", data=rows, **how)["steps"] == 2


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
            run(sft, place, "wrong", data=(str(tmp_path / "rows.jsonl"),))
    rows = str(place / "rows.jsonl")
    with pytest.raises(data.DataError, match="text model cannot be shown"):
        run(sft, place, "wrong", data=(rows,), model="tiny")
    with pytest.raises(data.DataError, match="text model cannot be shown"):
        config = generate.Config(prompt=("a",), image=(str(place / "0.png"),))
        generate.main(flags.replace(config, model="tiny"))
    assert checkpoints.load_model(place / "model")[0].config.towers
