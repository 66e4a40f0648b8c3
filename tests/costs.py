"""The list of slow tests, tests/slow.txt, and the plugin of pytest that measures it."""

import collections
import os
import pathlib

import pytest

FILE = pathlib.Path(__file__).parent / "slow.txt"
# CPU seconds, which unlike wall seconds do not depend on what else runs.
DEAREST_OF_FAST = 0.7


def read() -> dict[str, str]:
    """Returns the one case that is fast, or "", of each function with slow cases."""
    lines = FILE.read_text().splitlines()
    return dict((line.split(" but ", 1) + [""])[:2] for line in lines if line[:1] != "#")


def slow(seconds: dict[str, float]) -> dict[str, str]:
    """Returns what `read` does, given the CPU seconds of each test by node id.

    A function is slow if one of its cases is. Its cheapest case counts as fast if it is not the
    only one and below the same bound. Of a folder that is slow throughout, the cheapest function
    counts as fast.
    """
    cases = collections.defaultdict(dict)
    for node, cost in seconds.items():
        function, _, case = node.partition("[")
        cases[function][f"[{case}"] = cost
    found = {}
    for function, costs in cases.items():
        if max(costs.values()) >= DEAREST_OF_FAST:
            cheapest = min(costs, key=costs.get)
            fast = len(costs) > 1 and costs[cheapest] < DEAREST_OF_FAST
            found[function] = cheapest if fast else ""
    folder = lambda function: function.split("::")[0].rpartition("/")[0]
    for place in {*map(folder, cases)} - {folder(f) for f in cases if found.get(f) != ""}:
        here = {f: sum(costs.values()) for f, costs in cases.items() if folder(f) == place}
        del found[min(here, key=here.get)]
    return found


def write(found: dict[str, str]) -> None:
    """Writes the list that `read` reads."""
    lines = [f"{name} but {case}" if case else name for name, case in sorted(found.items())]
    head = "# Written by `make test-costs`: functions with slow tests, and which case is fast."
    FILE.write_text("\n".join([head, *lines]) + "\n")


class Costs:
    """Measures each test's CPU seconds, those of its processes included, and writes the list."""

    def __init__(self):
        self.seconds = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        item.cpu_before = _spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item):
        report = yield
        report.cpu_seconds = _spent() - item.cpu_before  # xdist sends it to the main process
        return report

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = report.cpu_seconds

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return
        if session.config.option.markexpr != "not slow":
            return write(slow(self.seconds))
        # By themselves, some pay for what a slow one did before them.
        dear = {node for node, cost in self.seconds.items() if cost >= DEAREST_OF_FAST}
        write(read() | dict.fromkeys((node.partition("[")[0] for node in dear), ""))


def _spent():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
