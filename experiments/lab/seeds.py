"""Finished seeds are kept on disk, so that a run of minutes that was interrupted goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.lab.claims import Claim, report
from jaxft import train
from jaxft.output import writing

# What does not change the result of a seed.
APART = ("seeds", "first_seed", "output_dir", "debug")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")  # whose versions may change its numbers


def measure_claims(
    config: Any,
    run: Callable[[int], Any],
    *,
    judge: Callable[[list], list[Claim]],
    print_table: Callable[[list], None],
    figure: Callable[[list, pathlib.Path], None],
) -> int:
    """A script from its settings to its exit code: runs, table, figure, claims (0 of a smoke run)."""
    output = train.writable_directory(config.output_dir)
    runs = run_seeds(config, output, run)
    print_table(runs)
    figure(runs, output)
    code = report(judge(runs), {"runs": runs}, output)
    return 0 if config.smoke else code


def plot_mean(
    axes: Any,
    runs: list[dict],
    name: str,
    value: Callable[[dict], Any],
    *style: str,
    x: str = "step",
    **more: Any,
) -> None:
    """The mean over seeds of `value` along `x` of the rows that runs[i][name] has."""
    values = [[value(row) for row in run[name]] for run in runs]
    axes.plot([row[x] for row in runs[0][name]], np.mean(values, axis=0), *style, **more)


def run_seeds(config: Any, directory: pathlib.Path, run: Callable[[int], Any]) -> list[Any]:
    """[run(seed) for each seed of a script's config], as JSON gives it back: tuples become lists.

    A seed's result is written to directory/seeds once it is there; with the same settings, the same code
    (jaxft's included), the same versions of what it computes with and the same devices it is read from there,
    which is said. Smoke runs keep nothing.
    """
    # Now, before somebody edits the script that runs.
    digest, first = _digest(config), getattr(config, "first_seed", 0)
    paths = {
        s: directory / "seeds" / f"{s}-{digest}.json" for s in range(first, first + config.seeds)
    }
    return [_kept(path, not config.smoke, run, seed) for seed, path in paths.items()]


def _kept(path, keep, run, seed):
    if path.exists():
        print(f"seed {seed}: kept from an earlier run ({path}; delete it to repeat)", flush=True)
        return json.loads(path.read_text())
    text = json.dumps(run(seed))
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a run may end while it writes.
        part = path.with_suffix(".part")
        with writing(path):
            part.write_text(text)
            os.replace(part, path)
    return json.loads(text)


def _digest(config):
    """Of the settings, `_place`, and the code: the script, where the config's class is, and what it uses."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in APART}
    ours = {
        type(config).__module__,
        *(n for n in sys.modules if n.startswith(("experiments.", "jaxft."))),
    }
    # Sorted by name, not by path, so that the digest is that of another checkout of the same code.
    files = [sys.modules[name].__file__ for name in sorted(ours)]
    found = hashlib.sha256(json.dumps([settings, _place()]).encode())
    for file in filter(None, files):
        found.update(pathlib.Path(file).read_bytes())
    return found.hexdigest()[:8]


def _place():
    """What computes: versions of packages, and the devices. Threads of a CPU decide the order of its sums."""
    devices = [jax.default_backend(), jax.device_count(), jax.devices()[0].device_kind]
    threads = [os.cpu_count(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("XLA_FLAGS")]
    return [[importlib.metadata.version(name) for name in PACKAGES], devices, threads]
