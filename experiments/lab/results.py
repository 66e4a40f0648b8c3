"""Writes docs/results.md and README's table of papers from the records: nothing trains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.lab import records, sources
from experiments.lab.claims import Claim

PAGE = sources.ROOT / "docs" / "results.md"
README = sources.ROOT / "README.md"
MARKS = ("<!-- papers: written by make results -->\n", "<!-- end of papers -->\n")
INTRODUCTION = """\
# Results

`make results` writes this page from the records in docs/results; edit neither by hand. A script of a paper
writes its record when it is run with `--record`, at its own settings and from a commit: the command stands
below each table, and `python -m experiments` says which records are older than their code.

Claims are measured over several seeds, on held-out data. Brackets are 95 % intervals by Student's t over
seeds, and figures draw the same intervals. The numbers of a claim and the bound
beside them decide whether it holds. A claim that fails stays on this page as failed.
"""


class Held(NamedTuple):
    """The number of a paper's claims that hold, by its record."""

    slug: str
    held: int
    total: int


def held() -> list[Held]:
    """Returns the state of each recorded paper, sorted by slug; reads JSON, imports no JAX."""
    return [Held(record["slug"], *records.held(record)) for record in records.load()]


def render(found: Sequence[dict[str, Any]]) -> str:
    """Renders the page of these records."""
    scripts = sources.scripts()
    summary = [
        [f"[{r['slug']}](#{r['slug']})", "{} of {}".format(*records.held(r)), f"{minutes(r):.0f}"]
        for r in found
    ]
    parts = [INTRODUCTION, _table(("paper", "claims held", "minutes"), summary)]
    for record in found:
        title, link = paper(sources.heading(scripts[record["slug"]]))
        parts += [f"## {record['slug']}\n", f"[{title}]({link})\n"]
        parts += [_part(name, row) for name, row in record["parts"].items()]
    return "\n".join(parts)


def with_papers(readme: str, found: Sequence[dict[str, Any]]) -> str:
    """Returns README with a new table of papers: slug, paper, claims held of all, script."""
    state = {r["slug"]: "[{} of {}](docs/results.md#{})" for r in found}
    state = {r["slug"]: state[r["slug"]].format(*records.held(r), r["slug"]) for r in found}
    rows = []
    for slug, script in sources.scripts().items():
        title, link = paper(sources.heading(script))
        path = script.relative_to(sources.ROOT)
        rows.append(
            [f"[{title}]({link})", state.get(slug, "not recorded yet"), f"[{slug}]({path})"]
        )
    start, end = MARKS
    before, rest = readme.split(start)
    table = _table(("paper", "claims that hold", "script"), rows)
    return f"{before}{start}{table}{end}{rest.split(end)[1]}"


def paper(heading: str) -> tuple[str, str]:
    """Parses (title, link) from the first line of a script's docstring."""
    found = re.fullmatch(r"(.+) \(arXiv (\d{4}\.\d{4,5})\).*", heading)
    if not found:
        raise ValueError(
            f"a script of a paper begins with 'Title (arXiv 1234.56789)', got {heading!r}."
        )
    return found[1], f"https://arxiv.org/abs/{found[2]}"


def minutes(record: dict[str, Any]) -> float:
    """Total minutes of all parts of a record."""
    return sum(part["minutes"] for part in record["parts"].values())


def overview() -> list[list[str]]:
    """Returns rows of `python -m experiments`: slug, paper, claims held of all, date, minutes, stale."""
    found = {record["slug"]: record for record in records.load()}
    rows = []
    for slug, script in sources.scripts().items():
        title, _ = paper(sources.heading(script))
        record = found.get(slug)
        if record is None:
            rows.append([slug, title, "", "not recorded", "", ""])
            continue
        told = record["parts"].values()
        dates = ", ".join(dict.fromkeys(f"{p['date']} {p['commit'][:8]}" for p in told))
        old = [
            name for name, p in record["parts"].items() if p["code"] != sources.code_digest(script)
        ]
        state = f"yes: {', '.join(old)}" if old else "no"
        count = "{}/{}".format(*records.held(record))
        rows.append([slug, title, count, dates, f"{minutes(record):.0f}", state])
    return rows


def _part(name: str, row: dict[str, Any]) -> str:
    claims = [Claim.parse(claim) for claim in row["claims"]]
    cells = [[c.text, c.paper, c.here, c.needed, "yes" if c.holds else "**no**"] for c in claims]
    table = _table(("claim", "paper", "here [interval]", "holds if", "holds"), cells)
    machine, seeds = row["machine"], row["seeds"]
    packages = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    facts = [
        f"Command: `{row['command']}`",
        f"Seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"Seed {seeds[0]}",
        f"{row['minutes']:.1f} minutes on {machine['cpus']} CPUs ({machine['cpu']}), JAX devices: "
        f"{machine['devices']}",
        f"Recorded {row['date']} at commit `{row['commit'][:12]}`",
        packages,
    ]
    lines = "\n".join(f"- {fact}" for fact in facts)
    title = "" if name == "main" else f"### {name}\n\n"
    figure = f"![{row['figure'].removesuffix('.png')}](results/{row['figure']})"
    return f"{title}{table}\n{figure}\n\n{lines}\n"


def _table(head, rows):
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)
