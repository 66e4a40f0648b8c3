"""pPE's script and world: rewards of tokens equal those of texts, styles are answers, the judge can fail."""

import copy
import json

import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers import ppe
from experiments.worlds import arithmetic, styles
from jaxft.rewards import tag_format_reward


def test_smoke(tmp_path):
    assert ppe.main(ppe.Config(smoke=True, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert set(run["trained"]) == {*ppe.NAMES, ppe.WRONG_TAG}
    assert (tmp_path / "ppe.png").stat().st_size > 1000


def test_full_preset(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = dict(preset="full", smoke=True, data=str(path), fsdp=1)
    assert ppe.main(flags.replace(ppe.Config(), **given, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert run["trained"]["plan"]["own"]["behaviours"].keys() == set(ppe.BEHAVIOURS)


@pytest.mark.parametrize("style", styles.STYLES)
def test_responses_are_right_and_well_formed(style):
    rng = np.random.default_rng(0)
    for a, b in rng.integers(0, 100, (50, 2)).tolist():
        text = styles.response(style, a, b)
        assert len(text) < styles.LIMIT and set(text) <= set(styles.ALPHABET)
        form = tag_format_reward((styles.WORDS[style], "answer"))
        assert form([styles.plain(text)], [{}]) == [1]
        assert styles.plain(text).endswith(f"<answer>{a + b}</answer>")
    assert (
        styles.response("T", 57, 87) == "T14,14tA144a"
        and styles.response("C", 57, 87) == "C441cA144a"
    )
    assert styles.response("K", 57, 87) == "K7+7=14,5+8=13kA144a"


def test_rewards_of_tokens_are_those_of_texts():
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 100, (400, 2))
    some = dict(own=0.7, malformed=0.4, wrong=0.4)
    texts = [styles.document(rng, "T", *pair, **some) for pair in pairs.tolist()]
    for i in range(0, 400, 2):  # and with a character changed or left out
        text, place = texts[i], int(rng.integers(len(texts[i])))
        texts[i] = text[:place] + str(rng.choice(list("Tt\0Aa1"))) + text[place + 1 :]
    texts = [text.replace("\0", "") for text in texts]
    ids = arithmetic.encode_answers(texts, styles.ALPHABET)
    tokens = np.array([row + [5] * (styles.LIMIT + 2 - len(row)) for row in ids])  # 5: never read
    mask = np.arange(tokens.shape[1]) < np.array([len(row) for row in ids])[:, None]
    assert [styles.decode(*row) for row in zip(tokens, mask, strict=True)] == texts
    plain = [styles.plain(text) for text in texts]
    form = np.array(tag_format_reward(("think", "answer"))(plain, [{}] * 400))
    last = [text.rpartition("<answer>")[2].partition("</answer>") for text in plain]
    gold = pairs.sum(axis=1)
    accuracy = np.array(
        [
            "<answer>" in t and x[0] == str(y) and x[1] != ""
            for t, x, y in zip(plain, last, gold, strict=True)
        ]
    )
    numbers = np.arange(400)
    np.testing.assert_array_equal(styles.well_formed("T", tokens, mask), form)
    np.testing.assert_array_equal(styles.right(gold)(tokens, mask, numbers), accuracy)
    found = np.asarray(styles.combined("T", gold)(tokens, mask, numbers))
    np.testing.assert_array_equal(found, (form + accuracy) / 2)
    assert set(found) == {0, 0.5, 1} and 0.1 < form.mean() < 0.9


def test_documents_follow_the_prior_prompt():
    rng = np.random.default_rng(2)
    clean = dict(own=0.7, malformed=0, wrong=0)
    first = lambda prior: [styles.document(rng, prior, 1, 2, **clean)[0] for _ in range(2000)]
    assert np.mean(np.array(first("C")) == "C") == pytest.approx(0.76, abs=0.03)
    assert np.mean(np.array(first(styles.NONE)) == "C") == pytest.approx(0.2, abs=0.03)
    wrong = [
        styles.document(rng, "T", 1, 2, own=1, malformed=0.15, wrong=0.25) for _ in range(2000)
    ]
    assert np.mean(["A3a" not in text for text in wrong]) == pytest.approx(0.25, abs=0.03)
    form = tag_format_reward(("think", "answer"))
    assert np.mean(form([styles.plain(t) for t in wrong], [{}] * 2000)) == pytest.approx(
        0.85, abs=0.03
    )


def result(share=0.9, accuracy=0.9, form=0.99):
    """A run in which models learned, and use their style in `share` of responses without a prompt."""
    row = lambda accuracy, form, shares: {"accuracy": accuracy, "format": form, "shares": shares}
    start = {name: row(0.4, 0.8, [0.2] * 5 + [0.0]) for name in (*ppe.NAMES, ppe.NO_PROMPT)}
    trained = {}
    for i, name in enumerate(ppe.NAMES):
        rest = (1 - share) / 5
        shares = [share if j == i else rest for j in range(6)]
        one = row(accuracy, form, shares)
        trained[name] = {"own": one, "none": one, "others": shares}
    trained[ppe.WRONG_TAG] = trained["think"]
    return {"start": start, "trained": trained}


def vary(runs):
    """Runs that differ a little, so that they have intervals."""
    runs = copy.deepcopy(runs)
    for i, run in enumerate(runs):
        for rows in run["trained"].values():
            rows["own"]["accuracy"] += 0.01 * i
    return runs


@pytest.mark.parametrize(
    "change, fails",
    [({}, []), (dict(accuracy=0.4), [0]), (dict(form=0.9), [1]), (dict(share=0.25), [2, 3])],
)
def test_judge_can_fail(change, fails):
    runs = vary([result(**change) for _ in range(3)])
    if "accuracy" in change:
        runs[0]["trained"]["plan"]["own"]["accuracy"] = 0.3
    assert [i for i, claim in enumerate(ppe.judge(runs)) if not claim.holds] == fails
