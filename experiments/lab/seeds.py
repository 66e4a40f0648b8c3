"""Keeps finished seeds on disk, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.lab import records, sources
from experiments.lab.claims import Claim, report
from jaxft import train
from jaxft.output import writing

# Settings that do not change the result of a seed.
APART = ("seeds", "first_seed", "output_dir", "debug", "record")


SMOKE = "a smoke run is too small for its claims: whether they hold here says nothing"


@dataclasses.dataclass
class Run:
    """A run of a script: its output directory, start time and the draft of its record, if any."""

    config: Any  # as the user gave it
    output: pathlib.Path
    began: float  # seconds of time.perf_counter
    draft: records.Draft | None
    kept: float = 0.0  # seconds that its cached seeds took in earlier runs

    def seeds(self, config: Any, run: Callable[[int], Any]) -> list[Any]:
        """Calls `run_seeds` in this run's directory; `config` may have smaller or larger sizes."""
        found, seconds = run_seeds(config, self.output, run)
        self.kept += seconds
        return found

    def finish(
        self, claims: list[Claim], metrics: dict, recorded: list[Claim] | None = None
    ) -> int:
        """Writes table, metrics.json and, with --record, the record; returns the exit code, 0 if smoke.

        recorded: the claims for the record's part; None: all.
        """
        code = report(claims, metrics, self.output)
        if self.config.smoke:
            print(SMOKE)
        if self.draft:
            minutes = (time.perf_counter() - self.began + self.kept) / 60
            figure = self.output / f"{self.draft.slug.replace('-', '_')}.png"
            judged = claims if recorded is None else recorded
            path = records.write(self.draft, judged, minutes=minutes, figure=figure)
            print(f"recorded in {path}; `make results` writes docs/results.md from all records")
        return 0 if self.config.smoke else code


def begin(config: Any, parts: Mapping[str, Mapping[str, Any]] = records.MAIN) -> Run:
    """Begins a script's run with its given settings, before any work.

    Raises:
        MissingDependencyError: if a package that the script's files import is not installed.
        ValueError: for --record with settings that cannot be recorded; `parts`: see `records.draft`.
    """
    script = pathlib.Path(sys.modules[type(config).__module__].__file__)
    if lacking := sources.missing(script.resolve()):
        raise train.MissingDependencyError(
            f"{script.name} needs {', '.join(lacking)}, not installed here: pip install 'jaxft[papers]'"
        )
    draft = records.draft(config, parts) if config.record.record else None
    return Run(config, train.writable_directory(config.output_dir), time.perf_counter(), draft)


def measure_claims(
    this: Run,
    config: Any,
    run: Callable[[int], Any],
    *,
    judge: Callable[[list], list[Claim]],
    print_table: Callable[[list], None],
    figure: Callable[[list, pathlib.Path], None],
) -> int:
    """Runs a script from its seeds to its exit code: runs, table, figure, claims."""
    runs = this.seeds(config, run)
    print_table(runs)
    figure(runs, this.output)
    return this.finish(judge(runs), {"runs": runs})


def run_seeds(
    config: Any, directory: pathlib.Path, run: Callable[[int], Any]
) -> tuple[list[Any], float]:
    """Returns ([run(seed) for each seed of the config], seconds that the cached seeds took earlier).

    Results are as read back from JSON: tuples become lists. A finished seed's result and seconds are written
    to directory/seeds. A later run with the same settings, code (jaxft's included), package versions and
    devices reads them from there and prints that it does. Smoke runs keep nothing.
    """
    # Compute the digest now, before the running script can be edited.
    digest, first = _digest(config), getattr(config, "first_seed", 0)
    paths = {
        s: directory / "seeds" / f"{s}-{digest}.json" for s in range(first, first + config.seeds)
    }
    found = [_kept(path, not config.smoke, run, seed) for seed, path in paths.items()]
    return [result for result, _ in found], sum(seconds for _, seconds in found)


def _kept(path, keep, run, seed):
    """Returns (result, its seconds in an earlier run)."""
    if path.exists():
        print(f"seed {seed}: kept from an earlier run ({path}; delete it to repeat)", flush=True)
        row = json.loads(path.read_text())
        return row["result"], row["seconds"]
    began = time.perf_counter()
    text = json.dumps(run(seed))
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write atomically: a run may end while it writes.
        part = path.with_suffix(".part")
        with writing(path):
            seconds = round(time.perf_counter() - began, 2)
            part.write_text(f'{{"seconds": {seconds}, "result": {text}}}')
            os.replace(part, path)
    return json.loads(text), 0.0


def _digest(config):
    """Digest of the settings, `_place`, and the code of the config's script with all that it uses."""
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
    """Versions of packages, devices, and CPU threads, which determine the order of sums."""
    devices = [jax.default_backend(), jax.device_count(), jax.devices()[0].device_kind]
    threads = [os.cpu_count(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("XLA_FLAGS")]
    return [list(records.versions().values()), devices, threads]
