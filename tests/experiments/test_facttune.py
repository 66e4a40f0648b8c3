"""facttune: its world, its controls and what its claims need."""

import json

import jax
import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers.facttune import full, worlds
from experiments.papers.facttune import main as facttune
from jaxft.checkpoints import load_model, save_model
from jaxft.data import DataError
from jaxft.rewards import Claim, ResponseScore


def test_smoke(tmp_path):
    assert facttune.main(facttune.Config(smoke=True, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    for name in facttune.METHODS:
        assert [row["step"] for row in run[name]] == [0, 2, 4]
        assert run[name][0] == run["FS"][0]
    assert run["scores"]["pairs, random"] > 0
    assert (tmp_path / "facttune.png").stat().st_size > 1000


def test_the_corpus_mentions_facts_as_often_as_they_are_drawn():
    rng = np.random.default_rng(0)
    facts = worlds.draw(rng, 200, 0.4)
    lines, names = worlds.corpus(rng, facts), worlds.words(200)
    assert len(names) == worlds.NAMES + 200 and len(set(names)) == len(names)
    texts = [" ".join(names[i] for i in line) for line in lines]
    questions = [text.split() for text in texts if "?" in text]
    assert len(questions) == facts.mentions.sum()
    seen = np.zeros_like(facts.mentions)
    right = np.zeros(facts.rare.shape)
    for person, attribute, _, value, end in questions:
        e, a = int(person[1:]), int(attribute[1:])
        seen[e, a] += 1
        right[e, a] += value == f"v{a}{facts.values[e, a]}"
        assert end == "END" and value[1] == attribute[1]
    assert (seen == facts.mentions).all()
    assert (right == seen)[~facts.rare].all()
    rare = facts.rare & (seen > 0)
    assert abs(right[rare].sum() / seen[rare].sum() - 0.9) < 0.05
    # Each biography's mentions are those of as many questions, and the k-th has those with k or more.
    said = [text.split()[2:-1:2] for text in texts if " : " in text]
    assert sum(map(len, said)) == len(questions)
    counts = facts.mentions[0]
    own = [line.split()[2:-1:2] for line in texts if line.startswith("e0 : ")]
    assert own == [[f"a{a}" for a in np.flatnonzero(counts > k)] for k in range(counts.max())]
    # Zipf: the mean number of mentions over rank q, from 0 to 1, is rarest / q, up to MOST.
    assert abs(facts.mentions[facts.rare].mean() - 0.4 * np.log(2) / 0.5) < 0.1


def test_batches_of_lines_train_on_what_follows():
    rows = worlds._rows([[60, 1, 3, 9, 0], [61, 2, 0]], 2)
    assert rows["tokens"].shape == (2, worlds.SIZE + 2)
    assert rows["loss_mask"].sum(1).tolist() == [3, 1]
    assert rows["tokens"][1].tolist() == [61, 2] + [0] * worlds.SIZE
    assert rows["segment_ids"][0].tolist() == [1] * 5 + [0] * 10


def scores(*rows):
    one = lambda value, n: ResponseScore(value, tuple(range(n)), (value,) * n, ())
    return [[one(*pair) for pair in row] for row in rows]


def test_controls_pair_the_responses_that_have_a_score():
    samples = [{"subject": "x", "prompt": "x", "responses": list("abcd")}]
    truth = scores([(0.5, 2), (1.0, 1), (None, 0), (0.2, 3)])
    pairs = facttune.paired(samples, {"FS": truth, "MC": truth}, 0)
    found = {name: {(p["chosen"], p["rejected"]) for p in j.pairs} for name, j in pairs.items()}
    assert found["FS"] == found["MC"] == found["fewer claims"] == {
        ("b", "a"), ("b", "d"), ("a", "d"),
    }  # fmt: skip
    assert len(found["random"]) == 3 and not any("c" in pair for pair in found["random"])


def test_quality_is_that_of_claims_and_responses():
    claims = [Claim("x", str(i)) for i in range(4)]

    def row(values):
        return [
            ResponseScore(sum(values[:2]) / 2, tuple(claims[:2]), tuple(values[:2]), ()),
            ResponseScore(sum(values[2:]) / 2, tuple(claims[2:]), tuple(values[2:]), ()),
        ]

    found = facttune.quality({"FS": [row([1, 0, 0, 0])], "MC": [row([0.9, 0.4, 0.3, 0.95])]})
    assert found["correlation"] == pytest.approx(1) and found["claims_true"] == 0.25
    assert found["auroc"] == pytest.approx(2 / 3)  # 0.9 is above two of three


def test_precision_at_a_number_of_claims():
    row = lambda claims, precision, ratio=1.0: {
        "claims_per_response": claims, "precision": precision, "response_ratio": ratio,
    }  # fmt: skip
    rows = [row(4.0, 0.5), row(2.0, 0.7), row(0.0, float("nan"), 0.0)]
    assert facttune.at_claims(rows, 3.0) == pytest.approx(0.6)
    assert facttune.at_claims(rows, 5.0) == 0.5 and facttune.at_claims(rows, 1.0) == 0.7


@pytest.mark.parametrize(
    "name, change, failing",
    [
        (None, {}, []),
        ("FS", {"precision": 0.63}, [0, 4]),
        ("MC", {"precision": 0.64}, [1]),
        ("FS", {"incorrect": 1.9}, [2]),
        ("MC", {"incorrect": 1.9}, [3]),
        ("MC", {"precision": 0.8}, [4]),
        ("scores", {"correlation": 0.2}, [5]),
        ("random", {"precision": 0.65}, [6]),
        ("fewer claims", {"precision": 0.9}, [7, 8]),
    ],
)
def test_judge_can_fail(name, change, failing):
    def run(seed):
        point = lambda **given: {
            "correct": 2.0, "incorrect": 1.5, "claims_per_response": 3.5, "response_ratio": 1.0, **given,
        }  # fmt: skip
        start = point(precision=0.6 + 0.01 * seed)
        ends = {
            "FS": point(precision=0.75, incorrect=0.5), "MC": point(precision=0.7, incorrect=0.8),
            "random": point(precision=0.61), "fewer claims": point(precision=0.62),
        }  # fmt: skip
        made = {n: [start, end | (change if n == name else {})] for n, end in ends.items()}
        # A little noise, or intervals would have no width.
        for rows in made.values():
            rows[1] = {k: v + 1e-3 * seed for k, v in rows[1].items()}
            rows[1]["claims_per_response"] = 3.0
        own = {"correlation": 0.6, "auroc": 0.8, "claims_true": 0.6}
        return made | {"scores": own | (change if name == "scores" else {})}

    claims = facttune.judge([run(seed) for seed in range(3)])
    assert [i for i, claim in enumerate(claims) if not claim.holds] == failing


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    path = tmp_path_factory.mktemp("facttune")
    model, params = load_model("tiny")
    save_model(path / "model", model, params, tokenizer_from="tiny")
    people = ["Ada", "Bob", "Cy", "Dee"]
    rows = [{"prompt": f"Who is {name}?", "subject": name} for name in people]
    corpus = [{"subject": name, "passages": [f"{name} was born."]} for name in people]
    for name, records in (("people", rows), ("corpus", corpus)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return path


def config_of(on_disk, tmp_path, **given):
    usual = dict(model=str(on_disk / "model"), data=str(on_disk / "people.jsonl"))
    usual |= dict(corpus=str(on_disk / "corpus.jsonl"), output_dir=str(tmp_path))
    usual |= dict(preset="full", smoke=True)
    return flags.replace(facttune.Config(), **usual | given)


def test_full_preset_trains_on_its_own_scored_responses(on_disk, tmp_path, monkeypatch):
    # A random model neither splits texts nor checks facts, so its texts are replaced.
    said = lambda prompts: [
        "True" if "Does the reference" in p and len(p) % 2 else
        f"- fact {len(p) % 3}" if "Sentence:" in p else "Question: Who?\nAnswer: me"
        for p in prompts
    ]  # fmt: skip
    monkeypatch.setattr(full, "_texts", lambda *args: said(args[-1]))
    config = config_of(on_disk, tmp_path, samples=4, learning_rate=1e-2)
    varied = lambda scores: {"FS": scores["FS"], "MC": scores["FS"]}
    paired = facttune.paired
    monkeypatch.setattr(facttune, "paired", lambda s, scores, seed: paired(s, varied(scores), seed))
    score = full.ReferenceScorer.__call__
    draw = lambda claim: float(sum(map(ord, claim.text)) % 2)
    scored = lambda self, claims: score(self, claims) and [draw(claim) for claim in claims]
    monkeypatch.setattr(full.ReferenceScorer, "__call__", scored)
    assert facttune.main(config) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [row["step"] for row in run["FS"]] == [0, 1, 2]
    kept = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)[1]) == 2 for line in kept) and kept
    assert (tmp_path / "read.jsonl").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(preset="small", smoke=False, model=None, data=None), "--corpus .* without --preset"),
        (dict(corpus=None), "--preset full needs the prompts of --data FILE"),
        (dict(corpus="nowhere.jsonl"), "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_refused_in_one_line(given, message, on_disk, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        facttune.main(config_of(on_disk, tmp_path, **given))
    assert "\n" not in str(refused.value)


def test_files_of_the_full_preset(on_disk, tmp_path):
    found = full.passages(on_disk / "corpus.jsonl")
    assert found["Cy"] == ["Cy was born."]
    (tmp_path / "bad.jsonl").write_text('{"subject": "Ada", "text": "x"}\n')
    with pytest.raises(DataError, match=r"line 1: expected a text `subject` and a list"):
        full.passages(tmp_path / "bad.jsonl")
    records = [{"prompt": "?", "subject": name} for name in ("Ada", "Bob", "Ada", "Cy", "Dee")]
    known, new = full.by_subject(records, found)
    assert not {r["subject"] for r in known} & {r["subject"] for r in new}
    assert len(known) + len(new) == 5
    known, new = full.by_subject(records, found, records[:1])
    assert {r["subject"] for r in known} == {"Bob", "Cy", "Dee"} and len(new) == 1
    with pytest.raises(DataError, match="no column `subject`"):
        full.by_subject([{"prompt": "?"}], found)
    with pytest.raises(DataError, match=r"1 subjects without passages \(Eve\)"):
        full.by_subject([*records, {"prompt": "?", "subject": "Eve"}], found)


def test_answers_of_pairs_begin_with_a_space_or_are_messages():
    pair = {"prompt": "Who?", "chosen": "a", "rejected": "b", "subject": "x"}
    assert full._rendered(pair) == {"prompt": "Who?", "chosen": " a", "rejected": " b"}
    asked = [{"role": "user", "content": "Who?"}]
    made = full._rendered(pair | {"prompt": asked})
    assert made["prompt"] == asked
    assert made["chosen"] == [{"role": "assistant", "content": "a"}]


def test_a_question_s_answers_do_not_depend_on_its_batch():
    model, params = load_model("tiny")
    tokenizer = full.load_tokenizer("tiny")
    answers = lambda *questions: full._answers(model, params, tokenizer, None, 8, questions, 3)
    assert answers("Who?", "Where?")[1] == answers("Where?")[0]
    assert len({*answers("Who?")[0]}) > 1 and jax.devices()
