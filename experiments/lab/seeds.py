"""Finished seeds are kept on disk, so that a run of minutes that was interrupted goes on where it stopped."""

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

from experiments.lab import records
from experiments.lab.claims import Claim, report
from jaxft import train
from jaxft.output import writing

# What does not change the result of a seed.
APART = ("seeds", "first_seed", "output_dir", "debug", "record")


@dataclasses.dataclass
class Run:
    """A run of a script: where it writes, since when, and what its record says if it becomes one."""

    config: Any  # as the user gave it
    output: pathlib.Path
    began: float  # seconds of time.perf_counter
    draft: records.Draft | None
    kept: float = 0.0  # seconds that its seeds took in earlier runs

    def seeds(self, config: Any, run: Callable[[int], Any]) -> list[Any]:
        """`run_seeds` in this run's directory; `config` may be one of smaller or larger sizes."""
        found, seconds = run_seeds(config, self.output, run)
        self.kept += seconds
        return found

    def finish(
        self, claims: list[Claim], metrics: dict, recorded: list[Claim] | None = None
    ) -> int:
        """Table, metrics.json and, with --record, the record; then the exit code, 0 of a smoke run.

        recorded: those of the claims that the record's part gets, if not all.
        """
        code = report(claims, metrics, self.output)
        if self.draft:
            minutes = (time.perf_counter() - self.began + self.kept) / 60
            figure = self.output / f"{self.draft.slug.replace('-', '_')}.png"
            judged = claims if recorded is None else recorded
            path = records.write(self.draft, judged, minutes=minutes, figure=figure)
            print(f"recorded in {path}; `make results` writes docs/results.md from all records")
        return 0 if self.config.smoke else code


def begin(config: Any, parts: Mapping[str, Mapping[str, Any]] = records.MAIN) -> Run:
    """A script's run from its settings as given, before any work.

    Raises:
        ValueError: for --record with what is not recorded; `parts` is that of `records.draft`.
    """
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
    """A script's run from its seeds to its exit code: runs, table, figure, claims."""
    runs = this.seeds(config, run)
    print_table(runs)
    figure(runs, this.output)
    return this.finish(judge(runs), {"runs": runs})


def run_seeds(
    config: Any, directory: pathlib.Path, run: Callable[[int], Any]
) -> tuple[list[Any], float]:
    """([run(seed) for each seed of a script's config], seconds that those kept from earlier runs took).

    Results are as JSON gives them back: tuples become lists. A seed's result, with its seconds, is written to
    directory/seeds once it is there; with the same settings, the same code (jaxft's included), the same
    versions of what it computes with and the same devices it is read from there, which is said. Smoke
    runs keep nothing.
    """
    # Now, before somebody edits the script that runs.
    digest, first = _digest(config), getattr(config, "first_seed", 0)
    paths = {
        s: directory / "seeds" / f"{s}-{digest}.json" for s in range(first, first + config.seeds)
    }
    found = [_kept(path, not config.smoke, run, seed) for seed, path in paths.items()]
    return [result for result, _ in found], sum(seconds for _, seconds in found)


def _kept(path, keep, run, seed):
    """(result, its seconds in an earlier run)."""
    if path.exists():
        print(f"seed {seed}: kept from an earlier run ({path}; delete it to repeat)", flush=True)
        row = json.loads(path.read_text())
        return row["result"], row["seconds"]
    began = time.perf_counter()
    text = json.dumps(run(seed))
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a run may end while it writes.
        part = path.with_suffix(".part")
        with writing(path):
            seconds = round(time.perf_counter() - began, 2)
            part.write_text(f'{{"seconds": {seconds}, "result": {text}}}')
            os.replace(part, path)
    return json.loads(text), 0.0


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
    return [list(records.versions().values()), devices, threads]
