"""Results of expensive functions of texts on disk, so that an interrupted scoring run continues."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.output import writing


def resumable(
    fn: Callable[..., Sequence[Any]],
    path: str | os.PathLike,
    *,
    settings: Any = None,
    batch_size: int = 64,
) -> Callable[..., list[Any]]:
    """Returns a function like `fn` that computes each text once and keeps its result in a file.

    A call with the same text, settings and further arguments reads the result from the file, also after a
    restart. Results are appended after each batch, so that an interruption loses one batch; an incomplete
    last line is removed. One process at a time may use a file.

    Args:
        fn: (texts, *args) -> one value that JSON can hold for each text. To give the same results after a
            restart, the value must depend only on the text and `args`, not on the other texts.
        path: a file of JSON lines, created if absent; its directory must exist.
        settings: anything JSON can hold that determines the results (model, temperature, prompt, seed).
        batch_size: most texts of one call of `fn`.

    Raises:
        ValueError: if the file has other content, or (when called) if `fn` returns another number of values.
    """
    path = pathlib.Path(path)
    known = _read(path)

    def run(texts: Sequence[str], *args: Any) -> list[Any]:
        names = [_digest([settings, text, *args]) for text in texts]
        missing = {name: text for name, text in zip(names, texts, strict=True) if name not in known}
        todo = list(missing.items())
        for start in range(0, len(todo), batch_size):
            part = todo[start : start + batch_size]
            found = list(fn([text for _, text in part], *args))
            if len(found) != len(part):
                raise ValueError(
                    f"resumable: {len(found)} results for {len(part)} texts; expected one each."
                )
            rows = [(name, value) for (name, _), value in zip(part, found, strict=True)]
            lines = [json.dumps(row) + "\n" for row in rows]
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            # As read back, so that a resumed run sees the same values.
            known.update(map(json.loads, lines))
        return [known[name] for name in names]

    return run


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _read(path):
    """Returns {digest: value}; removes an incomplete last line."""
    if not path.exists():
        return {}
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with writing(path):
            path.write_text(whole, encoding="utf-8")
    try:
        return dict(map(json.loads, whole.splitlines()))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a file of kept results ({error}); name another file or delete it."
        ) from error
