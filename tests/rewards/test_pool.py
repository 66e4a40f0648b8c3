"""Verifiers in processes that hang, raise and die."""

import functools
import os
import pathlib
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from jaxft.rewards import Failures, VerifierError, VerifierPool, in_process
from tests.rl.rl_task import always_raises, exact, impossible, treacherous

RIGHT = {"answer": "1"}


def test_a_failing_verdict_costs_its_sample_alone():
    completions = ["1", "sleep", "2", "exit", "1", "bad", "1", "1"]
    with VerifierPool(treacherous, workers=2, timeout=1.0) as rewards:
        got = rewards(completions, [RIGHT] * 8)
        np.testing.assert_array_equal(got, [1, np.nan, 0, np.nan, 1, np.nan, 1, 1])
        assert rewards.failures == Failures(timeouts=1, errors=1, deaths=1)
        # It continues after them, and a long wait outside does not count.
        time.sleep(1.1)
        np.testing.assert_array_equal(rewards(["2", "1"], [RIGHT] * 2), [0, 1])
        processes = [worker._process for worker in rewards._pool._workers]
    assert not any(process.is_alive() for process in processes)


def test_too_many_failures_and_no_verifier_are_errors():
    with VerifierPool(always_raises, workers=1) as rewards:
        with pytest.raises(VerifierError, match="2 of 2 verdicts failed .*errors"):
            rewards(["1", "1"], [RIGHT] * 2)
    with VerifierPool(impossible, workers=1) as rewards:
        with pytest.raises(VerifierError, match="no such task"):
            rewards(["1"], [RIGHT])
    with pytest.raises(ValueError, match="got 0 and 5.0"):
        VerifierPool(treacherous, workers=0)


def test_in_process_gives_the_verifiers_numbers():
    assert in_process(exact)(["1", "2"], [RIGHT] * 2) == [1.0, 0.0]


UNGUARDED = """
from jaxft.rewards import VerifierPool
from tests.rl.rl_task import treacherous
with VerifierPool(treacherous, workers=1) as rewards:
    rewards(["1"], [{"answer": "1"}])
"""


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1 and result.stderr.count("Traceback") == 1, result.stderr
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"jaxft.rewards.pool.VerifierError: {script} starts its work when it is")
    assert "put its start under if __name__ == '__main__':" in said


def test_a_function_that_no_process_can_import_is_refused(monkeypatch):
    main = types.ModuleType("__main__")  # A notebook's: no file, and what its cells define.
    monkeypatch.setitem(sys.modules, "__main__", main)

    def make(verifier):
        return verifier

    make.__module__ = "__main__"
    with pytest.raises(ValueError, match="defined in a notebook .* use in_process"):
        VerifierPool(functools.partial(make, exact))
    main.__file__ = "<stdin>"
    with pytest.raises(ValueError, match="comes from <stdin>.* use in_process"):
        VerifierPool(treacherous)
