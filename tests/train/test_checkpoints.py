import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxft.adapters import adapt, full, lora, partition
from jaxft.output import writable_directory
from jaxft.train import (
    Callback,
    Checkpoints,
    DivergedError,
    OutputError,
    PreemptedError,
    fit,
    make_optimizer,
    restore_params,
    stored,
)

WORKER = Path(__file__).with_name("_worker.py")


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory):
    """(state, losses) of a run that nothing interrupts."""
    state, history = problem.train(tmp_path_factory.mktemp("whole"))
    return state, losses(history)


def losses(history):
    return [row["loss"] for row in history]


def logged(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return losses(rows)


def steps_in(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def worker(*args):
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parents[2])}
    command = [sys.executable, str(WORKER), *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stop", [1, 10])  # before and after a checkpoint
def test_a_run_stopped_and_resumed_is_bit_for_bit_the_whole_run(problem, whole, tmp_path, stop):
    problem.train(tmp_path, steps=stop)
    state, history = problem.train(tmp_path)
    chex.assert_trees_all_equal(state._replace(key=0), whole[0]._replace(key=0))
    assert losses(history) == whole[1] == logged(tmp_path)
    assert state.key == whole[0].key


def test_the_data_position_may_be_replayed(problem, whole, tmp_path):
    numbers = range(1, problem.STEPS + 1)
    problem.train(tmp_path, steps=5, batches=(problem.make_batch(n) for n in numbers))
    _, history = problem.train(tmp_path, batches=(problem.make_batch(n) for n in numbers))
    assert losses(history) == whole[1]
    with pytest.raises(ValueError, match=f"taken {problem.STEPS} batches, but these end after 0"):
        problem.train(tmp_path, batches=[])


def test_positions_in_bytes_and_collect_functions_resume(problem, whole, tmp_path):
    class InBytes(problem.Batches):
        def get_state(self):
            return json.dumps(super().get_state()).encode()

        def set_state(self, state):
            super().set_state(json.loads(state))

    problem.train(tmp_path / "bytes", steps=5, batches=InBytes())
    assert losses(problem.train(tmp_path / "bytes", batches=InBytes())[1]) == whole[1]

    def collect(params, carry, key):
        rest = carry["rest"] or {"next": np.int32(1)}
        return problem.make_batch(int(rest["next"])), {"rest": {"next": np.int32(rest["next"] + 1)}}

    collect.carry = {"rest": {}}  # filled by the first call, here and from a checkpoint
    problem.train(tmp_path / "function", steps=5, batches=collect)
    assert losses(problem.train(tmp_path / "function", batches=collect)[1]) == whole[1]


# SIGTERM, SIGKILL, and kills in a write: test_fault_matrix.py.
def test_ctrl_c_ends_the_process_and_the_run_resumes(problem, whole, tmp_path):
    process = worker(tmp_path, 0)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    done = len(logged(tmp_path))
    assert 3 <= done < problem.STEPS
    assert steps_in(tmp_path)[-1] == done
    _, history = problem.train(tmp_path)
    assert losses(history) == whole[1] == logged(tmp_path)


def test_a_second_sigint_interrupts_at_once_and_handlers_are_put_back(problem, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    twice = Callback(on_step=lambda *_: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        problem.train(tmp_path, callbacks=[twice])
    once = Callback(on_step=lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(PreemptedError, match="SIGTERM at step 1; saved") as caught:
        problem.train(tmp_path, callbacks=[once])
    assert caught.value.code == 75
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def break_file(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "deleted":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize(
    "pattern, how",
    [
        ("meta/metadata", "truncated"),
        ("trainable/d/*", "flipped"),
        ("opt_state/manifest.ocdbt", "truncated"),
        ("opt_state/d/*", "deleted"),
    ],
)
def test_a_broken_checkpoint_is_set_aside_for_the_one_before(
    problem, whole, tmp_path, pattern, how
):
    problem.train(tmp_path, steps=6)
    files = sorted((tmp_path / "checkpoints" / "6").glob(pattern))
    for path in files:
        break_file(path, how)
    assert files and steps_in(tmp_path) == [2, 4, 6]
    with pytest.warns(UserWarning, match="checkpoint 6 cannot be read .* the previous one is used"):
        problem.train(tmp_path, steps=6)
    assert steps_in(tmp_path) == [2, 4, 6]  # written anew
    _, history = problem.train(tmp_path)
    assert losses(history) == whole[1] == logged(tmp_path)
    assert (tmp_path / "checkpoints" / "corrupt-6").is_dir()
    assert steps_in(tmp_path)[-1] == problem.STEPS


def test_values_that_were_changed_behind_the_storages_back_are_seen(problem, whole, tmp_path):
    problem.train(tmp_path, steps=6)
    path = tmp_path / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["trainable"]["first/bias"][2] ^= 1  # as if the values, not their checksum, were others
    meta["checksum"] = stored.json_checksum({k: meta[k] for k in meta if k != "checksum"})
    path.write_text(json.dumps(meta))
    with pytest.warns(UserWarning, match="cannot be read .trainable differs from its checksum"):
        _, history = problem.train(tmp_path)
    assert losses(history) == whole[1]


def test_any_flipped_bit_of_what_a_checkpoint_says_of_itself_is_seen(problem, tmp_path):
    """Step, key, data position, history, names: nothing is resumed from any of them changed."""
    problem.train(tmp_path, steps=2)
    text = (tmp_path / "checkpoints" / "2" / "meta" / "metadata").read_bytes()

    def read(data):
        meta = json.loads(data)
        manager = types.SimpleNamespace(restore=lambda *_, **__: types.SimpleNamespace(meta=meta))
        return meta, stored.read_meta(manager, 2)

    whole, _ = read(text)
    changed = 0
    for place in range(0, len(text), 3):
        for bit in range(8):
            broken = text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :]
            try:
                if json.loads(broken) == whole:
                    continue
            except ValueError:  # no JSON, or no UTF-8
                continue
            changed += 1
            with pytest.raises(OSError, match="differs from its checksum"):
                read(broken)
    assert changed > 1000


def test_other_formats_are_refused_by_name():
    meta = {"format": 2, "step": 2}
    manager = types.SimpleNamespace(restore=lambda *_, **__: types.SimpleNamespace(meta=meta))
    with pytest.raises(stored.MismatchError, match="has format 2, this jaxft reads 3"):
        stored.read_meta(manager, 2)


def test_the_key_is_restored(problem, whole, tmp_path):
    problem.train(tmp_path, steps=6)
    state, history = problem.train(tmp_path, seed=5)
    assert losses(history) == whole[1] and state.key == whole[0].key


def test_when_none_can_be_read_the_run_says_so(problem, tmp_path):
    problem.train(tmp_path, steps=2)
    break_file(tmp_path / "checkpoints" / "2" / "meta" / "metadata", "truncated")
    with (
        pytest.warns(UserWarning, match="checkpoint 2"),
        pytest.raises(OutputError, match="can be read"),
    ):
        problem.train(tmp_path)


def test_only_what_trains_is_saved_and_frozen_values_must_be_the_same(problem, tmp_path):
    problem.train(tmp_path, steps=2)
    meta = json.loads((tmp_path / "checkpoints" / "2" / "meta" / "metadata").read_text())
    assert sorted(meta["trainable"]) == ["first/bias", "first/kernel/a", "first/kernel/b"]
    assert sorted(meta["frozen"]) == ["first/kernel/base", "second/kernel/value"]
    assert meta["frozen"]["second/kernel/value"][:2] == [[6, 6], "float32"]

    def resume(params):
        return fit(
            params,
            problem.objective,
            make_optimizer(1e-2, total_steps=problem.STEPS, weight_decay=0.1),
            problem.Batches(),
            steps=3,
            checkpoints=Checkpoints(tmp_path / "checkpoints", resume=True),
        )

    other = problem.make_params()
    other["second"]["kernel"] = type(other["second"]["kernel"])(
        other["second"]["kernel"].value.at[5, 5].add(1e-6)
    )
    with pytest.raises(
        ValueError, match=r"1 of 2 frozen params differ .*'second/kernel/value': saved float32"
    ):
        resume(other)
    ranked = adapt(
        jax.random.key(0), problem.make_params(), {"first/kernel": lora(3), ".*/bias": full()}
    )
    with pytest.raises(ValueError, match="differ"):
        resume(ranked)
    assert resume(problem.make_params())[0].step == 3


def test_another_optimizer_is_refused(problem, tmp_path):
    problem.train(tmp_path, steps=2)
    with pytest.raises(ValueError, match="optimizer state differ"):
        fit(
            problem.make_params(),
            problem.objective,
            optax.sgd(0.1, momentum=0.9),
            problem.Batches(),
            steps=3,
            checkpoints=Checkpoints(tmp_path / "checkpoints", resume=True),
        )


def test_a_directory_of_another_run_is_refused_unless_resuming(problem, tmp_path):
    problem.train(tmp_path, steps=4)
    again = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(OutputError, match=r"has checkpoints up to step 4; resume"):
        fit(
            problem.make_params(),
            problem.objective,
            make_optimizer(1e-2, total_steps=4),
            problem.Batches(),
            steps=4,
            checkpoints=again,
        )
    state, history = problem.train(tmp_path, steps=4)  # Nothing is left to do.
    assert state.step == 4 and len(history) == 4


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_newest_and_the_best_are_kept_also_over_a_restart(problem, tmp_path, mode):
    scores = {2: 0.5, 4: 0.1, 6: 0.3, 8: 0.4, 10: 0.35, 12: 0.36, 14: 0.37}
    sign = 1 if mode == "min" else -1
    score = Callback(
        on_step=lambda step, _: {"eval/loss": sign * scores[step]} if step in scores else None
    )
    states = {}
    keep = Callback(
        on_step=lambda n, s: states.update({n: jax.tree.map(np.array, partition(s.params)[0])})
    )

    def train(steps):
        checkpoints = Checkpoints(
            tmp_path / "checkpoints", every=5, last=2, best="eval/loss", mode=mode, resume=True
        )
        return fit(
            problem.make_params(),
            problem.objective,
            make_optimizer(1e-2, total_steps=20),
            problem.Batches(),
            steps=steps,
            callbacks=[score, keep],
            checkpoints=checkpoints,
        )

    train(9)
    assert steps_in(tmp_path) == [4, 8, 9]
    train(14)
    assert steps_in(tmp_path) == [4, 12, 14]
    read = lambda step: restore_params(tmp_path / "checkpoints", problem.make_params(), step=step)
    for step, number in [("newest", 14), ("best", 4), (12, 12)]:
        chex.assert_trees_all_equal(partition(read(step))[0], states[number])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 6; it has \[4, 12, 14\]"):
        read(6)
    with pytest.raises(ValueError, match="frozen params differ"):
        restore_params(tmp_path / "checkpoints", problem.make_params(seed=1))


def test_an_evaluation_after_the_last_batch_counts_for_its_checkpoint(problem, tmp_path):
    """The checkpoint of step 4 is saved before the batches have run out, and its score comes later."""
    scores, said = {2: 0.5}, {"eval/loss": 0.1}
    late = Callback(
        on_step=lambda n, _: {"eval/loss": scores[n]} if n in scores else None,
        on_last=lambda n, _: said,
    )

    def train():
        place = Checkpoints(tmp_path / "checkpoints", every=2, best="eval/loss", resume=True)
        given = problem.make_params(), problem.objective, make_optimizer(1e-2, total_steps=4)
        batches = [problem.make_batch(n) for n in range(4)]
        return fit(*given, batches, callbacks=[late], checkpoints=place)

    state, history = train()
    assert steps_in(tmp_path) == [2, 4] and history[-1]["eval/loss"] == 0.1
    best = restore_params(tmp_path / "checkpoints", problem.make_params(), step="best")
    chex.assert_trees_all_equal(partition(best)[0], partition(state.params)[0])
    assert train()[1] == history  # Nothing is left to do, and nothing is lost.


def test_a_state_that_is_not_finite_is_never_saved(problem, tmp_path):
    batches = [problem.make_batch(n) for n in range(8)]
    batches[5]["x"][1, 0, 0] = np.nan
    with pytest.raises(DivergedError, match="step 6"):
        problem.train(tmp_path, batches=batches)
    assert steps_in(tmp_path) == [2, 4]
    params = restore_params(tmp_path / "checkpoints", problem.make_params())
    chex.assert_tree_all_finite(params)


def test_params_that_a_finite_gradient_broke_are_not_saved(problem, tmp_path):
    broken = optax.stateless(lambda u, p: jax.tree.map(lambda g: g * np.inf, u))
    with pytest.raises(DivergedError, match="step 1: params are not finite; not saved"):
        fit(
            problem.make_params(),
            problem.objective,
            broken,
            problem.Batches(),
            steps=3,
            checkpoints=Checkpoints(tmp_path / "checkpoints", every=1),
        )
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize("every", [1, 100])
def test_divergence_on_a_step_that_is_saved_is_seen_first(problem, tmp_path, every):
    batches = [problem.make_batch(n) for n in range(3)]
    batches[2]["x"][1, 0, 0] = np.nan
    with pytest.raises(DivergedError, match="step 3"):
        problem.train(tmp_path, batches=batches, every=every, steps=3)
    assert steps_in(tmp_path) == ([1, 2] if every == 1 else [])


def test_an_unwritable_directory_is_an_error_before_the_first_step(problem, tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    objective = lambda *args: calls.append(1) or problem.objective(*args)
    with pytest.raises(OutputError, match="cannot write to .*file/checkpoints: Not a directory"):
        fit(
            problem.make_params(),
            objective,
            make_optimizer(1e-2, total_steps=4),
            problem.Batches(),
            steps=4,
            checkpoints=Checkpoints(tmp_path / "file" / "checkpoints"),
        )
    assert not calls
    with pytest.raises(OutputError, match=r"one checkpoint takes 1000000000 GB; make room"):
        writable_directory(tmp_path, size=10**18)


def test_a_write_that_fails_ends_the_run_and_keeps_earlier_checkpoints(problem, whole, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(step, state):
        if step == 6:  # From now on no file can be longer than 100 bytes.
            while not (tmp_path / "checkpoints" / "4").exists():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    try:
        with pytest.raises(OutputError, match="could not be written to .*File too large") as caught:
            problem.train(tmp_path, callbacks=[Callback(on_step=fill_disk)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said, place = str(caught.value), tmp_path / "checkpoints"
    assert f"to {place}: " in said and "GB are free there. Make room or choose" in said
    assert f"The last checkpoint is of step 4, in {place}: resume from it with resume=True" in said
    assert len(caught.value.history) >= 6 and caught.value.state is not None
    assert steps_in(tmp_path) == [2, 4]
    _, history = problem.train(tmp_path)
    assert losses(history) == whole[1]


def test_a_disk_without_room_for_a_checkpoint_ends_the_run_at_once(problem, tmp_path, monkeypatch):
    usage, seen = shutil.disk_usage, []

    def fill_disk(step, state):
        seen.append(step)
        if step == 6:
            full = usage(tmp_path)._replace(free=10)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: full)

    wanted = (
        "checkpoints has 10 bytes free, but one checkpoint takes 376 bytes; make .* of step 4, in"
    )
    with pytest.raises(OutputError, match=wanted) as caught:
        problem.train(tmp_path, callbacks=[Callback(on_step=fill_disk)])
    assert seen[-1] == 6 == int(caught.value.state.step)
    assert steps_in(tmp_path) == [2, 4]


def test_what_is_written_beside_the_training_and_fails_ends_it_at_once(problem, tmp_path):
    """At the first step after the failure is known, not at the next checkpoint."""
    seen, failed = [], []

    def look(step, state):
        seen.append(step)
        if step == 3:  # The second checkpoint, of step 2, is under way and fails.
            failed.append(ocp.CheckpointManager.check_for_errors)

            def broken(self):
                raise OSError(28, "No space left on device")

            ocp.CheckpointManager.check_for_errors = broken

    try:
        with pytest.raises(OutputError, match="No space left on device; earlier ones are kept"):
            problem.train(tmp_path, every=2, callbacks=[Callback(on_step=look)])
    finally:
        ocp.CheckpointManager.check_for_errors = failed[0]
    assert seen[-1] == 3


def test_writing_goes_on_beside_training_without_changing_what_is_saved(problem, tmp_path):
    """The state is donated to the next step while it is written: each checkpoint has its own step."""
    states = {}
    keep = Callback(
        on_step=lambda n, s: states.update({n: jax.tree.map(np.array, partition(s.params)[0])})
    )
    problem.train(tmp_path, every=1, steps=3, callbacks=[keep])
    for number in (1, 2, 3):
        restored = restore_params(tmp_path / "checkpoints", problem.make_params(), step=number)
        chex.assert_trees_all_equal(partition(restored)[0], states[number])


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'low'"):
        Checkpoints(tmp_path, mode="low")


def test_a_mesh_resumes_what_one_device_saved(problem, whole, tmp_path):
    from jaxft.parallel import make_mesh

    problem.train(tmp_path, steps=6)
    _, history = problem.train(tmp_path, mesh=make_mesh(data=4, fsdp=2))
    np.testing.assert_allclose(losses(history), whole[1], rtol=1e-5)
    assert losses(history)[:6] == whole[1][:6]
