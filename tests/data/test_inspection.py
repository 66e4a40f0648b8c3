"""The counts of a data set, worked out by hand, and the command."""

import subprocess
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


def test_the_command_prints_them_and_mistakes_as_one_line(tmp_path, small_tokenizer):
    small_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    command = [sys.executable, "-m", "jaxft.data", "--tokenizer", str(tmp_path / "tokenizer")]
    run = lambda name: subprocess.run(
        [*command, str(tmp_path / name)], capture_output=True, text=True
    )
    good, bad = run("a.jsonl"), run("b.jsonl")
    assert good.returncode == 0 and "1 (1 prompts with completion)" in good.stdout, good.stderr
    assert "⟦ 2" in good.stdout
    assert bad.returncode == 2 and bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1 and "did you mean 'a.jsonl'" in bad.stderr
