"""Runs that give no pair."""

import contextlib
import types

import pytest

from experiments import sample_pairs
from experiments.cli import flags
from jaxft.data import DataError


def test_no_pairs_are_an_error_and_an_earlier_file_stays(tmp_path, monkeypatch):
    cut = lambda model, params, asked, *args, samples, **how: types.SimpleNamespace(
        completions=[[40]] * len(asked) * samples, finish=["length"] * len(asked) * samples
    )
    monkeypatch.setattr(sample_pairs, "generate", cut)
    scores = lambda texts, records: [0.0] * len(texts)
    opened = lambda *args: contextlib.nullcontext(scores)
    monkeypatch.setattr(sample_pairs.rewards_cli, "opened", opened)
    (tmp_path / "q.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "pairs.jsonl").write_text("earlier")
    config = flags.replace(
        sample_pairs.Config(),
        model="tiny",
        data=str(tmp_path / "q.jsonl"),
        output=str(tmp_path / "pairs.jsonl"),
    )
    with pytest.raises(DataError, match="no pairs.*4 of 4 answers had no score.*--keep-truncated"):
        sample_pairs.main(config)
    assert {path.name for path in tmp_path.iterdir()} == {"q.jsonl", "pairs.jsonl"}
    assert (tmp_path / "pairs.jsonl").read_text() == "earlier"
