"""No run of a script prints lines of other libraries; runs with the same verifier share its process."""

import contextlib
import pickle
import re

import pytest

from experiments.cli import rewards
from jaxft.rewards import Failures, VerifierPool, verifier_for
from tests.experiments.verifiers import any_verifier

# Loggers of absl and XLA ("W0000 00:00:17 file.cc:1] ..."), of Python, warnings, progress bars of tqdm.
FOREIGN = re.compile(
    r"^([WEIF]\d{4} |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[.,]\d+|(WARNING|ERROR|INFO):|\[transformers\]|WARNING: )"
    r"|\w+Warning: |\d(it/s|s/it|examples/s|ex/s)\b|\d+%\|"
)


def foreign(text: str) -> list[str]:
    """Lines that are not jaxft's own."""
    return [line for line in text.splitlines() if FOREIGN.search(line)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fails a test that passed but printed such lines; fixtures count as part of their first test."""
    report = yield
    found = foreign(report.capstdout + "\n" + report.capstderr) if report.passed else []
    if found:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} printed lines of other libraries, see cli/quiet.py: {found}"
        )
    return report


KEPT = []  # the pool that scripts share, once one has asked for it


def drop():
    while KEPT:
        KEPT.pop().close()


class Kept:
    """Rewards of a script's verifier in the process that scripts share."""

    def __init__(self, make):
        self._make, self._before = pickle.dumps(make), KEPT[0].failures

    @property
    def failures(self):
        counts = zip(KEPT[0].failures, self._before, strict=True)
        return Failures(*(now - before for now, before in counts))

    def __call__(self, completions, records):
        return KEPT[0](completions, [(self._make, record) for record in records])


@contextlib.contextmanager
def kept_pool(make, **limits):
    """A pool of the one process. A judge, which may have a state, and limits that are given get their own."""
    default = limits in (rewards.LIMITS, rewards.LIMITS | {"workers": 1})
    if make.func is not verifier_for or not default:
        with VerifierPool(make, **limits) as pool:
            yield pool
        return
    if not KEPT:  # A first call imports what its verifier needs.
        KEPT.append(VerifierPool(any_verifier, workers=1, timeout=60.0))
    try:
        yield Kept(make)
    except BaseException:  # in the middle of a verdict, perhaps
        drop()
        raise


@pytest.fixture(autouse=True)
def one_process_of_verifiers(monkeypatch):
    """It takes seconds to start. tests/rewards/test_pool.py has pools of two, and what may happen to them."""
    monkeypatch.setattr(rewards, "VerifierPool", kept_pool)


@pytest.fixture(autouse=True, scope="session")
def no_verifiers_at_the_end():
    yield
    drop()
