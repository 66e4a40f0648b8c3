"""--cache-tower of sft.py: the outputs of a frozen part for images or sounds, computed once for each."""

from __future__ import annotations

from typing import Any

from jaxft import data


def check(config: Any) -> None:
    """Raises ValueError if --cache-tower is given with flags that read images through other params."""
    if config.cache_tower is None:
        return
    if config.distil.teacher is not None or config.adapter == "intrinsic":
        raise ValueError(
            "--cache-tower works with neither --teacher nor --adapter intrinsic, which read images "
            "through other params; leave it out."
        )


def cached(config: Any, model: Any, params: Any, sources: list[Any]) -> list[Any]:
    """Returns the records, by --cache-tower with the outputs of the part that reads their images."""
    if config.cache_tower is None:
        return sources
    folder = None if config.cache_tower == "memory" else config.cache_tower
    return data.cache_tower(model, params, sources, folder)
