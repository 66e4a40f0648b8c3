"""OTR's script: its tasks, its meeting points, its judge."""

import json

import numpy as np
import pytest

from experiments.papers import otr
from experiments.worlds import words


def test_tasks():
    word = np.array([[3, 9, 0, 3, 1]])
    asked, answer = words.questions("target", word)
    assert asked[0, 1:].tolist() == word[0].tolist() and answer[0].tolist() == [
        0,
        1,
        3,
        3,
        9,
        words.END,
    ]
    others = {name: words.questions(name, word)[1][0, :-1].tolist() for name in words.OLD}
    assert others == {
        "copy": [3, 9, 0, 3, 1],
        "reverse": [1, 3, 0, 9, 3],
        "shift": [4, 0, 1, 4, 2],
        "capitals": [13, 19, 10, 13, 11],
    }
    firsts = {int(words.questions(name, word)[0][0, 0]) for name in words.TASKS}
    assert len(firsts) == len(words.TASKS) and max(firsts) < words.VOCABULARY
    rows = words.rows_of((asked, answer), (asked, answer))
    assert rows["tokens"].shape == (2, 12) and rows["loss_mask"].sum() == 12


def test_held_out_words_are_not_trained_on():
    known, held_out = words.splits(otr.Config(held_out=50))
    code = lambda words: set((words @ 10 ** np.arange(5)).tolist())
    assert len(code(held_out)) == 50 and not code(known) & code(held_out)
    assert code(held_out) == code(words.splits(otr.Config(held_out=50, first_seed=7))[1])


def test_methods_meet_between_two_measurements():
    rows = [(0, 0.4, 0.0, 1.0), (5, 0.6, 0.2, 0.9), (10, 0.5, 0.5, 0.7), (15, 0.9, 1.0, 0.5)]
    curve = [
        {"step": s, "target": t, "kl target": k, "kl old": k / 2, "old": old}
        for s, t, k, old in rows
    ]
    found = otr.at_level(curve, 0.7)
    wanted = {"step": 12.5, "kl target": 0.75, "kl old": 0.375, "old": 0.6}
    assert found == pytest.approx(wanted)
    assert otr.at_level(curve, 0.55)["step"] == pytest.approx(3.75)  # the first time
    assert otr.at_level(curve, 0.3)["step"] == 0
    assert all(np.isnan(x) for x in otr.at_level(curve, 0.95).values())


def test_smoke_and_bad_settings(tmp_path):
    assert otr.main(otr.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    curve = metrics["runs"][0]["otr"]
    assert [row["step"] for row in curve] == [0, 1, 2] and abs(curve[0]["kl old"]) < 1e-5
    assert curve[2]["kl old"] > 1e-5 and 0 <= curve[1]["hit_rate"] <= 1
    assert (tmp_path / "otr.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="methods: sft and otr"):
        otr.main(otr.Config(methods=("sft",)))
    with pytest.raises(ValueError, match="judged: must be one of levels"):
        otr.main(otr.Config(judged=0.123))


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, []),
        ({"kl target": 1.2}, [0]),
        ({"kl old": 0.4}, [1]),
        ({"old": 0.8}, [2]),
        ({"target": 0.85}, [0, 1, 2]),  # It never gets there.
    ],
)
def test_the_judge_can_fail(change, fails):
    start = {"step": 0, "target": 0.4, "kl target": 0.0, "kl old": 0.0, "old": 1.0}
    runs = []
    for d in (0.0, 0.002, -0.002):
        last = {"step": 5, "target": 0.9, "kl target": 1.0 + d, "kl old": 0.3 + d, "old": 0.9 + d}
        less = last | {"kl target": 0.9, "kl old": 0.2, "old": 0.95} | change
        runs.append({"sft": [start, last], "otr": [start, less]})
    assert [i for i, c in enumerate(otr.judge(otr.Config(), runs)) if not c.holds] == fails
