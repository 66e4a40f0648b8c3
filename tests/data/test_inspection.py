"""The counts of a data set, worked out by hand, and the command."""

import runpy
import sys

import pytest

from jaxft.data import Renderer, inspect


@pytest.fixture
def spec():
    tokens = lambda n: {"tokens": [5] * n, "loss_mask": [0] * (n // 2) + [1] * (n - n // 2)}
    return [tokens(4) | {"id": "a"}, tokens(4) | {"id": "a"}, tokens(6), tokens(40)]


def test_counts_are_those_worked_out_by_hand(spec, small_tokenizer):
    result = inspect(spec, Renderer(small_tokenizer), 8)
    assert (result.records, result.sequences, result.tokens) == (4, 3, 14)
    assert result.trained == 7 / 14
    assert result.percentiles[100] == 40
    assert result.left_out == "1 too_long"
    assert (result.duplicates, result.duplicate_ids) == (1, 1)
    assert result.packing_efficiency == (8 + 6) / 16  # rows [4 + 4] and [6]
    assert len(result.examples) == 3
    assert "packing efficiency    87.5%" in str(result)


def test_the_command_prints_them_and_mistakes_as_one_line(
    tmp_path, small_tokenizer, monkeypatch, capsys
):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')

    def run(name):
        arguments = ["--tokenizer", str(tmp_path / "tokenizer"), str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["jaxft.data", *arguments])
        monkeypatch.delitem(
            sys.modules, "jaxft.data.__main__", raising=False
        )  # another test imports it
        runpy.run_module("jaxft.data", run_name="__main__", alter_sys=True)

    run("a.jsonl")
    good = capsys.readouterr().out
    assert "1 (1 prompts with completion)" in good and "⟦ 2" in good
    with pytest.raises(SystemExit) as ended:
        run("b.jsonl")
    bad = capsys.readouterr().err
    assert ended.value.code == 2 and bad.startswith("error: ")
    assert len(bad.splitlines()) == 1 and "did you mean 'a.jsonl'" in bad
