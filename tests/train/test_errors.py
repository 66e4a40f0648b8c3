import dataclasses
import os
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import optax
import pytest

from jaxft.generation import ServerError
from jaxft.optim.sharpness import in_parts
from jaxft.parallel import HostLostError
from jaxft.train import (
    DivergedError,
    MissingDependencyError,
    OutputError,
    PreemptedError,
    fit,
    run_main,
    signals,
)
from tests.processes import ROOT


@dataclasses.dataclass
class Config:
    debug: bool = False


def fails(error):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("rank must be\n   positive"), 2, "error: rank must be positive (JAXFT_DEBUG=1"),
        (FileNotFoundError(2, "No such file", "data.jsonl"), 2, "No such file: 'data.jsonl'"),
        (OutputError("full"), 2, "error: full"),
        (ServerError("http://x: asked for 3 tokens"), 2, "error: http://x: asked for 3 tokens"),
        (MissingDependencyError("wandb_log needs wandb"), 3, "error: wandb_log needs wandb"),
        (DivergedError("diverged at step 4", 4), 4, "error: diverged at step 4"),
        (PreemptedError("SIGTERM at step 3"), 75, "preempted: SIGTERM at step 3\n"),
        (HostLostError("save 4: process 1 of 2 did not come"), 5, "error: save 4: process 1 of 2"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: needs 20G\nlong table"),
            2,
            "error: out of memory: RESOURCE_EXHAUSTED: needs 20G. Try --remat full, fewer rows",
        ),
    ],
)
def test_errors_of_users_are_a_line_and_a_code(capsys, monkeypatch, error, code, text):
    monkeypatch.delenv("JAXFT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught:
        run_main(fails(error), Config())
    printed = capsys.readouterr()
    assert caught.value.code == code
    assert text in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("JAXFT_DEBUG", raising=False)
    for error in (TypeError("bug"), ZeroDivisionError(), jax.errors.JaxRuntimeError("INTERNAL")):
        with pytest.raises(type(error)):
            run_main(fails(error), Config())


def test_debugging_keeps_every_traceback(monkeypatch):
    monkeypatch.delenv("JAXFT_DEBUG", raising=False)
    with pytest.raises(ValueError):
        run_main(fails(ValueError()), Config(debug=True))
    monkeypatch.setenv("JAXFT_DEBUG", "1")
    with pytest.raises(ValueError):
        run_main(fails(ValueError()), Config())


def test_an_error_inside_training_is_no_mistake_of_the_user(problem, monkeypatch):
    monkeypatch.delenv("JAXFT_DEBUG", raising=False)

    def batches():
        yield problem.make_batch(0)
        raise ValueError("record 1000 is broken")

    def main(config):
        fit(problem.make_params(), problem.objective, optax.sgd(0.1), batches())

    with pytest.raises(ValueError, match="record 1000") as caught:
        run_main(main, Config())
    assert caught.value.__notes__ == ["in training, at step 1"]


@pytest.mark.parametrize(
    "fail, code",
    [
        (lambda batch: in_parts(batch, 3), 2),  # jaxft refuses the batch's size
        (lambda batch: np.einsum("ab", np.ones(3)), None),  # a bug in the objective
    ],
)
def test_what_the_first_step_refuses_while_it_is_traced_is_a_line(
    problem, fail, code, monkeypatch, capsys
):
    monkeypatch.delenv("JAXFT_DEBUG", raising=False)

    def main(config):
        objective = lambda params, batch, key: (fail(batch), problem.objective(params, batch, key))[
            1
        ]
        fit(problem.make_params(), objective, optax.sgd(0.1), [problem.make_batch(0)])

    with pytest.raises(SystemExit if code else ValueError) as caught:
        run_main(main, Config())
    if code:
        assert caught.value.code == code and capsys.readouterr().err.count("\n") == 1
    else:
        assert caught.value.__notes__[-1] == "in training, at step 0"


def test_the_result_of_main_is_returned():
    assert run_main(lambda config: {"loss": 1.0}, Config()) == {"loss": 1.0}


# Runs each moment that it reads a line of in a forked child: imports take longer than they do.
INTERRUPTED = """
import contextlib, functools, os, sys, time
import jax, jax.numpy as jnp
from jaxft.train import run_main

def ready():
    print("ready", flush=True)

def host(x):
    for _ in range(100):
        time.sleep(0.01)
    return x

def long_loop(body):
    run = jax.jit(lambda x: jax.lax.fori_loop(0, 100_000, body, x)).lower(jnp.ones((64, 64))).compile()
    ready()
    return run(jnp.ones((64, 64)))

def deep(x):
    for i in range(200):
        x = jnp.sin(x) @ x + i
    return x

def compile_deep():
    lowered = jax.jit(deep).lower(jnp.ones((8, 8)))
    ready()
    lowered.compile()
    time.sleep(60)

def callback(i, x):
    return jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

def slow_end():
    try:
        ready()
        time.sleep(60)
    finally:
        ready()
        time.sleep(60)

works = {
    "decode": lambda: jax.block_until_ready(long_loop(lambda i, x: jnp.tanh(x @ x))),
    "async": lambda: (long_loop(lambda i, x: jnp.tanh(x @ x)), time.sleep(60)),
    "compile": compile_deep,
    "callback": lambda: jax.block_until_ready(long_loop(callback)),
    "second": slow_end,
}

def main(moment, path, config):
    with contextlib.closing(open(path, "w")) as log:
        log.write("logged")
        works[moment]()

for line in sys.stdin:
    moment, log, said = line.split()
    child = os.fork()
    if not child:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        print(os.getpid(), flush=True)
        run_main(functools.partial(main, moment, log), None)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def interrupted():
    """(moment, log, file of what is said) -> the exit code of a run to which Ctrl-C comes at that moment."""
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAXFT_DEBUG": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def code(moment, *paths):
        print(moment, *paths, file=process.stdin, flush=True)
        child = int(process.stdout.readline())
        for _ in range(2 if moment == "second" else 1):
            assert process.stdout.readline() == "ready\n"
            os.kill(child, signal.SIGINT)
        return int(process.stdout.readline())

    yield code
    process.kill()
    process.communicate()


@pytest.mark.parametrize("moment", ["decode", "async", "compile", "callback", "second"])
def test_ctrl_c_is_one_line_and_130(tmp_path, interrupted, moment):
    log, file = tmp_path / "log", tmp_path / "said"
    code, said = interrupted(moment, log, file), file.read_text()
    assert code == 130 and said.endswith("interrupted\n")
    # JAX itself logs what a host callback raised.
    assert moment == "callback" or said == "interrupted\n"
    assert log.read_text() == "logged"  # what main opened is closed


def test_an_error_that_ctrl_c_has_become_is_ctrl_c(monkeypatch, capfd):
    """Imports and callbacks of libraries catch KeyboardInterrupt and raise their own errors."""
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit(code))
    before = signal.getsignal(signal.SIGINT)

    def main(config):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not import") from None

    with pytest.raises(SystemExit):
        run_main(main, Config())
    assert ended == [130] and capfd.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_while_a_script_is_imported_is_one_line_and_130(tmp_path):
    """At the first import that takes seconds, which here is a jax that waits."""
    (tmp_path / "jax.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    scripts = [ROOT / "experiments" / name for name in ("sft.py", "papers/paca/main.py")]
    for script in scripts:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "interrupted\n"
        assert process.returncode == 130


def test_every_script_begins_with_what_ends_it_quietly():
    from experiments.__main__ import scripts
    from experiments.cli.interrupts import runs_a_script

    first = "from __future__ import annotations\n\nimport experiments.cli.interrupts  # noqa"
    for script in scripts():
        assert first in script.read_text(), script
        assert runs_a_script(types.SimpleNamespace(__file__=str(script)))
    assert not runs_a_script(types.SimpleNamespace(__file__=pytest.__file__))
    assert not runs_a_script(types.SimpleNamespace())  # an interactive interpreter


@pytest.mark.parametrize("terminal", [False, True])
def test_the_line_about_a_signal_is_a_line_beside_a_progress_bar(terminal, monkeypatch):
    written = []
    monkeypatch.setattr(signals.os, "isatty", lambda file: terminal)
    monkeypatch.setattr(signals.os, "write", lambda file, text: written.append(text.decode()))
    with signals.catch_preemption() as preempted:
        signal.raise_signal(signal.SIGINT)
        assert preempted(1) == "SIGINT"
    said = "SIGINT: the run stops and is saved after this step; Ctrl-C once more ends it at once\n"
    assert written == [("\n" if terminal else "") + said]
