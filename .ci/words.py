"""Finds habits of language that docs/style forbids: python .ci/words.py

Part of make lint. Looks at docstrings and strings of Python files and at the prose of Markdown pages; prints
file:line and what to write instead, and exits with 1 if it found something.
"""

import ast
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("jaxft", "experiments", "benchmarks", "docs")
# Kept word for word: the changelog and the decisions are a record of their time.
APART = ("decisions.md", "CHANGELOG.md")

RULES = {
    r"\bbut for\b": "except",
    r"\bby the book\b": "name the rule",
    r"\b(is|are|was|be) told\b": "say who gives what to whom: gets, is given, receives",
    r"\bnobody\b": "name what is missing",
    r"\bkept are\b": "subject first: ... are kept",
    r"\bstands? still\b": "does not change",
    r"\bwhether or not\b": "whether",
    r"\bis of (?=[a-z_]+\.py)": "only ... supports",
    r"\bgoes? with (it|them|any|every)\b": "works with",
    r"\bthat of the\b.*\bthat of the\b": "repeat the noun",
}
OPENING = re.compile(r"^(Of|As for|As|In|By|That|Whether or not)\b(?! soon)")


def texts(path: pathlib.Path):
    """Yields (line, text, whether it is a docstring) for each piece of prose of a file."""
    source = path.read_text()
    if path.suffix == ".md":
        fenced = False
        for number, line in enumerate(source.splitlines(), 1):
            fenced ^= line.startswith("```")
            if not fenced and not line.startswith("    "):
                yield number, line, False
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text, True
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, False


def found(path: pathlib.Path) -> list[str]:
    """The findings of a file, one line each."""
    lines = []
    for number, text, docstring in texts(path):
        place = f"{path.relative_to(ROOT)}:{number}"
        if docstring and OPENING.match(text):
            first = text.splitlines()[0]
            lines.append(f"{place}: {first!r}: begin with a verb or the noun that names the result")
        for pattern, instead in RULES.items():
            if match := re.search(pattern, text, re.IGNORECASE):
                lines.append(f"{place}: {match.group()!r}: write: {instead}")
    # A docstring is a string, too.
    return sorted(set(lines))


def main() -> int:
    """Prints the findings; 1 if there are any."""
    pages = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "TPU_SETUP.md"]
    for folder in FOLDERS:
        pages += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]
    lines = [line for page in sorted(pages) if page.name not in APART for line in found(page)]
    print("\n".join(lines) or "words: nothing found")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
