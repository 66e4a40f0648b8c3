"""The scripts of papers run, and their tables judge what was measured."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab.claims import Claim, Number, interval, report
from experiments.papers import lion, monarch
from experiments.papers.intrinsic_dimension import main as intrinsic_dimension
from experiments.papers.paca import main as paca
from experiments.papers.tram import main as tram
from experiments.papers.tram.methods import Task, train_together


def test_interval_is_student_s():
    # scipy's t for 2 degrees of freedom: 4.3027; standard error of 1, 2, 3: 1 / sqrt(3).
    np.testing.assert_allclose(interval([1, 2, 3]), (2, 2 - 2.4842, 2 + 2.4842), atol=1e-4)
    assert np.isnan(interval([1.0])[1])


def test_a_claim_that_fails_is_an_exit_code(tmp_path, capsys):
    good, bad = (Claim(x, "1", [Number(x == "a", "above", 0.5)]) for x in "ab")
    assert report([good], {"x": 1}, tmp_path) == 0
    assert report([good, bad], {"x": 1}, tmp_path) == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["claims"][1]["holds"] is False
    assert "NO" in capsys.readouterr().out


def test_monarch_smoke(tmp_path):
    assert monarch.main(monarch.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["projection"]["hadamard_64"] < 1e-5 < metrics["projection"]["dft_16"]
    assert (tmp_path / "monarch.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["sparse", "sparse_to_dense"])
def test_monarch_s_judge_can_fail(name):
    row = {
        "dense": 0.98,
        "sparse": 0.97,
        "sparse_to_dense": 0.97,
        "projected_tuned": 0.9,
        "random_tuned": 0.7,
        "random_variance_preserving_tuned": 0.8,
    }
    exact = {"hadamard_64": 0.0, "dft_16_permuted": 0.0}
    metrics = {"projection": exact, "transform": [{"monarch": 1e-9, "low_rank": 0.875}] * 3}
    assert all(c.holds for c in monarch.judge(metrics | {"digits": [row] * 3}))
    assert not all(c.holds for c in monarch.judge(metrics | {"digits": [row | {name: 0.9}] * 3}))


def test_intrinsic_dimension_smoke(tmp_path):
    config = intrinsic_dimension.Config(smoke=True, output_dir=str(tmp_path))
    assert intrinsic_dimension.main(config) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = metrics["curves"]["pretrained SAID"]
    assert (found["D"], found["m"]) == (8450, 6) and set(found["scores"]) == {"8", "16"}
    assert (tmp_path / "intrinsic_dimension.png").stat().st_size > 1000


def test_intrinsic_dimension_s_judge_can_fail():
    curve = lambda d90, d95, high: {
        "d90": d90,
        "d95": d95,
        "scores": {"8": [high] * 3, "16": [high] * 3},
    }
    metrics = {
        "curves": {
            "pretrained DID": curve(16, 30, 0.9), "pretrained SAID": curve(16, 30, 0.9),
            "random DID": curve(32, 60, 0.8), "random SAID": curve(32, None, 0.8),
        },
        "pretraining": {"0": 32, "50": 20, "1000": 16},
        "widths": {"32": {"D": 3000, "d90": 20}, "256": {"D": 90000, "d90": 16}},
        "text": {"d90": 900, "D": 10**8, "full": [0.9], "before": 0.5},
    }  # fmt: skip
    holds = lambda **change: [c.holds for c in intrinsic_dimension.judge(metrics | change)]
    change = lambda name, **new: metrics["curves"] | {name: metrics["curves"][name] | new}
    behind = {"8": [0.7] * 3, "16": [0.7] * 3}
    assert holds() == [True] * 6
    assert not holds(curves=change("pretrained DID", scores=behind))[0]
    assert not holds(curves=change("random DID", d95=40))[1]
    assert not holds(pretraining={"0": 16, "50": 16, "1000": 16})[2]
    assert not holds(curves=change("pretrained SAID", d90=33))[3]
    assert not holds(curves=change("pretrained SAID", d90=None))[3]
    assert not holds(widths={"32": {"D": 3000, "d90": 4}, "256": {"D": 90000, "d90": 120}})[4]
    assert not holds(text=metrics["text"] | {"d90": None})[5]


def test_lion_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(lion, "HELD_OUT", 8)
    assert lion.main(lion.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["memory"]["float32"] == 0.5 and metrics["memory"]["int8"] < 0.14
    assert {"adamw_loss", "lion_loss", "lion_int8_loss"} <= set(metrics["text"][1])
    assert (tmp_path / "lion.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "change", [{}, {"lion_accuracy": 0.9}, {"lion_loss": 2.1}, {"lion_rate": 0.01}]
)
def test_lion_s_judge_can_fail(change):
    row = {
        "adamw_rate": 0.01, "lion_rate": 0.001, "adamw_loss": 2.0, "lion_loss": 2.0,
        "lion_bfloat16_loss": 2.0, "lion_int8_loss": 2.0, "adamw_accuracy": 0.95, "lion_accuracy": 0.95,
    }  # fmt: skip
    fixed = {
        "memory": {"float32": 0.5, "bfloat16": 0.25, "int8": 0.127},
        "rounding": {"stochastic": 1.087, "nearest": 1.0, "exact": 1.0866},
    }
    rows = [row | change] * 3
    claims = lion.judge(fixed | {"digits": rows, "text": rows})
    assert all(claim.holds for claim in claims) == (not change)


def test_paca_smoke(tmp_path):
    assert paca.main(paca.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["products"] == {"base": 3, "lora": 9, "paca": 3}
    exact = metrics["claims"][:2]  # These do not depend on training.
    assert all(claim["holds"] for claim in exact)
    # The same check finds what LoRA keeps: gate and up's product [T, F] and the normed x [T, D].
    lean = metrics["residuals"]["lean"]
    assert paca.full_width_only_in(lean, "lora") == [[2048, 1024], [2048, 256]]
    assert (tmp_path / "paca.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "change", [{"paca": 1.75}, {"paca": 2.0}, {"smallest_norm": 1.8}, {"lora": 1.99, "paca": 1.99}]
)
def test_paca_s_judge_can_fail(change):
    row = {"full": 1.5, "lora": 1.6, "paca": 1.61, "largest_norm": 1.62, "smallest_norm": 1.61}
    kept = lambda *sizes: [{"shape": [2048, 8], "bytes": size, "from": ""} for size in sizes]
    by_method = {"full": kept(9), "lora": kept(9), "paca": kept(6)}
    metrics = {
        "residuals": {"none": by_method, "lean": by_method},
        "products": {"base": 3, "lora": 9, "paca": 3},
        "quality": {"zero_shot": 2.0, "test": [row] * 3},
    }
    assert all(claim.holds for claim in paca.judge(metrics))
    metrics["quality"]["test"] = [row | change] * 3
    assert not all(claim.holds for claim in paca.judge(metrics))


def test_tram_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(tram.text, "HELD_OUT", 8)  # Held-out rows took most of it.
    monkeypatch.setattr(tram.digits, "HELD_OUT", 8)
    assert tram.main(tram.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["claims"][0]["holds"]  # ‖eps / θ‖ = d does not depend on training.
    d = {name: np.array(row.get("d")) for name, row in metrics["digits"]["methods"].items()}
    start, before = d["TRAM-θ_0"], d["TRAM-θ_{t-1}"]
    assert start.shape == (2, 4) and not before[:, 0].any() and before[:, 1].all()
    # Both targets are the start in the second step, and later the start is further away.
    np.testing.assert_allclose(start[:, 1], before[:, 1], rtol=1e-3)
    assert (start[:, 3] > before[:, 3]).all()
    assert {"a tale", "data sets", "licences"} < set(metrics["text"]["before"][0])
    assert (tmp_path / "tram.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "part, method, change",
    [
        (None, None, {}),
        ("text", "TRAM-x", {"length_error_over_rounding": 1.5}),
        ("digits", "TRAM-θ_{t-1}", {"d": [[0, 0.1, 0.1, 0.2, 0.2]] * 3}),
        ("text", "TRAM-θ_0", {"d": [[0, 0.2, 0.1, 0.1, 0.1]] * 3}),
        ("digits", "ASAM", {"seeds": [(0.9, 0.8, 1.0)] * 3}),
        ("text", "SAM", {"seeds": [(1.1, 1.3, 1.0)] * 3}),
        ("digits", "Adam", {"seeds": [(0.95, 0.85, 1.0)] * 3}),
        ("text", "TRAM-x", {"seeds": [(0.95, 0.8, 1.1)] * 3}),
    ],
)
def test_tram_s_judge_can_fail(part, method, change):
    def seeds(triples):  # in domain, elsewhere, sharpness
        both = lambda value: {"accuracy": value, "loss": value}
        rows = [(both(x), both(y), z) for x, y, z in triples]
        return [{"in domain": x, "one": y, "two": y, "sharpness": z} for x, y, z in rows]

    def methods():
        of = lambda d: {"length_error_over_rounding": 0.1, "d": [d] * 3}
        rows = {name: {"triples": [(0.95, 0.8, 1.0)] * 3} for name in tram.METHODS}
        rows["TRAM-x"] |= of([0, 0.1, 0.1, 0.1, 0.1])
        rows["TRAM-θ_0"] |= of([0, 0.1, 0.2, 0.3, 0.4])
        rows["TRAM-θ_{t-1}"] |= of([0, 0.4, 0.3, 0.2, 0.1])
        return rows

    parts = {"digits": methods(), "text": methods()}
    if part:
        parts[part][method] |= {{"seeds": "triples"}.get(k, k): v for k, v in change.items()}
    for rows in parts.values():
        for row in rows.values():
            row["seeds"] = seeds(row.pop("triples"))
    claims = tram.judge({name: {"methods": rows} for name, rows in parts.items()})
    assert [claim.holds for claim in claims].count(False) == bool(change)


@pytest.mark.parametrize("name", tram.METHODS)
def test_tram_s_methods_take_their_step(name):
    # A linear classifier; Adam is plain optax with a linear schedule, and no other method is Adam.
    keys = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(keys[0], (8, 3)), jnp.arange(8) % 2
    params = {"w": jax.random.normal(keys[1], (3, 2)), "b": jnp.array([0.3, -0.2])}

    def logits_fn(params, batch, key, noise=None):
        x = batch["x"] if noise is None else noise(batch["x"])
        return x @ params["w"] + params["b"][None], jnp.ones(len(x))

    rows = np.tile(np.arange(8), (2, 1))
    task = Task(logits_fn, lambda batch: batch["y"], params, {"x": x, "y": y}, rows, {})
    (found,), _ = train_together(name, [task])(0.1)
    loss = lambda p: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits_fn(p, {"x": x}, None)[0], y)
    )
    optimizer = optax.adam(lambda count: 0.1 * (1 - count / 2), b2=0.99)
    plain, state = params, optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.grad(loss)(plain), state, plain)
        plain = optax.apply_updates(plain, updates)
    gap = max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, plain)))
    assert (gap < 1e-6) == (name == "Adam")
