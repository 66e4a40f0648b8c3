"""Runs over seeds go on after an interruption."""

import dataclasses
import json
import sys
import types

import pytest

from experiments.lab.seeds import Run, run_seeds


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 4
    rate: float = 0.1
    output_dir: str = "a"
    smoke: bool = False


def test_finished_seeds_are_not_run_again(tmp_path):
    asked = []

    def run(seed, last=9):
        asked.append(seed)
        if seed > last:
            raise KeyboardInterrupt
        return {"seed": seed, "pair": (1, 2.5)}

    with pytest.raises(KeyboardInterrupt):
        run_seeds(Config(), tmp_path, lambda seed: run(seed, last=5))
    # More seeds and another folder's name change no seed's result.
    found, _ = run_seeds(Config(seeds=4, output_dir="b"), tmp_path, run)
    assert asked == [4, 5, 6, 6, 7]
    assert found == [{"seed": seed, "pair": [1, 2.5]} for seed in (4, 5, 6, 7)]
    # The minutes of kept seeds are part of the run's.
    for path in (tmp_path / "seeds").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 60.0}))
    this = Run(Config(), tmp_path, began=0.0, draft=None)
    assert len(this.seeds(Config(seeds=5), run)) == 5 and this.kept == 240.0
    assert asked.pop() == 8
    run_seeds(Config(seeds=1, rate=0.2), tmp_path, run)
    run_seeds(Config(seeds=1, smoke=True), tmp_path, run)
    run_seeds(Config(seeds=1, smoke=True), tmp_path, run)
    assert asked[5:] == [4, 4, 4]
    assert len(list((tmp_path / "seeds").iterdir())) == 6  # No part is left, nothing of smoke runs.


def test_a_changed_script_runs_again(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    for text, kept in (("a = 1", 0), ("a = 1", 1), ("a = 2", 1)):
        script.write_text(text)
        monkeypatch.setitem(sys.modules, __name__, types.SimpleNamespace(__file__=str(script)))
        asked = []
        run_seeds(Config(seeds=1), tmp_path, asked.append)
        assert len(asked) == (text == "a = 2" or not kept)
    assert all(json.loads(p.read_text())["result"] is None for p in (tmp_path / "seeds").iterdir())


@pytest.mark.parametrize(
    "where, name, value",
    [
        ("importlib.metadata", "version", lambda package: "0.0.1"),
        ("jax", "default_backend", lambda: "tpu"),
        ("jax", "device_count", lambda: 99),
        ("jax", "devices", lambda: [types.SimpleNamespace(device_kind="TPU v9")]),
        ("os", "cpu_count", lambda: 999),
    ],
)
def test_other_versions_and_devices_run_again(tmp_path, monkeypatch, where, name, value):
    asked = []
    for _ in range(2):
        run_seeds(Config(seeds=1), tmp_path, asked.append)
    assert asked == [4]
    monkeypatch.setattr(f"{where}.{name}", value)
    run_seeds(Config(seeds=1), tmp_path, asked.append)
    assert asked == [4, 4]
