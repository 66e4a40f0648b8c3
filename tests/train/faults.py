"""Faults at random points of the tiny run of _worker.py, each in forked children of one process.

python faults.py DIRECTORY POINTS SEED KIND...

prints a JSON line for each point of each kind: what happened, the newest checkpoint that was whole before the
run continued, and the first steps of its lives. `sigkill`, `sigterm`, `write` (killed while a checkpoint
is being written), `full` (no file may grow beyond a random length from a random step on), `truncated` and
`flipped` (a random file of the newest checkpoint). test_fault_matrix.py judges.
"""

import importlib.util
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
PROCESS_FAULTS = ("sigkill", "sigterm", "write", "full")
STORAGE_FAULTS = ("truncated", "flipped")


def worker():
    """_worker.py as a module."""
    spec = importlib.util.spec_from_file_location("train_worker", HERE / "_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def life(module, directory, at=None, **options):
    """Trains in a forked child, from what is there; `at` is called after its steps. Returns its exit code."""
    read, write = os.pipe()  # No file: where the disk is full, what is said must still be heard.
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as said, open(directory / "output.txt", "a") as file:
            file.write(said.read())
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        code = _train(module, directory, at, options)
    except BaseException as error:  # Whatever it is, the child must not go on as its parent.
        os.write(2, repr(error).encode())
    finally:
        os._exit(code)


def _train(module, directory, at, options):
    """The exit code of a run that writes down at which step it begins."""
    from jaxft.train import Callback, jsonl_log, run_main

    fresh = [True]

    def seen(step, state):
        del state
        if fresh.pop() if fresh else False:
            with open(directory / "lives.txt", "a") as file:
                file.write(f"{step}\n")
        if at is not None:
            at(step)

    callbacks = [jsonl_log(directory / "metrics.jsonl"), Callback(on_step=seen)]
    try:
        run_main(lambda _: module.train(directory, callbacks=callbacks, **options), None)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def process_fault(kind, directory, rng, steps):
    """step -> something bad, from a random step on, some random milliseconds later."""
    first, delay = rng.randrange(1, steps), rng.uniform(0, 0.03)
    limit = rng.randrange(0, 3000)

    def kill(number):
        end = time.monotonic() + 20
        while kind == "write" and time.monotonic() < end:
            if list(directory.glob("checkpoints/*tmp*")):
                break
        time.sleep(delay)
        os.kill(os.getpid(), number)

    def at(step):
        if step != first:
            return
        if kind == "full":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        else:
            number = signal.SIGTERM if kind == "sigterm" else signal.SIGKILL
            threading.Thread(target=kill, args=(number,), daemon=True).start()

    return at, f"from step {first}, {delay * 1e3:.0f} ms, {limit} bytes"


def break_storage(kind, directory, rng):
    """Damages a random file of the newest checkpoint."""
    newest = directory / "checkpoints" / str(whole_checkpoints(directory)[-1])
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choice(files)
    data, place = bytearray(path.read_bytes()), 0
    if kind == "truncated":
        place = rng.randrange(len(data))
        data = data[:place]
    else:
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.relative_to(directory)} at {place}"


def whole_checkpoints(directory):
    """Numbers of those that appeared under their number, oldest first."""
    found = (directory / "checkpoints").glob("*")
    return sorted(int(p.name) for p in found if p.name.isdigit())


def point(module, kind, directory, rng):
    """One fault, and the run's end after it."""
    directory.mkdir(parents=True)
    codes = []
    if kind in PROCESS_FAULTS:
        at, what = process_fault(kind, directory, rng, module.STEPS)
        codes.append(life(module, directory, at))
    else:
        codes.append(life(module, directory, steps=rng.randrange(2, module.STEPS)))
        what = break_storage(kind, directory, rng)
    newest = (whole_checkpoints(directory) or [0])[-1]
    codes.append(life(module, directory))
    lives = [int(line) for line in (directory / "lives.txt").read_text().split()]
    return {"kind": kind, "what": what, "codes": codes, "newest": newest, "lives": lives}


def main(directory, points, seed, *kinds):
    """A line for each point."""
    module = worker()
    for kind in kinds:
        for i in range(int(points)):
            rng = random.Random(f"{seed} {kind} {i}")
            found = point(module, kind, Path(directory) / kind / str(i), rng)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
