"""No run of a script prints lines of other libraries: what the tests' runs print is looked through."""

import re

import pytest

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
