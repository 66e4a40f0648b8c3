"""The script of multimodal fine-tuning: pictures are as they are asked about, controls, judge."""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from experiments.cli import flags
from experiments.papers.rft_multimodal import main as script
from experiments.papers.rft_multimodal import methods, worlds
from experiments.worlds import loaded, pictures
from jaxft import data, rl, train
from jaxft.data.media import media_in, read_media, with_media
from jaxft.models import Prediction
from jaxft.objectives import policy_gradient, supervised
from jaxft.rewards import read_boxes
from tests import vision_models


@pytest.fixture(scope="module")
def drawn():
    return pictures.split(0, 240, 120)


def test_smoke(tmp_path):
    assert script.main(script.Config(smoke=True, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert list(run["methods"]) == ["GRPO", "SFT"]
    assert abs(run["start"]["kl"]) < 1e-5 < abs(run["methods"]["SFT"]["kl"])
    assert (tmp_path / "rft_multimodal.png").stat().st_size > 1000


def _colour(image):
    """The strongest channel of each pixel that is not background, or -1."""
    seen = image.max(axis=-1) > 0.1  # of -1 to 1; background is near -1
    return np.where(seen, image.argmax(axis=-1), -1)


def test_answers_are_those_of_the_pictures(drawn):
    known, _ = drawn
    for record, (image,) in zip(known.records, known.images, strict=True):
        kind, question, answer = record["kind"], record["question"], record["answer"]
        colours = _colour(image)
        cells = colours.reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, -1)
        if kind in ("count", "choose"):
            counts = {c: int((cells == i).any(axis=1).sum()) for i, c in enumerate("rgb")}
        if kind == "count":
            assert counts[question[1]] == int(answer)
        elif kind == "choose":
            assert max(counts, key=counts.get) == question[1 + "ABC".index(answer)]
        elif kind == "box":
            y, x = np.nonzero(colours == "rgb".index(question[1]))
            expected = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 16
            np.testing.assert_allclose(read_boxes(answer)[0], expected, atol=1e-3)


def test_rewards_are_1_for_the_answers_and_less_for_those_of_others(drawn):
    known, new = drawn
    reward, answers = pictures.rewards(known.records), [r["answer"] for r in known.records]
    np.testing.assert_allclose(reward(answers, known.records), 1, rtol=1e-6)
    assert pictures.right(reward(answers, known.records), known.records).all()
    assert reward(answers[4:] + answers[:4], known.records).mean() < 0.7
    prior = pictures.text_prior(known, new)
    assert all(0 <= prior[kind] < 0.7 for kind in pictures.SKILLS)


def test_other_pictures_are_of_the_same_skill_and_each_is_used_once(drawn):
    _, new = drawn
    swapped = pictures.others(new)
    found = [int(np.flatnonzero((new.images == x).all(axis=(1, 2, 3, 4)))[0]) for x in swapped]
    assert sorted(found) == list(range(120)) and all(i != j for i, j in enumerate(found))
    assert all(new.records[i]["kind"] == new.records[j]["kind"] for i, j in enumerate(found))


def test_rows_are_prompt_answer_and_stop(drawn):
    known, _ = drawn
    rows, asked = pictures.rows_of(known), pictures.asked(known)
    decode = pictures.Tokenizer().decode
    for i in (0, 1, 2, 3):
        tokens, mask = rows["tokens"][i], rows["loss_mask"][i] > 0
        assert decode(tokens[mask]) == known.records[i]["answer"] + "\n"
        seen = rows["segment_ids"][i] > 0
        assert tokens[seen & ~mask].tolist() == asked.ids[i]
        assert rows["positions"][i][seen].tolist() == list(range(seen.sum()))


def test_every_method_s_first_update_follows_the_exact_policy_gradient():
    """Six actions of a uniform policy after each of two prompts, each sampled once: the exact expectation."""
    rewards = jnp.array([1.0, 0, 0, 0.5, 0, 0] * 2)
    forward = lambda params, batch, key=None: Prediction(
        params["table"][batch["tokens"]], jnp.eye(6)
    )
    params = {"table": jnp.zeros((6, 6)), "value_head": {"kernel": jnp.zeros((6, 1))}}
    params["value_head"]["bias"] = jnp.zeros(1)
    tokens = jnp.array([[prompt, action] for prompt in (0, 1) for action in range(6)])
    even = jnp.full((12, 1), -np.log(6.0), jnp.float32)
    batch = {
        "tokens": tokens, "segment_ids": jnp.ones_like(tokens), "completion_mask": even < 0,
        "positions": jnp.tile(jnp.arange(2), (12, 1)), "sampler_log_probs": even,
        "old_log_probs": even, "old_values": jnp.zeros((12, 1)),
    }  # fmt: skip
    value = lambda table: jnp.sum(jax.nn.softmax(table[:2]) * rewards.reshape(2, 6))
    exact = jax.grad(value)(params["table"])
    build = functools.partial(policy_gradient, forward)
    for name, method in methods.METHODS.items():
        algorithm = method.make(build, 6, 1)
        given = {k: x for k, x in batch.items() if method.updates > 1 or k != "old_log_probs"}
        given |= algorithm.credit(rewards, given)
        found = jax.grad(lambda p, a=algorithm, g=given: a.objective(p, g, None)[0])(params)[
            "table"
        ]
        cosine = -jnp.vdot(exact, found) / jnp.linalg.norm(exact) / jnp.linalg.norm(found)
        assert cosine > 0.6, name


def test_noisy_half_trains_on_clean_pictures():
    asked = rl.Asked([[1], [2]], [{}, {}], {"images": np.ones((2, 1, 2, 2, 3), np.float32)})
    seen = []

    def sample(params, asked, key):
        seen.append(asked.columns["images"])
        rows = np.repeat(np.arange(2), 2)
        ones = np.ones((4, 1), np.float32)
        return {
            "tokens": np.stack([rows, np.full(4, len(seen))], axis=1), "rewards": np.zeros(4),
            "segment_ids": np.ones((4, 2), np.int32), "truncated": np.zeros(4, bool),
            "positions": np.zeros((4, 2), np.int32), "completion_mask": ones > 0,
            "sampler_log_probs": ones, "images": asked.columns["images"][rows],
        }  # fmt: skip

    batch = worlds.noisy_half(sample, 0.5)(None, asked, jax.random.key(0))
    assert np.abs(seen[1] - seen[0]).std() > 0.1 and (batch["images"] == 1).all()
    assert batch["tokens"].tolist() == [
        [0, 1],
        [0, 1],
        [0, 2],
        [0, 2],
        [1, 1],
        [1, 1],
        [1, 2],
        [1, 2],
    ]


def test_images_of_other_records():
    images = [read_media("image", np.full((2, 2, 3), i, np.uint8)) for i in range(4)]
    turn = lambda *media: {"messages": [{"role": "user", "content": "?", "_media": media}]}
    records = [turn(images[0]), turn(images[1], images[2]), turn(images[3]), {"question": "?"}]
    made = loaded.with_other_media(records)
    assert [media_in(x) for x in made] == [[images[3]], images[1:3], [images[0]], []]
    assert media_in(records[0]) == [images[0]]
    with pytest.raises(data.DataError, match="cannot take the places of"):
        with_media(records[1], images[:1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a small random SmolVLM."""
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("vision") / "model"
    vision_models.write(path)
    return str(path)


def test_full_preset(checkpoint, tmp_path):
    """A small random SmolVLM on a file: the same code as on a pod."""
    rows = []
    for i in range(10):
        Image.fromarray(vision_models.image(i, 16, 16)).save(tmp_path / f"{i}.png")
        rows.append({"question": "Where?", "answer": f"[0, 0, {i + 1}, 2]", "images": [f"{i}.png"]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = dict(preset="full", smoke=True, data=str(tmp_path / "rows.jsonl"), fsdp=1, reward="box")
    given |= dict(model=checkpoint, output_dir=str(tmp_path))
    assert script.main(flags.replace(script.Config(), **given)) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert set(run["methods"]) == {"GRPO", "SFT"} and run["other"]["accuracy"] == 0


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(methods=("GRPO", "A2C")), "no method 'A2C'; give some of PPO"),
        (dict(methods=("PPO",)), "must have GRPO"),
        (dict(group_size=5), "must be even"),
        (dict(reward="box"), "--reward box has no effect without --preset"),
    ],
)
def test_bad_settings_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(flags.replace(script.Config(), **given, output_dir=str(tmp_path)))


def result(gain=0.1, random=-0.1, other=0.1, left=0.5):
    """A run in which all methods gain as much."""
    row = lambda accuracy, left=0.5: {
        "accuracy": accuracy,
        "skills": {"count": 0.5, "box": left, "read": left, "choose": 0.5},
    }
    trained = {name: row(0.4 + gain) for name in (*script.Config().methods, methods.SFT)}
    trained |= {methods.RANDOM: row(0.4 + random), methods.PART: row(0.5, left)}
    trained |= {methods.SFT_PART: row(0.5, 0.3)}
    return {
        "start": row(0.4), "methods": trained, "other": row(other), "blank": row(0.1),
        "prior": dict.fromkeys(pictures.SKILLS, 0.15),
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, []),
        (dict(gain=-0.05), [0, 1]),
        (dict(random=0.05), [3]),
        (dict(other=0.3), [4]),
        (dict(left=0.2), [5]),
    ],
)
def test_judge_can_fail(change, fails):
    runs = [copy.deepcopy(result(**change)) for _ in range(3)]
    for i, run in enumerate(runs):  # so that there are intervals
        for rows in run["methods"].values():
            rows["accuracy"] += 0.01 * i
    assert [i for i, claim in enumerate(script.judge(runs)) if not claim.holds] == fails


def test_a_model_that_learnt_from_pictures_answers_about_the_one_that_it_is_shown():
    """With others' pictures it is right as often as answers agree; with blank ones, as one answer is."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 192)
    images = np.eye(3)[labels][:, None, None, None] + rng.normal(0, 0.3, (192, 1, 16, 16, 3))
    records = [{"kind": "choose", "question": "=rgb", "answer": "ABC"[i]} for i in labels]
    some = pictures.Pictures(records, images.astype(np.float32))
    model, params = pictures.small_model(jax.random.key(0), width=32, vision=16)
    rows = pictures.rows_of(some)
    batches = ({k: x[i : i + 32] for k, x in rows.items()} for i in [*range(0, 192, 32)] * 10)
    objective, optimizer = supervised(model.forward), optax.adam(3e-3)
    params = train.fit(params, objective, optimizer, batches)[0].params
    given = pictures.rewards(records)
    sample = rl.answers(model, pictures.Tokenizer(), given, pictures.sampling(), 1)

    def accuracy(images):
        return sample(params, pictures.asked(some, images), jax.random.key(1))["rewards"].mean()

    assert accuracy(some.images) > 0.95
    agree = np.mean(labels == np.roll(labels, 1))
    assert abs(accuracy(np.roll(some.images, 1, axis=0)) - agree) < 0.05
    assert accuracy(np.zeros_like(some.images)) < np.bincount(labels).max() / 192 + 0.1
