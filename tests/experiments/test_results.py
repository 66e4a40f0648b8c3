"""Claims hold by their numbers; records need the scripts' own settings; the page equals the records."""

import dataclasses
import importlib.util
import json
import math
import types

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.__main__ import main as list_scripts
from experiments.cli import flags
from experiments.lab import records, results, seeds, sources
from experiments.lab.claims import Claim, Number, interval, mean, worst
from experiments.lab.figures import bar_means, plot_band
from jaxft.train import MissingDependencyError

NAN, INF = math.nan, math.inf
MODULES = {
    slug: ".".join(path.relative_to(sources.ROOT).with_suffix("").parts)
    for slug, path in sources.scripts().items()
}


@pytest.mark.parametrize(
    "estimate, low, high, direction, bound, held",
    [
        # (by the estimate, all of the interval, any of it)
        (0.1, -0.1, 0.3, "above", 0, (True, False, True)),
        (0.1, 0.0, 0.2, "above", 0, (True, False, True)),
        (0.1, 0.0, 0.2, "at least", 0, (True, True, True)),
        (-0.1, -0.3, -0.05, "at least", 0, (False, False, False)),
        (0.1, -0.1, 0.3, "below", 0, (False, False, True)),
        (0.1, 0.0, 0.3, "at most", 0, (False, False, True)),
        (0.02, 0.01, 0.04, "within", (-0.03, 0.03), (True, False, True)),
        (1.0, 1.0, 1.0, "equal to", 1, (True, True, True)),
        (0.1, None, None, "above", 0, (True, False, True)),  # one seed
        (NAN, NAN, NAN, "above", 0, (False, False, False)),
        (NAN, None, None, "at most", 0, (False, False, False)),
        (INF, None, None, "at least", 2, (True, False, True)),
    ],
)
def test_a_claim_holds_by_its_numbers_and_is_read_as_written(
    estimate, low, high, direction, bound, held
):
    for by, expected in zip(("estimate", "all", "any"), held, strict=True):
        number = Number(estimate, direction, bound, low, high, seeds=3, by=by)
        assert number.holds is expected, by
        fine = Number(1, "equal to", 1, style="d")
        for numbers in ([number], [fine, number], [number, fine]):
            claim = Claim("a", "b", numbers, "c")
            text = json.dumps(claim.plain(), allow_nan=False)  # what other languages read too
            row = json.loads(text)
            assert claim.holds is row["holds"] is expected
            # "holds" of a file is not believed.
            again = Claim.parse(row | {"holds": not expected})
            assert again.plain() == claim.plain() and again.holds is expected


def test_numbers_over_seeds():
    values = [0.1, 0.2, 0.4]
    number = mean(values, "above", 0)
    assert (number.estimate, number.low, number.high) == interval(values) and number.seeds == 3
    assert mean([1.0], "above", 0).low is None and not mean([1.0], "above", 0).holds
    assert worst(values, "above", 0.1).estimate == 0.1 and not worst(values, "above", 0.1).holds
    assert worst(values, "below", 0.5).estimate == 0.4
    claim = Claim("a", "b", [number, dataclasses.replace(number, bound=0.1)], "more")
    assert claim.here == "0.233 [-0.146, 0.613]; more"  # a number with two bounds is said once
    assert claim.needed == "above 0 (all of the interval); above 0.1 (all of the interval)"


def test_figures_draw_student_s_interval():
    values = np.array([[1.0, 4.0], [2.0, 4.0], [3.0, 7.0]])
    axes = Figure().subplots()
    plot_band(axes, [0, 1], values, label="a")
    edges = axes.collections[0].get_paths()[0].vertices
    for x, column in enumerate(values.T):
        middle, low, high = interval(column)
        assert axes.lines[0].get_ydata()[x] == middle
        at = edges[edges[:, 0] == x][:, 1]
        np.testing.assert_allclose((at.min(), at.max()), (low, high))
    axes = Figure().subplots()
    bar_means(axes, ["a", "b"], values)
    (segments,) = (c.get_segments() for c in axes.collections)
    np.testing.assert_allclose(segments[0][:, 0], interval(values[:, 0])[1:])


def recorded(slug, **change):
    module = importlib.import_module(MODULES[slug])
    return module, flags.replace(module.Config(), **{"record": True} | change)


