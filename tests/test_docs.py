"""The pages of docs: links resolve, lines are short, programs run as they are printed."""

import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
READ = [page for page in PAGES if page.name not in ("CHANGELOG.md", "decisions.md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Flags of tyro and of Google Cloud's command line.
TOOLS = {"help", "zone", "spot", "accelerator-type", "runtime-version"}
NAMES = lambda pages: [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=NAMES(PAGES))
def test_links_lead_to_files_of_the_repository(page):
    for target in LINK.findall(page.read_text()):
        path, _, heading = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), f"{target} does not exist"
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if heading else []
        slugs = [
            re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles
        ]
        assert not heading or heading in slugs, f"{target}: the page has {slugs}"


@pytest.mark.parametrize("page", READ, ids=NAMES(READ))
def test_prose_is_at_most_120_columns_wide(page):
    lines = page.read_text().splitlines()
    wide = [line for line in lines if len(line) > 120 and not line.startswith(("|", "    "))]
    assert not wide


@functools.cache
def names_in_code():
    """(all words of the repository's Python files, all flags of its commands)."""
    folders = ("jaxft", "experiments", "benchmarks", "tests")
    code = "\n".join(p.read_text() for name in folders for p in ROOT.glob(f"{name}/**/*.py"))
    fields = {name.replace("_", "-") for name in re.findall(r"^    (\w+):", code, re.M)}
    return {*re.findall(r"\w+", code)}, fields | {*re.findall(r'"--([a-z-]+)"', code)}


@pytest.mark.parametrize("page", READ, ids=NAMES(READ))
def test_names_and_flags_that_a_page_mentions_exist(page):
    """Names in code format with an underscore, and flags of commands of this repository."""
    text, (words, flags) = page.read_text(), names_in_code()
    named = set(re.findall(r"`(?:\w+\.)*([a-z]+_[a-z0-9_]+)(?:\([^`]*)?`", text))
    assert not named - words, "no such name in the code"
    ours = [line for line in text.splitlines() if "gcloud" not in line and "#SBATCH" not in line]
    given = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", "\n".join(ours)))
    assert not given - flags - TOOLS, "no such flag"


@pytest.mark.parametrize("page", ["adapters", "models", "retrieval", "rl"])
def test_a_page_s_program_runs_as_it_is_printed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.S)
    session = {}
    exec(program, session)
    assert len(session.get("history", [0] * 3)) > 2


def test_the_site_has_a_place_for_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    missing = [
        p for p in ROOT.glob("docs/**/*.md") if str(p.relative_to(ROOT / "docs")) not in text
    ]
    assert not missing, "add them to nav in mkdocs.yml"
    packages = {p.parent.name for p in ROOT.glob("jaxft/*/__init__.py")}
    described = {p.stem for p in ROOT.glob("docs/reference/*.md")}
    assert packages <= described, "add a page `::: jaxft.<package>`"
