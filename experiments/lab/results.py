"""Writes docs/results.md and README's table of papers from the records: nothing trains."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.lab import records, sources
from experiments.lab.claims import Claim

PAGE = sources.ROOT / "docs" / "results.md"
README = sources.ROOT / "README.md"
MARKS = ("<!-- papers: written by make results -->\n", "<!-- end of papers -->\n")
INTRODUCTION = """\
# Results

Each script in `experiments/papers` measures claims of one paper at a size that two CPU cores manage, over
several seeds, on held-out data, beside a baseline with the same budget. A claim that fails stays on this
page.

| column | contents |
| --- | --- |
| paper | what the paper reports, at its own scale |
| here [interval] | what the script measured; in brackets the 95 % interval by Student's t over seeds, which \
figures draw too; below it, further measurements |
| holds if | the bound of each number: of its estimate, or of all or some of its interval |
| holds | whether every number satisfies its bound |

The command below a table repeats its measurement and, with `--record`, writes its record into docs/results:
only at the script's own settings, and only from committed code. `make results` writes this page from the
records, and `python -m experiments` says which of them are older than their code.
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
    papers = {r["slug"]: paper(sources.heading(scripts[r["slug"]])) for r in found}
    counts = [records.held(record) for record in found]
    total = "{} of {} recorded claims hold".format(*map(sum, zip((0, 0), *counts, strict=True)))
    summary = [
        [f"[{papers[r['slug']][0]}](#{r['slug']})", "{} of {}".format(*count), dates(r), minutes(r)]
        for r, count in zip(found, counts, strict=True)
    ]
    head = ("paper", "claims that hold", "recorded", "minutes")
    parts = [
        INTRODUCTION,
        f"{total} (papers: {len(found)}).\n",
        _table(head, summary),
    ]
    if rest := [f"`{slug}`" for slug in scripts if slug not in papers]:
        line = f"Scripts without a record yet: {', '.join(rest)}."
        parts.append(_wrapped(line))
    for record in found:
        title, link = papers[record["slug"]]
        parts += [f"## {record['slug']}\n", _wrapped(f"[{title}]({link})")]
        parts += [_part(record["slug"], name, row) for name, row in record["parts"].items()]
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


def _wrapped(line):
    """A paragraph of lines of at most 110 columns."""
    return textwrap.fill(line, 110, break_on_hyphens=False, break_long_words=False) + "\n"


def paper(heading: str) -> tuple[str, str]:
    """Parses (title, link) from the first line of a script's docstring."""
    found = re.fullmatch(r"(.+) \(arXiv (\d{4}\.\d{4,5})\).*", heading)
    if not found:
        raise ValueError(
            f"a script of a paper begins with 'Title (arXiv 1234.56789)', got {heading!r}."
        )
    return found[1], f"https://arxiv.org/abs/{found[2]}"


def minutes(record: dict[str, Any]) -> str:
    """Formats the total minutes of all parts of a record."""
    return f"{sum(part['minutes'] for part in record['parts'].values()):.0f}"


def dates(record: dict[str, Any]) -> str:
    """Formats the days on which the parts of a record were made."""
    return ", ".join(sorted({part["date"] for part in record["parts"].values()}))


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
        rows.append([slug, title, count, dates, minutes(record), state])
    return rows


def _part(slug: str, name: str, row: dict[str, Any]) -> str:
    claims = [Claim.parse(claim) for claim in row["claims"]]
    here = lambda c: "<br>".join(filter(None, (c.measured, c.detail)))
    cells = [[c.text, c.paper, here(c), c.needed, "yes" if c.holds else "**no**"] for c in claims]
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
    heading = "" if name == "main" else f"### {name}\n\n"
    return f"{heading}{table}\n![Figure of {slug}](results/{row['figure']})\n\n{lines}\n"


def _table(head, rows):
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)
