"""corpus_mining: its worlds are as they are described, its stages as named, its judge can fail."""

import json

import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers.corpus_mining import full, main, tasks
from experiments.worlds import gold_document, manpages
from experiments.worlds import parallel_texts as texts
from jaxft.data import DataError, mining
from jaxft.metrics import alignment_scores


def test_smoke(tmp_path):
    config = main.Config(smoke=True, output_dir=str(tmp_path))
    assert main.main(config) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    run = metrics["runs"][0]
    assert set(run["bleu"]) == set(main.SMOKE_METHODS) and "tok:none" in run["signature"]
    f1 = run["alignment"]["0.3"]  # does not depend on training
    assert f1["dynamic program"] > f1["greedy"] > f1["diagonal"]
    assert (tmp_path / "corpus_mining.png").stat().st_size > 1000


def test_the_dynamic_program_aligns_random_documents_better_than_both_baselines():
    f1 = main.aligned(main.Config(documents=5), 0.3, 0)
    assert f1["dynamic program"] > 0.9 > f1["greedy"] + 0.1 > f1["diagonal"] + 0.2


def test_a_document_s_gold_alignment_is_of_equal_sentences():
    rng = np.random.default_rng(0)
    document = texts.words(rng, sentences=400)
    sizes = [tuple(map(len, pair)) for pair in document.gold]
    for left, right in document.gold:
        joined = [sum((side[i] for i in places), []) for side, places in [
            (document.source, left), (document.target, right)
        ]]  # fmt: skip
        assert [word[1:] for word in joined[0]] == [word[1:] for word in joined[1]]
    shares = [sizes.count(size) / 400 for size in [(2, 1), (1, 2), (1, 1)]]
    np.testing.assert_allclose(shares, [0.08, 0.08, 0.73], atol=0.05)
    # Without errors in the translations, the alignment is that of the document.
    vocabularies = [[f"{side}{w}" for w in range(400)] for side in "ab"]
    arrays = texts.sums_of(rng, document, 0.0, vocabularies)
    found = mining.align(*arrays).pairs
    assert alignment_scores(found, document.gold)["f1"] > 0.95


def test_noise_has_its_rate():
    rng = np.random.default_rng(0)
    words = [["a"] * 20_000]
    (noisy,) = texts.noisy(rng, words, 0.4, ["b"])
    assert len(noisy) / 20_000 == pytest.approx(0.8, abs=0.02)
    assert noisy.count("b") / len(noisy) == pytest.approx(0.4, abs=0.02)


def test_the_toy_language_has_its_word_order_endings_and_new_words():
    language, rng = texts.Language(), np.random.default_rng(1)
    known, source, target = {}, set(), set()
    for _ in range(300):
        clauses = language.sentence(rng, 1)
        assert len(clauses) == 2 and clauses[1][0][0] == "and" and clauses[1][1][0] == "AND"
        for left, right in clauses:
            assert ("+ed" in left) == (right[-1] == "+ta") and right.count("+o") == 1
            stems = sorted(w.upper() for w in left if w != "+ed")
            assert stems == sorted(w for w in right if w[0] != "+")
            verb = next(w for w in left if w[0] == "v")
            assert right[-1 - ("+ta" in right)] == verb.upper()
        source |= set(clauses[0][0])
        target |= set(clauses[0][1])
    vocabulary = language.vocabulary()
    assert source <= set(vocabulary[0]) and target <= set(vocabulary[1])
    for domain in (0, 1):
        known[domain] = {s for stems in language.stems(domain).values() for s in stems}
    assert len(known[0]) == len(known[1]) == 200 and len(known[1] - known[0]) == 80
    assert texts.surface("THE N1 +o V2 +ta") == "THE N1o V2ta"


def test_most_mined_pairs_are_translations():
    pairs, found = texts.mined_pairs(texts.Language(), np.random.default_rng(0), 60)
    assert len(pairs) == 60 == len(set(pairs)) and found["f1"] > 0.8 and found["wrong"] < 0.2
    assert max(len(side.split()) for pair in pairs for side in pair) <= 32


PAGE = """.\\" a comment
.TH CP 1
.SH {name}
cp \\- {text}
.PP
.B cp
[\\fI\\,OPTION\\/\\fR]...
.nf
literal
.fi
\\(aqquoted\\(aq
"""


def test_paragraphs_of_a_manual_page():
    found = manpages.paragraphs(PAGE.format(name="NAME", text="copy files"))
    assert found == [("SH", "NAME cp - copy files"), ("PP", "cp [OPTION]... 'quoted'")]


