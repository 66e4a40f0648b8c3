"""Every notebook runs from top to bottom, at its smallest."""

import ast
import pathlib
import warnings

import jax
import matplotlib.pyplot as plt
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run_cell(source, name, session):
    """Runs a cell and shows its last value and its figures, as a notebook does."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), session)
    if last is not None:
        repr(eval(compile(ast.Expression(last.value), name, "eval"), session))
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebook_runs(path, monkeypatch):
    """In this process, whose imports and compiled programs it shares, with the settings of a new one."""
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
            run_cell(source, f"{path.name}[{i}]", session)
