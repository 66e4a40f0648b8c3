"""`--preset full` of the papers' scripts, with the tiny model on a file: the same code as on a pod."""

import json

import jax
import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers import echo_chamber as echo
from experiments.papers import nft, otr, rlgf
from experiments.papers.mrt import main as mrt
from experiments.papers.reasoning_survey import main as survey
from experiments.papers.reft import main as reft
from experiments.papers.reft import worlds
from experiments.worlds import questions, solutions
from jaxft import data
from jaxft.checkpoints import load_model
from jaxft.generation import SamplingConfig, generate
from tests.experiments.tracing import trace_fits


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Questions with answers, in columns of our names; one question is too long for --max-prompt."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is\n#### {i + 1}"} for i in range(19)]
    rows.append({"question": "What is 1 + 1? " * 60, "answer": "2"})
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def full(script, file, output, **given):
    settings = dict(preset="full", smoke=True, data=file, fsdp=1, output_dir=str(output))
    return flags.replace(script.Config(), **settings | given)


def test_nft(file, tmp_path, capsys):
    assert nft.main(full(nft, file, tmp_path)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert set(run["methods"]) == {"NFT", "GRPO"} and "identity" not in run
    row = run["methods"]["NFT"]
    assert 0 <= row["pass@1"] <= row["pass@8"] <= 1 and 4 < row["entropy"] < 7  # ln 259 = 5.6
    assert "held-out records of questions.jsonl" in capsys.readouterr().out


def test_otr(file, tmp_path):
    assert otr.main(full(otr, file, tmp_path, learning_rate=0.03)) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    first, _, last = metrics["runs"][0]["otr"]
    assert first["kl target"] == first["kl old"] == 0 and last["kl old"] != 0
    assert 0 <= last["hit_rate"] <= 1
    assert metrics["claims"][0]["text"].startswith("where SFT and OTR are equally accurate")


def test_mrt(file, tmp_path):
    assert mrt.main(full(mrt, file, tmp_path)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert list(run) == ["start", "grpo", "grpo_lenpen", "mrt_online", "mrt_stale"]
    for row in run.values():
        assert 0 <= row["accuracy"] <= 1 and row["length"] <= 8 and row["regret"] > 0
    # Forced texts and their answers cost more than the answers of 8 tokens.
    assert run["mrt_online"]["tokens"] > 2 * run["grpo"]["tokens"]


def test_reft(file, tmp_path):
    assert reft.main(full(reft, file, tmp_path)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert {name: [row["step"] for row in rows] for name, rows in run.items()} == {
        name: [0, 4] for name in reft.SMOKE["algo"]
    }
    assert all(0 <= rows[1][m] <= 1 for rows in run.values() for m in reft.MEASURES)


def test_rlgf(file, tmp_path):
    assert rlgf.main(full(rlgf, file, tmp_path)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert run["methods"]["PPO"]["guide_tokens"] == 0 < run["methods"]["D2LOLS"]["guide_tokens"]
    with pytest.raises(ValueError, match="--guide-model gpt2 has no effect without --preset"):
        rlgf.main(flags.replace(rlgf.Config(), guide_model="gpt2", output_dir=str(tmp_path)))


def test_reasoning_survey(file, tmp_path, monkeypatch):
    traced = []
    trace_fits(monkeypatch, traced)
    assert survey.main(full(survey, file, tmp_path, depth=2)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert {"majority", "MCTS", "debate"} <= set(run["curves"])
    assert set(run["learned"]) == {"start", "RFT", "GRPO"}
    # Two verifiers and GRPO, and RFT if the start has a right answer.
    assert len(traced) in (3, 4)


def test_echo_chamber(file, tmp_path):
    texts = ("def f():\n    return {}", "<llm-code>\n{}\n</llm-code>", "It is {}")
    for i, text in enumerate(texts):
        rows = [{"question": f"{n} + 1?", "answer": text.format(n + 1)} for n in range(9)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pretraining = tuple(str(tmp_path / f"{i}.jsonl") for i in range(3))
    given = dict(pretraining=pretraining, learning_rate=0.01)
    assert echo.main(full(echo, file, tmp_path, **given)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    for rows in run.values():
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert all(sum(row["shares"]) == pytest.approx(1) for row in rows)
    with pytest.raises(ValueError, match="one source for each of"):
        echo.main(full(echo, file, tmp_path, pretraining=pretraining[:2]))


@pytest.mark.parametrize(
    "text, number, answer",
    [
        ('def simple_math_problem() -> int:\n    """1 + 1?"""\n    return 1 + 1\n', 0, "2"),
        ("Add.\n<llm-code>\na = 1\nb = a + 1\nb\n</llm-code>\nSo it is 2.", 1, "2"),
        ("<llm-code>\na = 3\nb = a * 7\n</llm-code>", 1, "21"),
        ("<llm-code>\na = (\n</llm-code> The answer is 2.", 1, None),  # It does not compile.
        ("One and one: \\boxed{2}", 2, "2"),
        ("two", 2, None),
        ("def ", 0, None),
    ],
)
def test_answers_of_solutions_in_three_formats(text, number, answer):
    assert solutions.format_of(text) == number and solutions.answer_of(text) == answer


def test_answers_sampled_in_parts_are_those_of_one_call():
    model, params = load_model("tiny")
    task = questions.Task(questions.Settings(sampled_at_once=4), model, params, *[None] * 5)
    prompts, config = [[5, 6, 7], [8, 9], [10, 11, 12]], SamplingConfig(4)
    arguments = (model, params, prompts, jax.random.key(0), config)
    parts = questions.sampler(task)(*arguments, samples=2)
    whole = generate(*arguments, samples=2)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    assert parts.mask.shape == (6, 4) and parts.finish == whole.finish


@pytest.mark.parametrize("rows, at_once, parts", [(512, 64, 8), (8, 16, 1), (10, 4, 5), (7, 2, 7)])
def test_a_step_has_equal_parts_that_fit(rows, at_once, parts):
    settings = questions.Settings(trained_at_once=at_once)
    assert questions.microbatches(questions.Task(settings, *[None] * 7), rows) == parts


def test_annotated_workings_are_read_in_every_form():
    read = lambda row, **fields: worlds.FORM(row, fields)
    gsm8k = read({"question": "1 + 1?", "answer": "One and one\n#### 2"})
    assert gsm8k == {
        "question": "1 + 1?",
        "prompt": "Question:\n1 + 1?\nAnswer reasoning:\n",
        "completion": "One and one\n#### 2",
        "answer": "2",
    }
    authors = {"question": "1 + 1?", "answer_cot": "One and one", "answer_value": 2}
    own = read(authors, prompt="question", completion="answer_cot", answer="answer_value")
    assert own == gsm8k | {"completion": "One and one", "answer": 2}
    with pytest.raises(data.DataError, match="no working; name its column"):
        read({"question": "1 + 1?"})


def test_the_source_is_the_papers_unless_it_is_given(file):
    sized = lambda **given: questions.sized(flags.replace(nft.Config(), **given), nft.FULL, {})
    paper, own = sized(preset="full"), sized(preset="full", data=file, updates=2)
    assert (paper.rollouts, paper.updates) == (320, 16) and (own.rollouts, own.updates) == (320, 2)
    assert paper.source.data == nft.DAPO_MATH.data and own.source.data == file
    assert paper.source.fields == nft.FULL["fields"] and own.source.fields == {}
    assert sized() == nft.Config()  # The default size is as written.
    with pytest.raises(ValueError, match="--model x has no effect without --preset"):
        sized(model="x")


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(data="none.jsonl"), data.DataError, "none.jsonl: no such file"),
        (dict(max_prompt=2), data.DataError, "questions have more than --max-prompt 2"),
        (dict(max_new_tokens=600), ValueError, "make 984 tokens, more than the 512 positions"),
    ],
)
def test_what_does_not_fit_is_one_line(file, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        nft.main(full(nft, file, tmp_path, **given))


@pytest.mark.parametrize(
    "script, name, value",
    [
        (nft, "until", 0.3),
        (otr, "width", 64),
        (echo, "layers", 3),
        (reft, "rerank", True),
        (rlgf, "learner", 0.5),
    ],
)
def test_flags_of_the_small_task_are_refused(script, name, value, file, tmp_path):
    with pytest.raises(ValueError, match=f"--{name}.* has no effect with --preset full"):
        script.main(full(script, file, tmp_path, **{name: value}))
