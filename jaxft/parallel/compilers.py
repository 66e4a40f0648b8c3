"""The packages that hold XLA's compilers for TPUs and GPUs, as requirements: used by `make aot`."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import requires, version


def compiler_requirements() -> list[str]:
    """Requirements for pip that fit the installed jax; empty on platforms without such packages."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return []
    needs = requires("jax") or []
    libtpu = next(m[1] for n in needs if (m := re.match(r"(libtpu[^ ;]*) *;", n)))
    return [libtpu, f"jax-cuda12-pjrt=={version('jax')}"]


if __name__ == "__main__":
    print(*compiler_requirements())
