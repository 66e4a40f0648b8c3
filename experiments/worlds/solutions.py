"""Solutions of word problems in three formats: a program, text with blocks of code, and text.

The formats of TinyGSM, OpenMathInstruct-1 and OpenMathInstruct-2. The answer of a solution is what its code
returns or its text states.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from jaxft.rewards import answer_reward, numbers_equal, run_python, stated_answer
from jaxft.rewards.verifiers import Verifier

FORMATS = ("program", "code blocks", "text")
# The paper's sources in the order of FORMATS, and their columns.
SOURCES: Mapping[str, dict[str, str]] = {
    "TinyGSM/TinyGSM?streaming=true&limit=1000000": {"answer": "code"},
    "nvidia/OpenMathInstruct-1?streaming=true&limit=1000000": {"answer": "generated_solution"},
    "nvidia/OpenMathInstruct-2?streaming=true&limit=1000000": {
        "question": "problem",
        "answer": "generated_solution",
    },
}
_BLOCK, _END = "<llm-code>", "</llm-code>"


def format_of(text: str) -> int:
    """Returns the number in FORMATS of a solution's format."""
    if _BLOCK in text:
        return 1
    return 0 if "def " in text else 2


def answer_of(text: str) -> str | None:
    """Returns the answer of a solution; None if its code fails or its text states none.

    That of a program is what its last function returns without arguments; of blocks of code, the value of
    the last line of the last block. Programs run in `run_python`.
    """
    if _BLOCK in text:
        program = _with_solution(text.rpartition(_BLOCK)[2].partition(_END)[0])
        return program and run_python(program, seconds=3.0)
    if "def " in text:
        program = text[text.index("def ") :]
        *_, last = ["", *re.findall(r"^def (\w+)\(", program, re.MULTILINE)]
        return run_python(f"{program}\nsolution = {last}", seconds=3.0) if last else None
    return stated_answer(text)


def grader() -> Verifier:
    """Returns the verifier of solutions: 1 for the right number, 0 otherwise."""
    return answer_reward(answer_of, numbers_equal, partial=0.0)


def _with_solution(block: str) -> str | None:
    """Returns the block with a `solution()` that gives the value of its last line."""
    try:
        tree = ast.parse(block.strip())
    except (SyntaxError, ValueError):
        return None
    last: Any = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        value = last.value
        tree.body.pop()
    elif isinstance(last, ast.Assign):
        value = last.targets[0]
    else:
        return None
    head, value = ast.unparse(tree), ast.unparse(value)
    return f"{head}\ndef solution():\n    return {value}\n"