@pytest.mark.parametrize("slug", MODULES)
def test_a_smoke_run_is_not_recorded(slug, tmp_path):
    module, config = recorded(slug, smoke=True, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--record: a smoke run") as refused:
        module.main(config)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_package_that_a_paper_imports_is_asked_for_before_any_work(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name: None if name == "sklearn" else find(name)
    monkeypatch.setattr(importlib.util, "find_spec", without)
    module, config = recorded("monarch", record=False, output_dir=str(tmp_path / "out"))
    with pytest.raises(
        MissingDependencyError, match=r"monarch.py needs sklearn, .*'jaxft\[papers\]'"
    ):
        module.main(config)
    assert not (tmp_path / "out").exists()
    assert sources.missing(sources.scripts()["tram"]) == ["sklearn"]
    assert sources.missing(sources.scripts()["nft"]) == []


@pytest.mark.parametrize(
    "slug, change, message",
    [
        ("nft", {"rollouts": 5}, "rollouts is 5, but a record"),
        ("nft", {"first_seed": 100}, "first_seed is 100"),
        (
            "dco",
            {"mode": "cot", "epochs": 5},
            r"epochs is 5, .* \(or --mode cot, --mode proof, --preset full\)",
        ),
        ("tram", {"preset": "full", "texts": "a"}, "texts is 'a'"),
        ("intrinsic-dimension", {"model": "smollm2"}, "model is 'smollm2'"),
    ],
)
def test_other_settings_are_not_recorded(slug, change, message, tmp_path):
    module, config = recorded(slug, output_dir=str(tmp_path / "out"), **change)
    with pytest.raises(ValueError, match=message):
        module.main(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "slug, change, part, command",
    [
        (
            "nft",
            {"seeds": 5, "debug": True, "output_dir": "a"},
            "main",
            "nft.py --seeds 5 --record",
        ),
        ("dco", {}, "direct", "dco/main.py --record"),
        ("dco", {"mode": "cot"}, "cot", "dco/main.py --mode cot --record"),
        ("paca", {"preset": "full"}, "full", "paca/main.py --preset full --record"),
    ],
)
def test_the_command_of_a_record_repeats_it(slug, change, part, command, monkeypatch):
    monkeypatch.setattr(records, "_commit", lambda: "c0ffee")
    module, config = recorded(slug, **change)
    made = records.draft(config, getattr(module, "PARTS", records.MAIN))
    assert (made.slug, made.part, made.commit) == (slug, part, "c0ffee")
    assert made.command == f"python experiments/papers/{command}"
    assert made.seeds == list(range(config.seeds)) and "output_dir" not in made.settings


@pytest.mark.parametrize(
    "answers, message",
    [
        ({"status": (0, " M a.py\n?? b\n")}, r"--record: 2 changes are not committed \(M a.py"),
        ({"status": (128, "")}, "--record: needs a git checkout: fatal: no"),
    ],
)
def test_a_tree_with_changes_is_not_recorded(answers, message, monkeypatch):
    def run(command, **options):
        code, text = answers[command[1]]
        return types.SimpleNamespace(returncode=code, stdout=text, stderr="fatal: no\n")

    monkeypatch.setattr(records.subprocess, "run", run)
    with pytest.raises(ValueError, match=message):
        records._commit()


def test_a_failed_claim_is_recorded_before_the_exit_code_and_parts_join(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(records, "_commit", lambda: "c0ffee")
    Figure(figsize=(1, 1)).savefig(tmp_path / "dco.png")
    claim = lambda estimate: Claim("a", "b", [Number(estimate, "above", 0)], "more")
    for mode, estimate in (("direct", 1.0), ("cot", -1.0), ("direct", 2.0)):
        module, config = recorded("dco", mode=mode, output_dir=str(tmp_path))
        run = seeds.begin(config, module.PARTS)
        run.kept = 600.0  # seconds of seeds that an earlier run finished
        assert run.finish([claim(1.0), claim(estimate)], {}) == (estimate < 0)
    record = json.loads((tmp_path / "results" / "dco.json").read_text())
    assert {name: part["minutes"] for name, part in record["parts"].items()} == {
        "direct": 10.0, "cot": 10.0,
    }  # fmt: skip
    assert record["parts"]["direct"]["claims"][1]["numbers"][0]["estimate"] == 2.0
    assert record["parts"]["cot"]["claims"][1]["holds"] is False
    assert results.held() == [("dco", 3, 4)]
    page = results.render(records.load())
    day = record["parts"]["cot"]["date"]
    assert f"Limiting Confidence](#dco) | 3 of 4 | {day} | 20 |" in page
    assert "3 of 4 recorded claims hold (papers: 1)." in page and "`lion`" in page
    assert "| -1.000<br>more | above 0 | **no** |" in page
    assert "results/dco-cot.png" in page and (tmp_path / "results" / "dco-direct.png").exists()
    list_scripts([])
    row = next(line for line in capsys.readouterr().out.splitlines() if "│ dco " in line)
    assert "3/4" in row and row.split("│")[-2].strip() == "no"


def test_a_digest_follows_imports_and_reads_code_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)

    def digest(used='"""Doc."""\nx = 1  # one\n', unused="y = 1"):
        sources._read.cache_clear()
        files = {
            "experiments/papers/a.py": "from jaxft import b\n",
            "jaxft/__init__.py": "", "jaxft/b/__init__.py": "from jaxft.b.c import x\n",
            "jaxft/b/c.py": used, "jaxft/d.py": unused,
        }  # fmt: skip
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return sources.code_digest(tmp_path / "experiments" / "papers" / "a.py")

    assert digest() == digest(unused="y = 2")
    assert digest() == digest(used='"""Another\n\ndoc."""\n\n# why\nx = 1  # one\n')
    assert digest() != digest(used='"""Doc."""\nx = 2  # one\n')
    sources._read.cache_clear()


RECORDS = records.load()


def test_the_page_is_that_of_the_records():
    assert results.PAGE.read_text("utf-8") == results.render(RECORDS), "run `make results`"
    readme = results.README.read_text("utf-8")
    assert results.with_papers(readme, RECORDS) == readme, "run `make results`"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["slug"])
def test_a_record_is_whole(record):
    assert record["slug"] in sources.scripts()
    module = importlib.import_module(MODULES[record["slug"]])
    known = {**getattr(module, "PARTS", records.MAIN), "full": {}}
    for name, part in record["parts"].items():
        assert name in known and part["claims"] and part["minutes"] > 0
        assert [Claim.parse(row).plain() for row in part["claims"]] == part["claims"]
        assert 1000 < (records.FOLDER / part["figure"]).stat().st_size < records.FIGURE_BYTES
        assert len(part["commit"]) == 40 and part["command"].endswith(" --record")
