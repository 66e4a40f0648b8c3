"""Finds the code that a paper's script uses by parsing it, without importing the script or JAX."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
PAPERS = ROOT / "experiments" / "papers"
# Modules that determine how numbers are shown, kept and requested, but not the numbers.
APART = (ROOT / "experiments" / "lab", ROOT / "experiments" / "cli")


def scripts() -> dict[str, pathlib.Path]:
    """{slug: script} of all papers with a script."""
    single, folders = PAPERS.glob("[!_]*.py"), PAPERS.glob("*/main.py")
    named = {file.stem: file for file in single} | {file.parent.name: file for file in folders}
    return {name.replace("_", "-"): named[name] for name in sorted(named)}


def heading(script: pathlib.Path) -> str:
    """The first line of a script's docstring: the paper's title and its number on arXiv."""
    return (ast.get_docstring(ast.parse(script.read_text("utf-8"))) or "").partition("\n")[0]


def own_files(script: pathlib.Path) -> list[pathlib.Path]:
    """The files of a paper: its script, or all of its folder."""
    return sorted(script.parent.glob("*.py")) if script.name == "main.py" else [script]


def missing(script: pathlib.Path) -> list[str]:
    """Top-level names that the paper's own files import and that are not installed."""
    names = {
        name for file in own_files(script) for name in _imported(ast.parse(file.read_text("utf-8")))
    }
    top = {name.split(".")[0] for name in names if name != "__future__"}
    return sorted(name for name in top if importlib.util.find_spec(name) is None)


def code_digest(script: pathlib.Path) -> str:
    """Eight hexadecimal digits of the script, its folder, and what they import of jaxft and worlds.

    Comments, docstrings and empty lines do not count, so editing them does not make a record stale.
    """
    todo, found = own_files(script), set()
    while todo:
        file = todo.pop()
        if file not in found and not any(folder in file.parents for folder in APART):
            found.add(file)
            todo += _read(file)[1]
    digest = hashlib.sha256()
    for file in sorted(found):
        digest.update(f"{file.relative_to(ROOT)}\n{_read(file)[0]}\n".encode())
    return digest.hexdigest()[:8]


@functools.cache
def _read(file: pathlib.Path) -> tuple[str, list[pathlib.Path]]:
    """Returns (code without comments and docstrings, files that it imports)."""
    text = file.read_text("utf-8")
    tree = ast.parse(text)
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                left_out.update(range(first.lineno, first.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    kept = [x for i, x in lines if i not in left_out and x.strip() and x.strip()[0] != "#"]
    modules = sorted(set(_imported(tree)))
    return "\n".join(kept), [f for name in modules if (f := _file(name))]


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # A name may be a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str) -> pathlib.Path | None:
    if module.split(".")[0] not in ("jaxft", "experiments"):
        return None
    path = ROOT.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in candidates if file.exists()), None)
