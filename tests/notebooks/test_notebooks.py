"""Every notebook runs from top to bottom, at its smallest."""

import ast
import importlib.util
import pathlib
import subprocess
import sys
import warnings

import jax
import matplotlib.pyplot as plt
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_cell(source, name, session):
    """Runs a cell and shows its last value and its figures, as a notebook does; returns how many figures."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), session)
    if last is not None:
        repr(eval(compile(ast.Expression(last.value), name, "eval"), session))
    numbers = plt.get_fignums()
    for number in numbers:
        plt.figure(number).canvas.draw()
    plt.close("all")
    return len(numbers)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_notebook_runs(path, monkeypatch):
    """Runs in this process, whose imports and compiled programs it shares, with the settings of a new one."""
    monkeypatch.setenv("JAXFT_NOTEBOOK_MODEL", "tiny")
    monkeypatch.setenv("JAXFT_NOTEBOOK_STEPS", "4")
    plt.switch_backend("agg")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    session = {"__name__": "__main__"}
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("default")
        for i, source in enumerate(cells):
            figures = run_cell(source, f"{path.name}[{i}]", session)
    assert figures > 0, "end with a picture"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_notebook_opens_on_colab_and_installs_what_is_not_there(path, monkeypatch):
    notebook, ran = nbformat.read(path, as_version=4), []
    address = "colab.research.google.com/github/jaxft/jaxft/blob/main/notebooks/" + path.name
    assert address in notebook.cells[0].source
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    install = first[: first.index("check=True)") + len("check=True)")]
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    exec(install, {})
    assert not ran
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(install, {})
    assert ran[0][:-1] == [sys.executable, "-m", "pip", "install", "-q"] and "jaxft[" in ran[0][-1]
