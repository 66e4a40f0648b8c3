"""The script of adaptive elicitation: a smoke run, the preset full on a file, and judges that can fail."""

import json

import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers.adaptive_elicitation import full, main, worlds
from jaxft import data


def test_smoke(tmp_path):
    assert main.main(main.Config(smoke=True, output_dir=str(tmp_path))) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][1]
    assert set(run) == {"latent classes", "tumours"} and not {"exact", "ahead"} & set(
        run["tumours"]
    )
    rows = run["latent classes"]
    assert set(rows["policies"]) == {"random", "most uncertain", "EIG", "exact EIG"}
    for row in (*rows["policies"].values(), *rows["ahead"].values()):
        assert len(row["nll"]) == 4 and all(0 <= x <= 1 for x in row["accuracy"] + row["ece"])
    # All begin at the same answers, and predict with the same model.
    starts = [rows["policies"][name]["nll"][0] for name in ("random", "most uncertain", "EIG")]
    assert len(set(starts)) == 1 and starts[0] != rows["policies"]["exact EIG"]["nll"][0]
    assert len(rows["exact"]["correlation"]) == 3 and min(rows["exact"]["regret"]) >= 0
    assert [row["step"] for row in rows["training"]] == [1, 2]
    assert (tmp_path / "adaptive_elicitation.png").stat().st_size > 1000


def runs(world="latent classes", **change):
    by_step = lambda x: [x] * 6
    row = lambda nll, accuracy, atypical: {
        "nll": by_step(nll), "accuracy": by_step(accuracy), "ece": by_step(0.03),
        "atypical": by_step(atypical),
    }  # fmt: skip
    found = {
        "training": [{"order_share": 0.2}, {"order_share": 0.1}],
        "policies": {
            "random": row(0.6, 0.7, 0.8), "EIG": row(0.5, 0.8, 0.6),
            "most uncertain": row(0.55, 0.75, 0.7), "exact EIG": row(0.48, 0.8, 0.6),
        },
        "ahead": {"greedy": row(0.5, 0.8, 0.6), "look-ahead": row(0.5, 0.8, 0.6)},
        "exact": {
            "gap": 0.04, "correlation": [0.9, 0.7], "regret": [0.01, 0.02], "random_regret": [0.03, 0.03],
        },
    }  # fmt: skip
    for path, value in change.items():
        part, name = path.split("__")
        old = found[part][name]
        found[part][name] = old | value if isinstance(old, dict) else value
    return [{world: found} for _ in range(3)]


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, None),
        ({"policies__EIG": {"nll": [0.61] * 6, "atypical": [0.7] * 6}}, 0),
        ({"policies__EIG": {"accuracy": [0.65] * 6}}, 1),
        ({"policies__EIG": {"atypical": [0.75] * 6}}, 2),
        ({"policies__EIG": {"ece": [0.06] * 6}}, 3),
        ({"ahead__look-ahead": {"nll": [0.52] * 6}}, 4),
        ({"exact__gap": 0.09}, 5),
        ({"exact__correlation": [0.7, 0.7]}, 6),
        ({"exact__regret": [0.01, 0.04]}, 7),
    ],
)
def test_the_judge_can_fail(change, fails):
    claims = main.judge(runs(**change))
    assert [i for i, claim in enumerate(claims) if not claim.holds] == (
        [] if fails is None else [fails]
    )


def test_worlds_split_entities_and_are_repeated_by_their_seed():
    config = flags.replace(main.Config(), entities=50)
    one, again, other = (worlds.tumours(config, seed) for seed in (0, 0, 1))
    assert [len(x) for x in (one.training, one.validation, one.test)] == [411, 72, 86]
    np.testing.assert_array_equal(one.test, again.test)
    assert one.test.shape[1] == 31 and one.always == (30,)
    assert (one.test != other.test).any()
    shares = one.training[:, :30].mean(axis=0)
    assert (abs(shares - 0.5) < 0.02).all()  # above the training split's median
    world = worlds.latent_classes(config, 0)
    assert world.training.shape == (50, 16) and world.test.shape == (500, 16)
    # Frequencies are the exact marginals.
    blank = np.full((1, 1, 2), -1)
    exact = world.exact(blank, np.arange(16)[None])[0, :, 1]
    both = np.concatenate([world.test, world.validation])
    np.testing.assert_allclose(both.mean(axis=0), exact, atol=0.06)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        {"entity": f"e{i}", "question": f"Is it {q}?", "answer": ["No", "Yes"][(i + q) % 2]}
        for i in range(14)
        for q in range(9)
        if (i, q) != (0, 8)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def large(file, output, **given):
    settings = dict(preset="full", smoke=True, data=file, model="tiny", output_dir=str(output))
    return flags.replace(main.Config(), **settings | given)


def test_full(file, tmp_path):
    assert main.main(large(file, tmp_path)) == 0
    run = json.loads((tmp_path / "metrics.json").read_text())["runs"][0]
    assert set(run) == {"answers"} and len(run["answers"]["policies"]["EIG"]["nll"]) == 4
    assert set(run["answers"]["ahead"]) == {"greedy", "look-ahead"}


def test_a_file_s_answers_are_read(file):
    world = full.world(large(file, ""))
    assert [len(x) for x in (world.training, world.validation, world.test)] == [10, 1, 3]
    whole = np.concatenate([world.training, world.validation, world.test])
    assert (whole == -1).sum() == 1 and whole.shape == (14, 9)
    assert len(world.questions.asks[2]) == len("Is it 2?\nAnswer:")  # one token for each byte


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(preset="small", model="gpt2", data=None), "--model gpt2 has no effect without"),
        (dict(data=None), "--data missing"),
        (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(pool=2, questions=3), "--questions 3 of --pool 2"),
    ],
)
def test_what_cannot_run_is_one_line(file, tmp_path, given, message):
    with pytest.raises((ValueError, data.DataError), match=message):
        main.main(large(file, tmp_path, **given))


def test_a_row_without_an_answer_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"entity": "a", "question": "b"}\n')
    with pytest.raises(data.DataError, match="no answer; a row has entity, question, answer"):
        full.world(large(str(path), tmp_path))
