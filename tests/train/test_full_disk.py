"""A disk that is full: every writer ends the run at once, says what to do, and loses nothing."""

import json
import pathlib

import chex
import optax
import pytest

from jaxft.adapters import partition
from jaxft.output import size_text, writing
from jaxft.train import Callback, Checkpoints, OutputError, fit, jsonl_log, run_figure

FULL = OSError(28, "No space left on device")


class FullFile:
    """A file on a disk that is full from its third line on."""

    def __init__(self, path, lines=2):
        self.file, self.left = open(path, "a"), lines

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise FULL
        self.file.write(text)

    def __getattr__(self, name):
        return getattr(self.file, name)


def run_with(problem, tmp_path, *callbacks, steps=6, saves=2):
    where = tmp_path / "checkpoints"
    batches = [problem.make_batch(n) for n in range(steps)]
    saved = saves and Checkpoints(where, every=saves, resume=True)
    args = problem.make_params(), problem.objective, optax.sgd(0.1), batches
    return fit(*args, callbacks=callbacks, checkpoints=saved)


def test_a_log_that_cannot_be_written_ends_the_run_at_once_and_says_what_is_saved(
    problem, tmp_path, monkeypatch
):
    log, opened, seen = tmp_path / "metrics.jsonl", pathlib.Path.open, []
    broken = lambda p, *a, **o: FullFile(p, 4) if (p, a) == (log, ("a",)) else opened(p, *a, **o)
    monkeypatch.setattr(pathlib.Path, "open", broken)
    look = Callback(on_row=lambda row: seen.append(row["step"]))
    with pytest.raises(OutputError) as caught:
        run_with(problem, tmp_path, look, jsonl_log(log))
    said = str(caught.value)
    assert said.startswith(f"after step 5: {log} could not be written: No space left on device; ")
    assert "GB are free there. Make room" in said
    assert f"The last checkpoint is of step 4, in {tmp_path / 'checkpoints'}: resume" in said
    # Seen when the row of step 5 is reported: while step 6 is under way, and not later.
    assert seen == [1, 2, 3, 4, 5] and int(caught.value.state.step) <= 6
    monkeypatch.undo()
    state, history = run_with(problem, tmp_path, jsonl_log(log))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    plain = tmp_path / "plain"
    assert history[-1]["loss"] == run_with(problem, plain)[1][-1]["loss"]


def test_without_checkpoints_the_error_has_what_was_trained(problem, tmp_path):
    def full(error):
        with writing(tmp_path / "x"):
            raise FULL

    state = run_with(problem, tmp_path, saves=None)[0]
    # Both ends are called, and the first failure is raised.
    ends = []
    with pytest.raises(
        OutputError, match="saves no checkpoints; .* is the error's `state`"
    ) as caught:
        run_with(problem, tmp_path, Callback(on_end=full), Callback(on_end=ends.append), saves=None)
    assert ends == [None]
    chex.assert_trees_all_equal(partition(caught.value.state.params)[0], partition(state.params)[0])
    assert [row["step"] for row in caught.value.history] == [1, 2, 3, 4, 5, 6]

    def bad(row):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as other:  # and an error of the run is not hidden
        run_with(problem, tmp_path, bad, Callback(on_end=full), saves=None)
    assert any("could not be written" in note for note in other.value.__notes__)


def test_a_figure_that_cannot_be_written_leaves_the_one_before(problem, tmp_path, monkeypatch):
    path = tmp_path / "run.png"
    run_with(problem, tmp_path, run_figure(path), saves=None)
    before = path.read_bytes()

    def savefig(self, file, **options):
        pathlib.Path(file).write_bytes(b"half")
        raise FULL

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    with pytest.raises(OutputError, match="run.png could not be written: No space left"):
        run_with(problem, tmp_path, run_figure(path), saves=None)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.png"]


def test_every_other_writer_names_its_place(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from jaxft.adapters.files import write_adapter

    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("jaxft.adapters.files.save_file", full)
    with pytest.raises(OutputError, match=r"adapter could not be written: I/O error: No space"):
        write_adapter(tmp_path / "adapter/a.json", tmp_path / "adapter/a.safetensors", {}, {})
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (812, "812 bytes"),
        (999.6, "1 kB"),
        (4_096, "4.1 kB"),
        (48_300_000, "48.3 MB"),
        (999_600_000, "1 GB"),
        (2.5e9, "2.5 GB"),
        (1.6e13, "16000 GB"),
    ],
)
def test_sizes_have_the_unit_that_they_fill(size, text):
    assert size_text(size) == text
