"""dco.py's chains of thought and proofs: the tasks, what is measured, the judges."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from experiments.papers.dco import cot, proof
from experiments.papers.dco import main as dco
from experiments.worlds import workings
from tests.small_models import start


def smoke(mode, directory):
    assert dco.main(dco.Config(mode=mode, smoke=True, output_dir=str(directory))) == 0
    assert (directory / "dco.png").stat().st_size > 1000
    (run,) = json.loads((directory / "metrics.json").read_text())["runs"]
    return run


def test_proof_smoke(tmp_path):
    run = smoke("proof", tmp_path)
    assert {name: [row["epoch"] for row in rows] for name, rows in run.items()} == {
        "1": [1, 2], "16": [1, 2],
    }  # fmt: skip
    last = run["1"][-1]
    assert all(
        sorted(last[how].values()) == list(last[how].values()) for how in ("search", "samples")
    )
    assert 1 <= last["expanded"] <= 259 and run["1"][-1] != run["16"][-1]


def test_theorems_follow_a_rule_in_most_steps():
    settings = proof.Settings(theorems=3000)
    (theorems, proofs), validation, test = proof.draw(settings, 0)
    rule = {}
    for theorem, steps in zip(theorems, proofs, strict=True):
        for i, step in enumerate(steps):
            rule.setdefault((i, theorem[i], theorem[(i + 1) % 4]), []).append(step)
    # The commonest tactic of two symbols: 0.7 and a sixth of the rest.
    common = sum(np.bincount(seen).max() for seen in rule.values()) / proofs.size
    assert abs(common - 0.75) < 0.02
    code = lambda part: set((part[0] @ 8 ** np.arange(4)).tolist())
    parts = [code(part) for part in ((theorems, proofs), validation, test)]
    assert list(map(len, parts)) == [3000, 100, 200] and len(set.union(*parts)) == 3300
    batch = proof.rows(theorems[:2], proofs[:2])
    assert batch["steps"].tolist() == [[-1] * 4 + [0, 1, 2, 3]] * 2
    assert (batch["tokens"][:, 4:] == proofs[:2] + 8).all()


def test_what_is_read_of_a_model_is_its_own_step_by_step():
    model = proof.toy.decoder(14, 8, 16, 1)
    params = start(model)
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)
    theorem, target = np.array([[1, 2, 3, 4]]), np.array([3, 0, 5, 2])
    found = np.asarray(proof._reader(model)(params, theorem))[0]
    tokens = np.concatenate([theorem[0], target + 8])[None]
    logits = model.apply({"params": params}, tokens).logits[0, 3:7, 8:]
    steps = np.asarray(jax.nn.log_softmax(logits))[np.arange(4), target]
    got = proof.search(found, target)
    assert got.state == tuple(target) and got.log_prob == pytest.approx(steps.sum(), abs=1e-4)
    at = lambda path: int(np.array(path, int) @ [36, 6, 1][: len(path)])
    total = lambda path: sum(found[at(path[:i]), i, path[i]] for i in range(4))
    likelier = sum(total(path) > total(tuple(target)) + 1e-6 for path in np.ndindex(6, 6, 6, 6))
    assert got.tried == likelier + 1


@pytest.mark.parametrize(
    "width, change, fails",
    [
        ("1", {}, []),
        ("4", {"samples": {"256": 0.7}}, [0, 4]),
        ("16", {"samples": {"256": 0.7}}, [1]),
        ("4", {"search": {"1": 0.2, "256": 0.7}}, [2]),
        ("16", {"search": {"1": 0.3, "256": 0.8}}, [5]),
        ("1", {"confidence": 0.4}, [6]),
    ],
)
def test_the_judge_of_proofs_can_fail(width, change, fails):
    part = lambda one, many: {"search": {"1": one, "256": many}, "samples": {"256": many}}
    runs = []

    def row(one, many, sure):
        return part(one, many) | {"confidence": sure, "validation": part(one, many)}

    for d in (0.0, 0.002, -0.002):
        run = {
            "1": [row(0.2, 0.71, 0.6), row(0.3, 0.7, 0.9)],
            "4": [row(0.2, 0.7, 0.6), row(0.2 + d, 0.8 + d, 0.7)],
            "16": [row(0.2, 0.7, 0.5), row(0.2 + d, 0.8 + d, 0.5)],
        }
        run[width][-1] = run[width][-1] | change
        runs.append(run)
    assert [i for i, c in enumerate(proof.judge(runs)) if not c.holds] == fails


def test_cot_smoke(tmp_path):
    run = smoke("cot", tmp_path)
    assert [row["step"] for row in run["DCO"]] == [2, 4]
    row = run["cross-entropy"][-1]
    assert row["looked"] == row["kept"] == 16 and 0 <= row["pass"]["1"] <= row["pass"]["64"] <= 1


def test_cot_trains_on_questions_that_are_seldom_right(monkeypatch):
    # Questions 0 to 7 are always right, the others never; a step shows on whose rows it was taken.
    start = workings.Start(
        model=types.SimpleNamespace(forward=None), params={"w": np.zeros(())}, steps=0,
        pairs=np.stack([np.arange(32)] * 2, 1),
        rows=workings.rows_of(np.stack([np.arange(32)] * 2, 1), "B" * 32, 2),
        held_out=np.zeros((2, 2), int),
    )  # fmt: skip
    known = {tuple(row) for row in start.rows["tokens"][:8].tolist()}
    monkeypatch.setattr(
        cot, "_success", lambda *_: lambda params, numbers, key: (np.asarray(numbers) < 8) * 1.0
    )
    taken = []

    def objective(params, batch, key):
        jax.debug.callback(lambda tokens: taken.append(np.asarray(tokens)), batch["tokens"])
        return params["w"] * 1.0, {}

    monkeypatch.setattr(cot, "supervised", lambda model: objective)
    settings = cot.Settings(steps=12, every=6, batch_size=4, warmup=3)
    shares = functools.partial(np.mean, axis=0)
    for arm in cot.ARMS:
        taken.clear()
        rows = cot.train_arm(settings, start, 0, arm)
        jax.effects_barrier()
        of_known = [[tuple(row) in known for row in batch.tolist()] for batch in taken]
        assert len(taken) == 12 and any(map(any, of_known[:3]))
        assert any(map(any, of_known[3:])) == (arm == "cross-entropy")
        assert (rows[-1]["looked"] > 48) == (arm == "DCO") and rows[-1]["kept"] >= 48
        assert shares(of_known).shape == (4,)


@pytest.mark.parametrize(
    "change, fails",
    [({}, []), ({"1": 0.3, "64": 0.4}, [0, 1, 2, 3]), ({"1": 0.1, "64": 0.55}, [2])],
)
def test_the_judge_of_chains_of_thought_can_fail(change, fails):
    runs = []
    same = {"step": 9, "looked": 10, "kept": 5}
    for d in (0.0, 0.002, -0.002):
        row = lambda one, many: {"pass": {"1": one, "16": 0.4, "64": many}} | same
        last = row(0.1 + d, 0.6 + d)
        last["pass"] |= {k: v + d for k, v in change.items()}
        middle = (row(0.2, 0.6) if fails == [2] else row(0.2, 0.4)) | {"step": 5}
        runs.append(
            {"cross-entropy": [middle, row(0.2, 0.5)], "DCO": [row(0.1, 0.3) | {"step": 5}, last]}
        )
    assert [i for i, c in enumerate(cot.judge(runs)) if not c.holds] == fails
