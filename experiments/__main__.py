"""Lists the scripts: python -m experiments"""

import ast
import pathlib


def main() -> None:
    """Prints each script with the first line of its docstring."""
    here = pathlib.Path(__file__).parent
    for file in [*sorted(here.glob("*.py")), *sorted(here.glob("papers/*.py"))]:
        if not file.name.startswith("_"):
            doc = ast.get_docstring(ast.parse(file.read_text())) or ""
            print(f"python experiments/{file.relative_to(here)!s:24}{doc.splitlines()[0]}")


if __name__ == "__main__":
    main()
