"""R1-AQA: clips are what their answers say, groups keep their clip, judge, the full preset, reinforce.py."""

import copy
import json
import re

import jax
import numpy as np
import pytest

from experiments import reinforce
from experiments.cli import flags
from experiments.papers.r1_aqa import main as script
from experiments.papers.r1_aqa import worlds
from experiments.worlds import sounds, spoken
from jaxft import data, rl
from jaxft.rl.rollouts import model_inputs
from jaxft.train import MissingDependencyError
from tests import audio_models
from tests.data.test_audio import RATE, tone, wav


@pytest.fixture(scope="module")
def drawn():
    return sounds.draw(np.random.default_rng(0), 48)


def test_smoke(tmp_path):
    assert script.main(script.Config(smoke=True, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert list(run["methods"]) == ["sft", "grpo"] and run["skills"] == [["p", "n"], ["w", "l"]]
    for row in run["methods"].values():
        assert [point["step"] for point in row["curve"]] == [2]
    assert np.allclose(run["methods"]["grpo"]["kl"][0], 0, atol=1e-5)
    assert (tmp_path / "r1_aqa.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", "pnwl")
def test_clips_have_the_class_of_their_answer(kind):
    """Measured in the samples without noise: frequencies by crossings of zero, loudness by energy."""
    rng = np.random.default_rng(1)
    for name in sounds.SKILLS[kind] * 3:
        quiet = sounds.SOUNDS[kind](rng, name)
        assert quiet.shape == (10240,) and np.abs(quiet).max() < 4
        if kind == "p":
            hertz = [np.count_nonzero(np.diff(np.sign(x))) for x in np.array_split(quiet, 3)]
            ups = {"r": (1, 1), "f": (-1, -1), "k": (1, -1), "d": (-1, 1)}
            assert tuple(np.sign(np.diff(hertz))) == ups[name]
        elif kind == "n":
            loud = np.abs(quiet).reshape(-1, 80).max(axis=1) > 0.05
            assert np.count_nonzero(np.diff(loud.astype(int), prepend=0) == 1) == int(name)
        elif kind == "w":
            level = np.sqrt(np.mean(quiet**2)) / np.abs(quiet).max()
            bounds = {"s": (0.69, 0.72), "q": (0.9, 1.01), "a": (0.56, 0.6), "z": (0, 0.4)}[name]
            assert bounds[0] < level < bounds[1]
        else:
            first, second = (np.mean(x**2) for x in np.split(quiet, 2))
            assert {
                "x": first > 2 * second, "y": second > 2 * first, "o": first == second == 0,
                "e": second > 0 and abs(first / second - 1) < 0.1,
            }[name]  # fmt: skip


def test_noise_is_10_to_20_decibels_below_the_sound():
    rng, sound = np.random.default_rng(0), sounds.SOUNDS["w"](np.random.default_rng(0), "s")
    levels = []
    for _ in range(50):
        noise = sounds.noisy(rng, sound) - sound
        levels.append(10 * np.log10(np.mean(sound**2) / np.mean(noise**2)))
    assert 9.8 < min(levels) < 11 and 19 < max(levels) < 20.2


def test_questions_have_the_right_option_once_in_any_place(drawn):
    places = set()
    for record in drawn.records:
        kind, *options = record["question"]
        assert sorted(options) == sorted(sounds.SKILLS[kind])
        places.add(options.index(record["answer"]))
    assert places == {0, 1, 2, 3}
    digits = sounds.question(np.random.default_rng(0), "d", spoken.SKILLS["d"])
    assert len(set(digits["question"][1:])) == 4 and digits["answer"] in digits["question"]
    assert all(0 < x < 0.6 for x in sounds.text_prior(drawn, drawn).values())


def test_rows_are_prompt_answer_and_stop_with_both_rewards(drawn):
    for kind in sounds.LIMITS:
        rows, asked = (
            sounds.rows_of(drawn, kind, np.random.default_rng(0)),
            sounds.asked(drawn, kind),
        )
        assert len(asked.ids[0]) == 16 + 1 + 4 + 1  # embeddings, skill, options, kind of answer
        texts = []
        for i, record in enumerate(drawn.records):
            tokens, mask = rows["tokens"][i], rows["loss_mask"][i] > 0
            texts.append(sounds.Tokenizer().decode(tokens[mask]).strip())
            assert texts[-1].endswith(f"<answer>{record['answer']}</answer>")
            assert tokens[(rows["segment_ids"][i] > 0) & ~mask].tolist() == asked.ids[i]
        assert (sounds.rewards(drawn, kind).parts(texts, drawn.records) == 1).all()
    thought = re.compile(r"<think>\.{1,3}</think><answer>.</answer>")
    assert all(map(thought.fullmatch, texts))


def test_other_clips_are_of_the_same_skill_and_each_is_used_once(drawn):
    swapped = sounds.others(drawn)
    found = [int(np.flatnonzero((drawn.audio == x).all(axis=(1, 2, 3)))[0]) for x in swapped.audio]
    assert sorted(found) == list(range(48)) and all(i != j for i, j in enumerate(found))
    assert all(drawn.records[i]["kind"] == drawn.records[j]["kind"] for i, j in enumerate(found))
    asked = sounds.asked(drawn, sounds.ANSWER, swapped)
    assert asked.records == drawn.records and (asked.columns["audio"] == swapped.audio).all()


def test_each_row_of_a_group_keeps_the_clip_of_its_prompt(drawn):
    """The released code repeats clips in tiled order beside interleaved prompts: other log-probs."""
    some = drawn.of(range(3))
    model, params = sounds.small_model(jax.random.key(0), width=16, heard=16)
    sample = rl.answers(
        model, sounds.Tokenizer(), sounds.rewards(some, sounds.ANSWER), sounds.sampling(sounds.ANSWER), 2
    )  # fmt: skip
    batch = sample(params, sounds.asked(some, sounds.ANSWER), jax.random.key(1))
    for i in range(6):
        np.testing.assert_array_equal(batch["audio"][i], some.audio[i // 2])
    score = jax.jit(lambda batch: rl.policy_log_probs(model.forward, params, batch, 1.0))
    mask, inputs = batch["completion_mask"], model_inputs(batch)
    gap = lambda audio: np.abs(score(inputs | {"audio": audio}) - batch["sampler_log_probs"])[mask]
    assert gap(batch["audio"]).max() < 1e-4
    tiled = np.tile(some.audio, (2, 1, 1, 1))
    assert gap(tiled).max() > 1e-2


def test_commands_of_spoken_words_and_the_refusal_without_the_program(monkeypatch):
    rng = np.random.default_rng(0)
    for kind, classes in spoken.SKILLS.items():
        for answer in classes:
            program, *given, word = spoken.command(rng, kind, answer, "a.wav")
            options = dict(zip(given[::2], given[1::2], strict=True))
            assert program == "espeak-ng" and options["-w"] == "a.wav" and word in spoken.WORDS
            speed, pitch = int(options["-s"]), int(options["-p"])
            assert 80 <= speed <= 450 and 0 <= pitch <= 99
            if kind == "d":
                assert word == spoken.WORDS[int(answer)]
            elif kind == "v":
                assert options["-v"] == f"en+{spoken.VOICES[answer]}"
            elif kind == "s":
                assert spoken.SPEEDS[answer][0] <= speed <= spoken.SPEEDS[answer][1]
            else:
                assert spoken.PITCHES[answer][0] <= pitch <= spoken.PITCHES[answer][1]
                assert options["-v"] != "en+whisper"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="apt-get install espeak-ng") as error:
        spoken.draw(rng, 2)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a small random Qwen2-Audio, and questions about clips beside it."""
    path = tmp_path_factory.mktemp("sounds")
    audio_models.write_random(path / "model")
    rows, asked = [], []
    for i in range(12):
        (path / f"{i}.wav").write_bytes(wav(tone(0.2 + 0.01 * i, hertz=300.0 * (1 + i % 2))))
        answer = ["low", "high"][i % 2]
        row = {"question": "Which tone has the video?", "answer": answer, "audio": f"{i}.wav"}
        rows.append(row | {"options": ["low", "high"]})
        asked.append(row)
    for name, lines in (("rows", rows), ("asked", asked)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def test_reinforce_trains_qwen2_audio_on_a_file(place):
    given = dict(
        model=str(place / "model"), data=str(place / "asked.jsonl"), output_dir=str(place / "grpo"),
        prompts_per_step=2, group_size=2, max_steps=2, max_new_tokens=3, target="language",
        save_steps=100, workers=1, rank=2,
    )  # fmt: skip
    assert reinforce.main(flags.replace(reinforce.Config(), **given))["steps"] == 2
    assert (place / "grpo" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "samples, rate, message",
    [
        (tone(rate=8000), 8000, "has 8000 samples per second, expected 16000"),
        (np.stack([tone(), tone()], axis=1), RATE, "has 2 channels, expected one"),
        (tone(1.2), RATE, r"lasts 1\.2 s, and the model reads 1 s at a time; cut it"),
    ],
)
def test_clips_that_do_not_fit_end_reinforce_before_it_starts(
    place, samples, rate, message, tmp_path
):
    (tmp_path / "a.wav").write_bytes(wav(samples, rate))
    row = {"question": "What?", "answer": "low", "audio": "a.wav"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    given = dict(model=str(place / "model"), data=str(tmp_path / "rows.jsonl"))
    given |= dict(eval_data=str(place / "asked.jsonl"), output_dir=str(tmp_path / "run"))
    with pytest.raises(data.DataError, match=message):
        reinforce.main(flags.replace(reinforce.Config(), **given))


def test_full_preset(place):
    """A small random Qwen2-Audio on a file: the same code as on a pod."""
    given = dict(preset="full", smoke=True, data=str(place / "rows.jsonl"), fsdp=1)
    given |= dict(model=str(place / "model"), output_dir=str(place / "full"))
    assert script.main(flags.replace(script.Config(), **given)) == 0
    (run,) = json.loads((place / "full" / "metrics.json").read_text())["runs"]
    assert set(run["methods"]) == {"sft", "grpo"} and run["other"]["skills"] == {"all": 0}


def test_questions_of_avqa_become_the_paper_s_prompts():
    row = {
        "question": "What is in the video?",
        "multi_choice": ["dog", "cat"],
        "audio_path": "a.wav",
    }
    record = worlds.as_question(row | {"answer": 1})
    assert record["answer"] == "cat" and record["prompt"][0]["content"] == (
        "<audio>What is in the audio? Please choose the answer from the following options: ['dog', 'cat']. "
        "Output the final answer in <answer> </answer>."
    )
    for change, message in (
        ({"answer": "horse"}, "is none of the options"),
        ({"multi_choice": None}, "are not a question about a clip"),
        ({"audio_path": None}, "are not a question about a clip"),
    ):
        with pytest.raises(data.DataError, match=message):
            worlds.as_question(row | {"answer": 1} | change)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(methods=("sft", "grpo", "dpo")), "no method 'dpo'; give some of sft, grpo"),
        (dict(methods=("grpo",)), "must have sft and grpo"),
        (dict(preset="full"), "no file 'sounds.jsonl'; give questions about your own WAV files"),
        (dict(preset="full", world="spoken"), "--world"),
        (dict(data="a.jsonl"), "--data"),
    ],
)
def test_bad_settings_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main(flags.replace(script.Config(), **given, output_dir=str(tmp_path)))


def result(gain=0.1, left=0.5, think=0.0, other=0.25, fits=0.9):
    """A run with this gain of GRPO, and so on; SFT gains 0.05."""
    row = lambda x, left=0.5, fits=0.6: {
        "trained": x, "greedy_trained": x, "left": left,
        "curve": [{"step": 2, "known": fits, "new": x}],
    }  # fmt: skip
    trained = {"sft": row(0.55, 0.4, fits), "grpo": row(0.5 + gain, left)}
    trained["grpo_think"] = row(0.5 + gain + think)
    return {
        "start": row(0.5), "start_think": row(0.5), "methods": trained, "other": row(other),
        "sft_longer": row(0.8),
        "prior": dict.fromkeys("pnwl", 0.25), "skills": [["p", "n"], ["w", "l"]],
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, []),
        (dict(gain=-0.05, fits=0.95), [0, 1]),
        (dict(gain=0.03), [1]),
        (dict(left=0.3), [2]),
        (dict(think=0.1), [3]),
        (dict(other=0.4), [4]),
        (dict(fits=0.55), [5]),
    ],
)
def test_judge_can_fail(change, fails):
    runs = [copy.deepcopy(result(**change)) for _ in range(3)]
    for i, run in enumerate(runs):  # so that there are intervals
        run["methods"]["grpo"]["trained"] += 0.004 * i
        run["methods"]["grpo_think"]["trained"] += 0.004 * (i - 1)
        run["methods"]["grpo"]["left"] += 0.01 * i
        run["other"]["trained"] += 0.002 * i
        run["methods"]["sft"]["curve"][-1]["known"] += 0.01 * i
    assert [i for i, claim in enumerate(script.judge(runs)) if not claim.holds] == fails
