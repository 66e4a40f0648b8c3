import dataclasses

import jax
import optax
import pytest

from jaxft.parallel import HostLostError
from jaxft.train import (
    DivergedError,
    MissingDependencyError,
    OutputError,
    PreemptedError,
    fit,
    run_main,
)


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
        (MissingDependencyError("wandb_log needs wandb"), 3, "error: wandb_log needs wandb"),
        (DivergedError("diverged at step 4", 4), 4, "error: diverged at step 4"),
        (PreemptedError("SIGTERM at step 3"), 75, "preempted: SIGTERM at step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
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


def test_the_result_of_main_is_returned():
    assert run_main(lambda config: {"loss": 1.0}, Config()) == {"loss": 1.0}
