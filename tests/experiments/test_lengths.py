"""The everyday scripts hold what is their own: short, and no copies of one another."""

import ast
import pathlib

import pytest

HERE = pathlib.Path(__file__).parents[2] / "experiments"
# Lines of each script when what it shares with others moved to experiments/cli; merge.py's with the
# GGUF files and LoRA that it writes since then, sft.py's with the flags of experts, label smoothing,
# clips and the cache of a tower, and evaluate.py's with beam search and clips.
LONGEST = {"demo_rl": 203, "evaluate": 90, "generate": 103, "merge": 95, "preference": 234}
LONGEST |= {
    "reinforce": 390,
    "sample_pairs": 151,
    "sft": 251,
    "embed": 160,
    "rerank": 150,
    "transcribe": 94,
}
SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if not path.name.startswith("_"))


def code(name):
    """The lines of a script, stripped: no blanks, comments, docstrings or imports."""
    text = (HERE / f"{name}.py").read_text()
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        text_alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text_alone or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= {*range(node.lineno, node.end_lineno + 1)}
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return [x for number, x in lines if x and number not in left_out and not x.startswith("#")]


def share(lines, others):
    """The share of lines that also stand in the sibling that has most of them."""
    return max(sum(line in other for line in lines) for other in map(set, others)) / len(lines)


def test_the_share_of_lines_is_counted_in_the_nearest_sibling():
    assert share(["a", "b", ")", ")"], [["b", "c"], [")"], ["x"]]) == 0.5


@pytest.mark.parametrize("name", SCRIPTS)
def test_at_most_a_quarter_of_a_script_stands_in_its_nearest_sibling(name):
    assert share(code(name), [code(other) for other in SCRIPTS if other != name]) <= 0.25


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_grows(name):
    assert len((HERE / f"{name}.py").read_text().splitlines()) <= LONGEST[name]
