"""Lists the scripts and the recorded results of the papers: python -m experiments

python -m experiments --results writes docs/results.md and README's table from the records (make results).
"""

import argparse
import ast
import pathlib

HERE = pathlib.Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    """Prints each everyday script with the first line of its docstring, then the table of papers."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument(
        "--results", action="store_true", help="write docs/results.md and README's table"
    )
    # The lab imports NumPy and SciPy, but no JAX.
    from experiments.lab import records, results

    if parser.parse_args(arguments).results:
        found = records.load()
        results.PAGE.write_text(results.render(found), encoding="utf-8")
        readme = results.README.read_text(encoding="utf-8")
        results.README.write_text(results.with_papers(readme, found), encoding="utf-8")
        print(f"{results.PAGE.relative_to(HERE.parent)}: {len(results.held())} papers")
        return
    for file in scripts():
        doc = ast.get_docstring(ast.parse(file.read_text())) or ""
        print(f"python experiments/{file.relative_to(HERE)!s:38} {doc.splitlines()[0]}")
    print_papers(results.overview())


def print_papers(rows: list[list[str]]) -> None:
    """Prints the table of papers: their claims, last record, and whether the code has changed since."""
    from rich.console import Console
    from rich.table import Table

    table = Table("slug", "paper", "claims", "recorded", "minutes", "stale")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def scripts() -> list[pathlib.Path]:
    """Returns the runnable files: the everyday scripts, then one for each paper."""
    papers = HERE / "papers"
    jobs, single = sorted(HERE.glob("*.py")), sorted(papers.glob("*.py"))
    files = [*jobs, *sorted([*single, *papers.glob("*/main.py")])]
    return [file for file in files if not file.name.startswith("_")]


if __name__ == "__main__":
    main()
