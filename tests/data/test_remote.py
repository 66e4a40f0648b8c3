"""Sources that fail in between: no row twice, none lost, and an end only where the source ends."""

import types

import pytest

from jaxft.data import DataError, load, sources
from jaxft.data.remote import retried


class Flaky:
    """A source of numbers that fails before each of the given rows, so many times."""

    def __init__(self, size, failures, error=None):
        self.size, self.failures, self.opened = size, dict(failures), []
        self.error = error or ConnectionError("reset by peer")

    def __call__(self, start):
        self.opened.append(start)
        for i in range(start, self.size):
            if self.failures.get(i, 0):
                self.failures[i] -= 1
                raise self.error
            yield i


def test_rows_come_once_and_waits_double_until_one_comes():
    waits, source = [], Flaky(6, {0: 1, 3: 3, 4: 1})
    assert list(retried(source, "it", sleep=waits.append)) == list(range(6))
    assert waits == [1, 1, 2, 4, 1]
    assert source.opened == [0, 0, 3, 3, 3, 4]


def test_a_source_that_stays_away_is_an_error_not_an_end():
    waits, taken = [], []
    with pytest.raises(DataError, match="row 2 cannot be read after 3 attempts .reset by peer"):
        taken.extend(retried(Flaky(6, {2: 99}), "it", attempts=3, sleep=waits.append))
    assert waits == [1, 2]


@pytest.mark.parametrize("error", [FileNotFoundError("no such set"), ValueError("no such split")])
def test_what_trying_again_cannot_mend_is_an_error_at_once(error):
    with pytest.raises(DataError, match="no such s"):
        list(retried(Flaky(6, {0: 1}, error), "it", sleep=pytest.fail))


def test_a_streamed_hub_set_is_read_through_a_failure_and_no_further_than_its_limit(monkeypatch):
    import datasets

    calls, broken = [], [True]

    def rows():
        for i in range(100):
            if i == 3 and broken:
                broken.pop()
                raise ConnectionError("reset by peer")
            yield {"prompt": f"question {i}", "completion": f"answer {i}"}

    def load_dataset(name, **options):
        calls.append((name, options))
        return datasets.IterableDataset.from_generator(rows)

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setattr(sources, "_datasets", lambda: fake)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    records = load("someone/set?split=test&streaming=true&limit=5")
    assert [record["prompt"] for record in records] == [f"question {i}" for i in range(5)]
    assert calls == [("someone/set", {"split": "test", "streaming": True})] * 2
