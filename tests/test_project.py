"""Properties of the whole tree: layers, imports, docstrings, nothing private to one machine."""

import ast
import configparser
import fnmatch
import pathlib
import re
import subprocess
import sys

import pytest

from tests import costs

ROOT = pathlib.Path(__file__).parents[1]
# DESIGN: a folder imports only from folders above it, or from its own.
LAYERS = (
    "parallel kernels optim losses metrics weights models adapters checkpoints data generation "
    "diffusion rewards simulators objectives rl train analysis compression editing federated agents"
).split()
# Losses and kernels read weights by `matmul`; weights know neither, so nothing turns in a circle.
ABOVE_ALL = {"weights", "kernels", "keys", "output"}


def sources():
    return sorted((ROOT / "jaxft").rglob("*.py"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "jaxft":
            yield from (f"jaxft.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_folder_imports_only_from_those_above_it(path):
    parts = path.relative_to(ROOT / "jaxft").parts
    if len(parts) == 1:
        return
    place = LAYERS.index(parts[0])
    for module in imported(ast.parse(path.read_text())):
        names = module.split(".")
        if names[0] == "jaxft" and len(names) > 1 and names[1] not in ABOVE_ALL:
            assert LAYERS.index(names[1]) <= place, f"{path} imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_torch_no_pickle_and_docstrings_on_all_that_is_public(path):
    tree = ast.parse(path.read_text())
    banned = {"torch", "pickle", "tensorflow", "dill", "joblib"}
    assert not {module.split(".")[0] for module in imported(tree)} & banned
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_importing_is_light():
    def modules(*names):
        code = f"import sys, {', '.join(names)}; print(*sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return {m.split(".")[0] for m in result.stdout.split()}

    assert not modules("jaxft") & {"jax", "numpy", "flax", "transformers", "torch"}
    heavy = "torch transformers tensorflow datasets grain matplotlib tyro qwix".split()
    light = "jaxft.models", "jaxft.adapters", "jaxft.losses", "jaxft.checkpoints"
    assert not modules(*light) & set(heavy)


def test_a_wheel_holds_jaxft_alone():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    include = config["options.packages.find"]["include"].split()
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    folders = {pathlib.PurePath(name).parent for name in tracked.stdout.split()}
    names = {".".join(folder.parts) for folder in folders}
    # What setuptools' find_packages does with names of folders, which need an __init__.py.
    found = {n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in include)}
    assert found == {n for n in names if n.split(".")[0] == "jaxft"}
    assert all((ROOT / name.replace(".", "/") / "__init__.py").exists() for name in found)
    # The condition on which an editable install is the clone's own folder on the path.
    assert config["options"]["package_dir"].split() == ["=", "."]


PACKAGES = [path.parent for path in sources() if path.name == "__init__.py"]


@pytest.mark.parametrize(
    "folder",
    PACKAGES,
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_function_hides_a_module_of_its_name(folder):
    tree = ast.parse((folder / "__init__.py").read_text())
    modules = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/*.py")}
    package = ".".join(folder.relative_to(ROOT).parts)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module != package]
    exported = {alias.asname or alias.name for node in imports for alias in node.names}
    assert not exported & modules


def test_what_is_private_to_jax_is_used_in_one_place():
    using = [path for path in sources() if "jax._src" in path.read_text()]
    assert [(path.name, path.read_text().count("jax._src")) for path in using] == [("hosts.py", 1)]


def test_nothing_names_a_machine_or_a_registry():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    pattern = re.compile(r"/work/|/root/|pypi\.org|pythonhosted|registry\.npmjs|deb\.debian")
    for name in tracked.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".cfg", ".toml", ".ipynb", "") and path != pathlib.Path(
            __file__
        ):
            assert not pattern.search(path.read_text(errors="replace")), name


def test_slow_tests_that_are_listed_exist():
    for name in costs.read():
        path, _, function = name.partition("::")
        assert f"\ndef {function}(" in (ROOT / path).read_text(), name


def test_a_function_is_slow_with_its_dearest_case_and_its_cheapest_stays():
    seconds = {"t.py::a[x]": 3.0, "t.py::a[y::z[0]]": 0.2, "t.py::b": 0.5, "t.py::c": 2.0}
    seconds |= {"t.py::d[0]": 2.0, "t.py::d[1]": 3.0}
    assert costs.slow(seconds) == {"t.py::a": "[y::z[0]]", "t.py::c": "", "t.py::d": ""}
    assert costs.slow({"u/t.py::a": 3.0, "u/v.py::b": 2.0}) == {"u/t.py::a": ""}
