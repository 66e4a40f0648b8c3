"""MRT's script: its world and rewards, what STaR trains on, its judge."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers.mrt import main as mrt
from experiments.papers.mrt import methods, texts
from experiments.worlds import arithmetic, lookups
from jaxft import data, rl


@pytest.fixture(scope="module")
def task():
    return lookups.task(3, 200, 60, 100, width=32, layers=1)


def text(ids):
    return "".join(arithmetic.ALPHABET[i] for i in ids)


def test_answers_are_right_and_cut_ones_end_in_a_mark(task):
    rng, cut, filled = np.random.default_rng(0), 0, 0
    for items in task.pretraining:
        given, values = lookups.answer(task.table, items, rng, 0.0), task.table[items]
        segments = given[:-2].split(";")[:-1]
        steps = [segment for segment in segments if segment != "++"]
        filled += len(segments) - len(steps)
        assert steps == [f"{a}{b}" for a, b in zip("ABC", values, strict=True)][: len(steps)]
        cut += given[-2] == "-"
        assert given[-1] == str(max(values[: len(steps)], default=0))
        assert given[-2] in "|-" and (given[-2] == "-" or len(steps) == 3)
        assert len(given) + 1 <= lookups.LIMIT
    assert 0.3 < cut / 200 < 0.5 and 1.3 < filled / (200 - cut / 2) < 2.6  # 4 x 0.35 / 0.65
    drawn = [lookups.answer(task.table, items, rng) for items in task.pretraining]
    first = [given[given.index("A") + 1] for given in drawn if "A" in given]
    wanted = [
        str(task.table[x[0]]) for x, y in zip(task.pretraining, drawn, strict=True) if "A" in y
    ]
    right = np.mean(np.array(first) == np.array(wanted))
    assert abs(right - (1 - 0.9 * lookups.ERRORS)) < 0.1


def test_questions_are_apart_and_their_results_are_gold(task):
    known, new = ({text(ids) for ids in part.ids} for part in (task.known, task.held_out))
    every = set(map(lookups.question, task.pretraining))
    assert len(known) == 60 and len(new) == 100 and len(every) == 200
    assert known < every and not every & new
    for ids, gold in zip(task.held_out.ids, task.held_out.columns["gold"], strict=True):
        asked = text(ids)
        assert asked[::3] == "ABC=" and len(asked) == lookups.WIDTH
        values = [task.table[int(asked[i : i + 2])] for i in (1, 4, 7)]
        assert text(gold) == f"{max(values)}\n"
    with pytest.raises(
        ValueError, match="pretraining must be at least known and at most 1,000,000"
    ):
        lookups.task(0, 10, 11, 1)


def batch_of(pairs, gold="4"):
    rows = arithmetic.layout(*zip(*pairs, strict=True))
    answer = np.array(arithmetic.encode_answers([gold]), np.int32)
    return rows | {"gold": np.tile(answer, (len(pairs), 1))}


def test_rewards_need_the_result_behind_a_mark():
    given = ["A7;|4", "-4", "A7;|5", "A7;4", "|4;", "4|", "++;|4"]
    batch = batch_of([("5A=", answer) for answer in given])
    assert lookups.rewards(batch).tolist() == [1, 1, 0, 0, 0, 0, 1]
    batch["segment_ids"][:, -1] = 0  # The longest answers lose their stops.
    assert lookups.rewards(batch).tolist() == [0, 1, 0, 0, 0, 0, 0]
    batch = batch_of([("5A=-", "4"), ("5A=-", "++;|4")])  # A mark at the end of the prompt counts.
    assert lookups.rewards(batch).tolist() == [1, 1]
    assert lookups.filler(batch_of([("5A=", "A7;++;++;B2;|4")])) == 0.5


def test_the_mark_has_no_loss(task):
    rows = lookups.rows_of(task.table, task.pretraining[:50], np.random.default_rng(1))
    marks = rows["tokens"] == lookups.PLACE("-")
    assert marks.any() and not rows["loss_mask"][marks].any()
    answers = rows["completion_mask"].sum() - marks.sum()
    assert rows["loss_mask"].sum() == answers


def test_star_trains_on_answers_without_what_follows_the_most_progress():
    batch = batch_of([("5A=", "A7;++;|4"), ("5A=", "++;A7;|4")])
    ends = lookups.ends_of(batch)
    assert ends[:, :4].tolist() == [[0, 3, 6, -1]] * 2
    chances = np.full(ends.shape, np.nan)
    chances[:, :3] = [[0.1, 0.9, 0.8], [0.1, 0.1, 0.9]]
    own = methods.shorter(batch | {"episode_ends": ends, "answer_chances": chances})
    shown = [
        text(row[seen > 0]) for row, seen in zip(own["tokens"], own["segment_ids"], strict=True)
    ]
    assert shown == ["5A=A7;|4\n", "5A=++;A7;|4\n"]
    assert own["completion_mask"].sum(axis=1).tolist() == [6, 9]
    assert own["positions"][0].max() == 8 and (own["advantages"] == 1).all()


def test_sums_are_worked_in_lines():
    row = {"metadata": {"metadata": {"expression": "3 + 4 - 9 + 1"}}}
    record = texts.in_lines(row, {})
    lines = record["completion"].split("\n")
    steps = [line for line in lines if line != texts.FILLER]
    assert steps == ["3 + 4 = 7", "7 - 9 = -2", "-2 + 1 = -1", "#### -1"]
    assert record["prompt"] == "3 + 4 - 9 + 1 =\n" and record == texts.in_lines(row, {})
    right = texts.grader()
    said = record["completion"]
    assert right(said, record) and right(" -1", record) and not right(said + "1", record)
    with pytest.raises(data.DataError, match="takes only rg:chain_sum"):
        texts.in_lines({"question": "1 + 1", "answer": "2"}, {})


def test_episodes_of_sums_are_lines_and_filler_is_counted():
    said = f"3 + 4 = 7\n{texts.FILLER}\n7 - 2 = 5\n#### 5"
    tokens = np.array([list(map(ord, said))])
    batch = {"tokens": tokens, "completion_mask": tokens > 0}
    decode = lambda ids: "".join(map(chr, ids))
    reasoning, after = texts.LINES, 11 + len(texts.FILLER)
    ends = rl.text_ends(batch, decode, 4, split=reasoning.split, close=reasoning.close)
    assert ends.tolist() == [[0, 10, after, after + 10, -1]]
    assert texts.filler(decode, batch) == pytest.approx(1 / 3)


def test_smoke(tmp_path):
    # test_full_presets.py runs all methods.
    chosen = ("grpo", "mrt_online", "mrt_stale")
    assert mrt.main(mrt.Config(smoke=True, methods=chosen, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert list(run) == ["start", *chosen]
    for row in run.values():
        assert (
            0 <= row["accuracy"] <= 1 and 0 <= row["regret"] <= 1 and row["length"] <= lookups.LIMIT
        )
        assert len(row["chances"]) == len(row["budgets"]) == 10
    assert run["mrt_online"]["tokens"] > run["mrt_online"]["length"] > 0
    assert (tmp_path / "mrt.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="all are compared with grpo"):
        mrt.main(mrt.Config(methods=("star",), output_dir=str(tmp_path)))
    for preset in ("smollm2", "full"):
        with pytest.raises(ValueError, match=f"--preset {preset} has no star"):
            mrt.main(mrt.Config(preset=preset, methods=("grpo", "star"), output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--rank 4 has no effect with --preset full"):
        mrt.main(mrt.Config(preset="full", rank=4, output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "name, change, fails",
    [
        ("mrt_online", {}, []),
        ("mrt_online", {"regret": 0.55}, [0]),
        ("mrt_online", {"length": 23.0}, [1]),
        ("mrt_online", {"accuracy": 0.57}, [2]),
        ("grpo_lenpen", {"accuracy": 0.66}, [3]),
        ("mrt_stale", {"regret": 0.65}, [4]),
    ],
)
def test_the_judge_can_fail(name, change, fails):
    runs = []
    for d in (0.0, 0.002, -0.002):
        row = lambda a, n, r, d=d: {"accuracy": a + d, "length": n + d, "regret": r, "tokens": 1}
        run = {
            "grpo": row(0.59, 24.0, 0.6),
            "grpo_lenpen": row(0.5, 15.0, 0.5),
            "mrt_online": row(0.66, 18.0, 0.5 + d),
            "mrt_stale": row(0.6, 22.0, 0.58 + d),
        }
        run[name] = run[name] | change
        runs.append(run)
    assert [i for i, c in enumerate(mrt.judge(mrt.Config(), runs)) if not c.holds] == fails
    text = mrt.judge(mrt.Config(preset="smollm2"), runs[:1])[0].text
    assert text.startswith("SmolLM2-135M, 1 seed: MRT's regret")


def test_chances_of_the_world_are_those_of_its_marks(task):
    sample = lookups.answers(task.model)(2)
    asked = rl.Asked(
        task.known.ids[:3],
        task.known.records[:3],
        {k: x[:3] for k, x in task.known.columns.items()},
    )
    batch = sample(task.start, asked, jax.random.key(0))
    assert batch["tokens"].shape == (6, lookups.WIDTH + lookups.LIMIT)
    add = rl.add_chances(lookups.ends_of, rl.exact_chances(task.model, arithmetic.encode(["-"])[0]))
    found = add(batch, task.start, None)
    asked_texts = [text(ids) for ids in asked.ids for _ in range(2)]
    gold = [text(row)[:-1] for row in np.repeat(asked.columns["gold"], 2, axis=0)]
    rows = arithmetic.layout(asked_texts, [f"-{digit}" for digit in gold])
    # Without its first token, the mark.
    rows["completion_mask"] = rows["completion_mask"].copy()
    rows["completion_mask"][:, 0] = False
    expected = arithmetic.answer_probabilities(task.model)(task.start, rows)
    np.testing.assert_allclose(found["answer_chances"][:, 0], jnp.asarray(expected), rtol=1e-4)
