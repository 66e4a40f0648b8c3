"""Lists the scripts: python -m experiments"""

import ast
import pathlib

HERE = pathlib.Path(__file__).parent


def main() -> None:
    """Prints each script with the first line of its docstring."""
    for file in scripts():
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        print(f"python experiments/{file.relative_to(HERE)!s:34}{doc.splitlines()[0]}")


def scripts() -> list[pathlib.Path]:
    """The files that are meant to be run: the everyday jobs, then one for each paper."""
    papers = HERE / "papers"
    jobs, single = sorted(HERE.glob("*.py")), sorted(papers.glob("*.py"))
    files = [*jobs, *sorted([*single, *papers.glob("*/main.py")])]
    return [file for file in files if not file.name.startswith("_")]


if __name__ == "__main__":
    main()
