"""Finds habits of language that AGENTS.md forbids: python .ci/words.py

Part of make lint. Reads docstrings, comments and, outside of tests, strings of Python files, and the prose of
Markdown pages; prints file:line and what to write instead, and exits with 1 if it found something.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("jaxft", "experiments", "benchmarks", "docs", "tests")
# Kept word for word: the changelog, the decisions and the recorded claims are of their time.
APART = ("decisions.md", "CHANGELOG.md", "results.md")

# Rates: "tokens a step", "bits a number".
AMOUNTS = "(tokens|nats|seconds|bits|bytes|GiB|rows|examples|updates|passes|steps)"
UNITS = "(step|second|minute|hour|token|number|line|row|record|prompt|rollout|pair|device|layer|epoch|run)"
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
    r"\b(goes? on|went on)\b": "continues, continued",
    r"\bin place of\b": "instead of, or replaces",
    r"(?<!there )\bis no (?!longer|more|less|other|\w+er\b)": "is not a",
    r"\bof (its|their|his) own(?=[.,;:)]|$| and\b| for\b| around\b| beside\b)": "its own ..., or separate",
    rf"\b{AMOUNTS} an? {UNITS}\b": "per",
    r"(?<!\bused )(?<!\brun it )(?<!\bstay )(?<!`)\balone\b": "only, or by itself",
}
OPENING = re.compile(r"^(Of|As for|As|In|By|That|What|Whether|Where|How|Who)\b(?! soon)")
# A sentence whose subject is a clause: "What trains is saved.", "Whether it holds follows from its numbers."
CLAUSE = re.compile(
    r"(?:^|[.:;] )(What [^.?,;:]* (?:is|are|was|were)|(?:Whether|How) [^.?,;:]* (?:follows|depends|matters)) "
    r"[^.?]*[.;,]"
)


def comments(source: str):
    """Yields (line, text) of each block of comments: lines without code between them are one text."""
    last, first, block = 0, 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"#\s*(noqa|type:|pragma|!)", token.string):
            continue
        line, text = token.start[0], token.string.lstrip("#: ")
        if block and line != last + 1:
            yield first, " ".join(block)
            block = []
        first, last = (first if block else line), line
        block.append(text)
    if block:
        yield first, " ".join(block)


def paragraphs(source: str):
    """Yields (line, text) of each paragraph, cell or heading of a page's prose."""
    fenced, first, block = False, 0, []
    for number, line in enumerate([*source.splitlines(), ""], 1):
        fenced ^= line.startswith("```")
        prose = not (fenced or line.startswith(("    ", "```"))) and line.strip()
        if block and (not prose or line.startswith(("|", "- ", "#"))):
            yield first, " ".join(block)
            block = []
        if prose:
            first = first if block else number
            block.append(line.strip())


def texts(path: pathlib.Path):
    """Yields (line, text, whether it is a docstring) for each piece of prose of a file."""
    source = path.read_text()
    if path.suffix == ".md":
        for number, text in paragraphs(source):
            yield number, text, False
        return
    for number, text in comments(source):
        yield number, text, False
    strings = ROOT / "tests" not in path.parents  # those of tests are data
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text, True
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value, False


def found(path: pathlib.Path) -> list[str]:
    """The findings of a file, one line each."""
    lines = []
    for number, text, docstring in texts(path):
        place = f"{path.relative_to(ROOT)}:{number}"
        if docstring and OPENING.match(text):
            first = text.splitlines()[0]
            lines.append(f"{place}: {first!r}: begin with a verb or the noun that names the result")
        if match := CLAUSE.search(" ".join(text.split())):
            lines.append(
                f"{place}: {match.group(1)!r}: subject first: a noun instead of the clause"
            )
        for pattern, instead in RULES.items():
            for match in re.finditer(pattern, " ".join(text.split()), re.IGNORECASE):
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
