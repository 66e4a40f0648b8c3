"""The kernel flags that each --adapter reads and refuses (see `choices`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.cli import choices


class Entry(NamedTuple):
    """Flags that an adapter reads and refuses."""

    reads: tuple[str, ...] = ()
    refuses: Mapping[str, str] = {}


SCALED = Entry(("rank", "alpha", "target"))
RANKED = Entry(("rank",))
NO_KERNELS = {"quantise": "trains the kernels themselves, and quantised kernels cannot train"}
ADAPTERS = {
    **dict.fromkeys(("lora", "rslora", "pissa", "dora", "loha", "lokr", "paca"), SCALED),
    **dict.fromkeys(("vera", "oft", "boft", "randlora"), Entry(("rank", "target"))),
    **dict.fromkeys(("ia3", "bitfit", "norms"), Entry()),
    "monarch": Entry(("target",), NO_KERNELS),
    "full": Entry((), NO_KERNELS),
    **dict.fromkeys(("bottleneck", "parallel", "prompt", "prefix"), RANKED),
    "intrinsic": Entry(("d",)),
}


def check(config: Any) -> None:
    """Raises ValueError for a kernel flag that --adapter refuses or does not read.

    With --quantise, --target names the kernels that are rounded, for every adapter.
    """
    more = ("target",) if config.kernels.quantise else ()
    table = {name: entry._replace(reads=entry.reads + more) for name, entry in ADAPTERS.items()}
    choices.check(config, "adapter", table)
