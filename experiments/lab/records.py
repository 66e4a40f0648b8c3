"""Records of runs, docs/results/<slug>.json: claims, measurements, and how to repeat the run.

A record has a part for each command that makes it; a part that is run later is added with its own command,
commit and date.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lab import sources
from experiments.lab.claims import Claim
from jaxft.output import writing

FOLDER = sources.ROOT / "docs" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")  # packages whose versions may change numbers
FREE = (
    "seeds",
    "output_dir",
    "debug",
    "record",
)  # settings that a recorded run may choose freely
FIGURE_BYTES = 100_000  # maximum size of a figure
MAIN: Mapping[str, Mapping[str, Any]] = {"main": {}}


@dataclasses.dataclass(frozen=True)
class Draft:
    """The fields of a record that are known before the run."""

    slug: str
    part: str
    command: str
    commit: str
    code: str  # sources.code_digest
    seeds: list[int]
    settings: dict[str, Any]


def draft(config: Any, parts: Mapping[str, Mapping[str, Any]] = MAIN) -> Draft:
    """Returns the draft of a script's run with --record.

    `parts` has the settings of each part that differ from the defaults: {"cot": {"mode": "cot"}}.

    Raises:
        ValueError: for a smoke run, for settings other than those to record, and for uncommitted code;
            raised before any work.
    """
    script = pathlib.Path(sys.modules[type(config).__module__].__file__).resolve()
    slug = (script.parent if script.name == "main.py" else script).stem.replace("_", "-")
    if config.smoke:
        raise ValueError("--record: a smoke run measures nothing; leave out --smoke or --record.")
    known = dict(parts)
    if hasattr(config, "preset"):
        known["full"] = {"preset": "full"}
    part = _part(config, known)
    chosen = {name: getattr(config, name) for name in known[part]}
    if config.seeds != type(config)().seeds:
        chosen["seeds"] = config.seeds
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in chosen.items())
    first = getattr(config, "first_seed", 0)
    settings = dataclasses.asdict(config)
    return Draft(
        slug,
        part,
        f"python {script.relative_to(sources.ROOT)}{flags} --record",
        _commit(),
        sources.code_digest(script),
        list(range(first, first + config.seeds)),
        {name: x for name, x in settings.items() if name not in (*FREE, "smoke")},
    )


def write(
    made: Draft, claims: Sequence[Claim], *, minutes: float, figure: pathlib.Path
) -> pathlib.Path:
    """Writes the part of a draft into its record, with its figure; returns the record's path."""
    path = FOLDER / f"{made.slug}.json"
    old = json.loads(path.read_text("utf-8")) if path.exists() else {"slug": made.slug, "parts": {}}
    name = f"{made.slug}.png" if made.part == "main" else f"{made.slug}-{made.part}.png"
    told = {k: v for k, v in dataclasses.asdict(made).items() if k not in ("slug", "part")}
    row = told | {
        "claims": [claim.plain() for claim in claims],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "minutes": round(minutes, 1),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | versions(),
        "figure": name,
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    with writing(FOLDER):
        parts = old["parts"] | {made.part: row}
        text = json.dumps(old | {"parts": parts}, indent=1, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        (FOLDER / name).write_bytes(_small(figure))
    return path


def load() -> list[dict[str, Any]]:
    """Reads all records, sorted by slug."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def claims_of(record: Mapping[str, Any]) -> list[Claim]:
    """Returns the claims of all parts of a record."""
    return [Claim.parse(row) for part in record["parts"].values() for row in part["claims"]]


def held(record: Mapping[str, Any]) -> tuple[int, int]:
    """(claims that hold, all claims) of a record."""
    claims = claims_of(record)
    return sum(claim.holds for claim in claims), len(claims)


def versions() -> dict[str, str]:
    """Returns {package: version} of PACKAGES."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    """Returns the kind of machine: CPUs that a process may use, their model, and JAX's devices."""
    import jax

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {
        "cpus": cpus,
        "cpu": _cpu(),
        "devices": f"{jax.device_count()} x {', '.join(kinds)}",
    }


def _part(config, parts):
    """Returns the part whose settings are those of the config."""
    usual, given = (dataclasses.asdict(x) for x in (type(config)(), config))
    other = {k: v for k, v in given.items() if k not in FREE and v != usual[k]}
    for name, settings in parts.items():
        if other == settings:
            return name
    known = {name for settings in parts.values() for name in settings}
    odd = sorted(set(other) - known) or sorted(other)
    raise ValueError(
        f"--record: {', '.join(f'{name} is {given[name]!r}' for name in odd)}, but a record is made with the "
        f"script's own settings{_choices(parts)}; leave these flags or --record out."
    )


def _choices(parts):
    flags = [" ".join(f"--{k} {v}" for k, v in row.items()) for row in parts.values() if row]
    return f" (or {', '.join(flags)})" if flags else ""


def _commit():
    """Returns the commit of the running code."""

    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments], cwd=sources.ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ValueError(
                f"--record: needs a git checkout: {done.stderr.strip().splitlines()[-1]}"
            )
        return done.stdout

    # Uncommitted records are not code.
    changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)docs/results*").splitlines()
    if changed:
        raise ValueError(
            f"--record: {len(changed)} changes are not committed ({changed[0].strip()}, ...); commit them "
            "first, so that the record names the code that ran."
        )
    return git("rev-parse", "HEAD").strip()


def _cpu():
    """Returns the model of the CPU from Linux, or else the platform's name for it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _small(figure):
    """Encodes a PNG below FIGURE_BYTES, with fewer colours and then a smaller size if needed."""
    from PIL import Image

    image = Image.open(figure).convert("RGB")
    for share, colours in [(1, 256), (1, 128), (1, 64), (1, 32), (0.75, 32), (0.5, 32), (0.25, 16)]:
        size = tuple(round(side * share) for side in image.size)
        buffer = io.BytesIO()
        image.resize(size).quantize(colours).save(buffer, "PNG", optimize=True)
        if len(buffer.getvalue()) < FIGURE_BYTES:
            break
    return buffer.getvalue()
