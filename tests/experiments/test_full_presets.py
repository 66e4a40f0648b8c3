"""`--preset full` of the papers' scripts, with the tiny model on a file: the same code as on a pod."""

import json

import pytest

from experiments.cli import flags
from experiments.papers import nft
from experiments.worlds import questions
from jaxft import data


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


def test_the_source_is_the_papers_unless_it_is_given(file):
    sized = lambda **given: questions.sized(flags.replace(nft.Config(), **given), nft.FULL, {})
    paper, own = sized(preset="full"), sized(preset="full", data=file, updates=2)
    assert (paper.rollouts, paper.updates) == (320, 16) and (own.rollouts, own.updates) == (320, 2)
    assert paper.source == nft.DAPO_MATH and own.source.fields == {}
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