def test_manual_pages_of_the_same_layout_are_parallel(tmp_path):
    names = "one two three four five six seven eight nine ten".split()
    japanese = "一 二 三 四 五 六 七 八 九 十".split()
    for number in range(8):
        order = np.random.default_rng(number).permutation(10)
        for folder, words in (("man1", names), ("ja/man1", japanese)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            lines = [f".PP\n{words[i]} {words[(3 * i + 1) % 10]}" for i in order]
            if number == 7 and folder == "man1":
                lines.insert(3, ".PP\nend")  # another layout
            (tmp_path / folder / f"page{number}.1").write_text("\n".join(lines))
    pages = manpages.load(str(tmp_path))
    assert [page.parallel for page in pages] == [True] * 7 + [False]
    config = flags.replace(
        main.Config(),
        data="manpages",
        directory=str(tmp_path),
        smoke=True,
        output_dir=str(tmp_path),
    )
    assert main.main(config) == 0
    row = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]["alignment"]["manpages"]
    assert row["dynamic program"] > row["diagonal"]
    pairs = [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    right = dict(zip(names, japanese, strict=True))
    turned = [" ".join(right.get(w, w) for w in pair["prompt"].split()) for pair in pairs]
    wrong = [t for t, pair in zip(turned, pairs, strict=True) if t != pair["completion"]]
    assert len(pairs) > 5 and len(wrong) < 0.2 * len(pairs)
    with pytest.raises(DataError, match="0 pages in English and in 'ja'.*apt-get install manpages"):
        manpages.load(str(tmp_path / "man1"))


def test_the_authors_document(tmp_path):
    texts_of = {name: [f"w{i} x{i}" for i in range(62)] for name in gold_document.FILES}
    pairs = [(i, i) for i in range(1, 63) if i not in (51, 61)] + [(51, 51)]
    for name, rows in (texts_of | {gold_document.GOLD: [f"{i} {j}" for i, j in pairs]}).items():
        lines(tmp_path / name, rows)
    config = flags.replace(main.Config(), data="authors", directory=str(tmp_path))
    document = gold_document.load(str(tmp_path))
    assert ((60,), (50,)) in document.gold and ((50,), (50,)) not in document.gold
    f1 = main.authors_document(config, 0)["alignment"]["authors"]
    assert f1["dynamic program"] == f1["diagonal"] == pytest.approx(2 * 60 / (62 + 61))
    with pytest.raises(DataError, match="doc.ja.txt.tok: cannot be read"):
        gold_document.load(str(tmp_path / "nowhere"))


def test_stages_share_their_beginning_and_all_methods_their_number_of_steps():
    config = main.Config()
    for stages in main.METHODS.values():
        assert sorted(part for stage in stages for part in stage.parts) == [0, 1, 2]
    assert main.METHODS["two stages"][0] == main.METHODS["three stages"][0]
    parts = [[tasks.tokenised([5], [6])] * 200, [tasks.tokenised([7, 7], [8])] * 20]
    batch = next(tasks.mixed(parts, "both", 4, config.max_length, 0))
    first = (batch["source"] == 5).sum(), (batch["source"] == 7).sum() // 2
    assert abs(first[0] - first[1]) <= 2  # both domains alike, in spite of their sizes


@pytest.mark.parametrize(
    "name, score, fails",
    [
        (None, 0, []),
        ("in-domain only", 60, [1, 2]),
        ("out-of-domain only", 48, [2]),
        ("three stages", 38, [3, 4]),
        ("mixed", 51, [4]),
        ("dynamic program", 0.94, [0]),
        ("greedy", 0.99, [0]),
    ],
)
def test_the_judge_can_fail(name, score, fails):
    bleu = {"in-domain only": 20, "out-of-domain only": 25, "mixed": 45, "two stages": 50}
    bleu |= {"three stages": 50}
    f1 = {"dynamic program": 0.98, "greedy": 0.8, "diagonal": 0.2}
    runs = []
    for shift in (0.0, 0.01, -0.01):
        changed = {m: (score if m == name else x) + shift for m, x in bleu.items()}
        rows = {m: {"bleu": x, "chrf": x, "dev": x} for m, x in changed.items()}
        scores = {a: score if a == name else x for a, x in f1.items()}
        runs.append({"alignment": {"0.3": scores}, "bleu": rows})
    assert [i for i, claim in enumerate(main.judge(runs)) if not claim.holds] == fails


def lines(path, rows):
    path.write_text("".join(f"{row}\n" for row in rows), "utf-8")
    return str(path)


def test_full_preset_on_text_files(tmp_path):
    sets = {}
    for name, first in (("ood", 0), ("in_domain", 40), ("dev_set", 80), ("test_set", 90)):
        numbers = range(first, first + (30 if first < 80 else 3))
        two = [lines(tmp_path / f"{name}.{k}", [f"{k} {i}" for i in numbers]) for k in "ab"]
        sets[name] = (",".join(two),)
    config = flags.replace(
        main.Config(), preset="full", smoke=True, output_dir=str(tmp_path / "out"), **sets
    )
    assert main.main(config) == 0
    run = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"][0]
    assert set(run["bleu"]) == set(main.SMOKE_METHODS) and run["alignment"] == {}


def test_what_is_refused(tmp_path):
    refused = lambda message, **given: pytest.raises(ValueError, match=message)
    given = lambda **changes: main.check(flags.replace(main.Config(), **changes))
    with refused("--ood a,b has no effect without --preset"):
        given(ood=("a,b",))
    with refused("--directory x has no effect without --data"):
        given(directory="x")
    with refused("--width 8 has no effect with --data manpages"):
        given(data="manpages", width=8)
    with refused("--pairs 5 has no effect with --preset full"):
        given(preset="full", pairs=5)
    with refused("--preset full: --in-domain, --dev-set, --test-set missing"):
        full.opened(flags.replace(main.Config(), preset="full", ood=("a,b",)))
    with refused("--ood a: expected two files, SOURCE,TARGET"):
        full.read_pairs(("a",), "--ood")
    two = lines(tmp_path / "a", "xy"), lines(tmp_path / "b", "x")
    with refused("2 lines and 1 lines"):
        full.read_pairs((",".join(two),), "--ood")
