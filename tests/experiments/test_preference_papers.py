"""The scripts of papers on preferences: exact parts against closed forms, the rest run small."""

import contextlib
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.cli import flags
from experiments.papers.cxr_preference import full as full_cxr
from experiments.papers.cxr_preference import main as cxr_preference
from experiments.papers.cxr_preference import reports, xrays
from experiments.papers.dco import main as dco
from experiments.papers.hypo import bandits, full, text
from experiments.papers.hypo import main as hypo
from jaxft.adapters import partition
from jaxft.checkpoints import load_model, save_model
from jaxft.data import DataError, GreenCounts, green_score
from jaxft.data.media import media_in
from jaxft.losses import leave_one_out, reverse_kl_surrogate
from tests import vision_models


@pytest.fixture(scope="module")
def hypo_smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("hypo")
    assert hypo.main(hypo.Config(smoke=True, output_dir=str(output))) == 0
    assert (output / "hypo.png").stat().st_size > 1000
    return json.loads((output / "metrics.json").read_text())


def test_hypo_smoke(hypo_smoke):
    (seed,) = hypo_smoke["text"]
    assert [row["step"] for row in seed["DPO"]] == [0, 2, 4]
    start = [rows[0] for rows in seed.values()]
    assert start[0] == start[1] == start[2] and abs(start[0]["kl"]) < 1e-5
    assert len({rows[-1]["log_prob_chosen"] for rows in seed.values()}) == 3


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """(directory of a tiny model, pairs of sums, questions with answers)."""
    path = tmp_path_factory.mktemp("full")
    model, params = load_model("tiny")
    save_model(path / "model", model, params, tokenizer_from="tiny")
    asked = [(f"{i} + {j} =", str(i + j)) for i in range(4) for j in range(4)]
    pairs = [{"prompt": p, "chosen": c, "rejected": "no"} for p, c in asked]
    rows = [{"prompt": p, "completion": c} for p, c in asked[:4]]
    new = [{"prompt": f"{i} + 9 =", "completion": str(i + 9)} for i in range(3)]
    for name, records in (("pairs", pairs), ("rows", rows), ("new", new)):
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {name: str(path / name) for name in ("model", "pairs.jsonl", "rows.jsonl", "new.jsonl")}


def test_hypo_s_full_preset_measures_kl_and_log_probs(on_disk, tmp_path, monkeypatch):
    # The exact part is that of the default size.
    monkeypatch.setattr(hypo.bandits, "run", lambda *_: {"three": {}, "random": {}})
    monkeypatch.setattr(hypo, "_bandit_claims", lambda metrics: [])
    monkeypatch.setattr(hypo, "_figure", lambda *_: None)
    given = dict(model=on_disk["model"], data=on_disk["pairs.jsonl"], output_dir=str(tmp_path))
    given |= dict(learning_rate=1e-2, text_kl_weight=1.0)  # the paper's would hardly show
    config = flags.replace(hypo.Config(), preset="full", smoke=True, **given)
    assert hypo.main(config) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (seed,) = metrics["text"]
    assert set(seed) == {"DPO", "HyPO"} and seed["DPO"][0] == seed["HyPO"][0]
    # The adapter begins without effect, so the policy is its reference.
    assert abs(seed["DPO"][0]["kl"]) < 1e-4 and seed["DPO"][0]["pairs"] == 14
    assert seed["DPO"][-1]["log_prob_chosen"] != seed["HyPO"][-1]["log_prob_chosen"]
    assert not any("reward" in claim["text"] for claim in metrics["claims"])


def test_rewards_of_hypo_s_full_preset_are_those_of_the_answers(monkeypatch):
    judge = lambda texts, records: [
        len(r["prompt"]) - len(t) for t, r in zip(texts, records, strict=True)
    ]
    monkeypatch.setattr(full.rewards_cli, "opened", lambda *_: contextlib.nullcontext(judge))
    config = flags.replace(hypo.Config(), judge="judge.py:score")
    settings = flags.replace(full.preference.Config(), model="tiny")
    tokenizer = full.load_tokenizer("tiny")
    asked, answer = (tokenizer(t)["input_ids"] for t in ("What is it?", "no"))
    ids = np.array([[0, *asked, *answer]])
    shape = lambda *parts: np.array([[x for n, x in parts for _ in range(n)]])
    batch = {
        "tokens": ids[:, None],
        "segment_ids": shape((1, 0), (13, 1))[:, None],
        "loss_mask": shape((12, 0.0), (2, 1.0))[:, None],
    }
    with full.rewarded(config, settings, []) as reward:
        assert reward(batch).tolist() == [11 - 2]
    with full.rewarded(hypo.Config(), settings, []) as reward:
        assert reward is None


def test_dco_s_full_preset_measures_each_epoch(on_disk, tmp_path):
    given = dict(
        model=on_disk["model"], data=on_disk["rows.jsonl"], eval_data=on_disk["rows.jsonl"]
    )
    with pytest.raises(DataError, match="every held-out record is also"):
        dco.main(flags.replace(dco.Config(), preset="full", output_dir=str(tmp_path), **given))
    given |= {"eval_data": on_disk["new.jsonl"], "output_dir": str(tmp_path / "out")}
    assert dco.main(flags.replace(dco.Config(), preset="full", smoke=True, **given)) == 0
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["training"]
    for (run,) in rows.values():
        assert [row["epoch"] for row in run] == [1, 2]
        assert sum(run[0]["right"]) + sum(run[0]["wrong"]) == 2  # the third chooses the epoch
        assert 0 < run[0]["pass"]["1"] < run[0]["pass"]["4096"] <= 1
    assert rows["1"][0][1]["pass"] != rows["256"][0][1]["pass"]


def test_cxr_s_full_preset_trains_on_its_own_judged_reports(on_disk, tmp_path, monkeypatch):
    judge = lambda texts, records: [sum(map(ord, text)) or None for text in texts]
    opened = lambda *_: contextlib.nullcontext(judge)
    monkeypatch.setattr(cxr_preference.full.rewards_cli, "opened", opened)
    monkeypatch.setattr(cxr_preference.lengths, "measure", dict)
    monkeypatch.setattr(cxr_preference.lengths, "judge", lambda _: [])
    monkeypatch.setattr(cxr_preference, "_figure", lambda *_: None)
    given = dict(model=on_disk["model"], data=on_disk["rows.jsonl"], judge="operator:eq")
    config = flags.replace(cxr_preference.Config(), preset="full", smoke=True, **given)
    config = flags.replace(config, eval_data=on_disk["new.jsonl"], output_dir=str(tmp_path))
    assert cxr_preference.main(config) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert run["pairs"] + run["undecided"] == 4
    assert [row["step"] for row in run["KTO"]["curve"]] == [1, 2]
    assert {"DPO", "KTO", "best of 4"} < set(run) and "f1" not in run["SFT"]
    assert not any("F1" in claim["text"] for claim in metrics["claims"])


def test_cxr_s_full_preset_reads_x_rays(tmp_path, monkeypatch):
    vision_models.write_random(tmp_path / "model")
    rows = []
    for i in range(7):
        Image.fromarray(vision_models.image(i, 16, 16)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "indication": "cough", "findings": "clear"})
    rows[0].pop("indication")
    write = lambda name, rows: (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    write("rows.jsonl", rows[:4])
    write("new.jsonl", rows[4:])
    write("blind.jsonl", [rows[0], rows[1] | {"image": None}])
    write("lost.jsonl", [rows[0], rows[1] | {"image": "nowhere.png"}])
    judge = lambda texts, records: [sum(map(ord, text)) for text in texts]
    opened = lambda *_: contextlib.nullcontext(judge)
    monkeypatch.setattr(cxr_preference.full.rewards_cli, "opened", opened)
    monkeypatch.setattr(cxr_preference.lengths, "measure", dict)
    monkeypatch.setattr(cxr_preference.lengths, "judge", lambda _: [])
    monkeypatch.setattr(cxr_preference, "_figure", lambda *_: None)
    towers = []
    train_method = cxr_preference.train_method

    def spied(config, world, name):
        curve, best = train_method(config, world, name)
        pairs = zip(world.test, world.others(world.test), strict=True)
        assert all(media_in(own) != media_in(other) for own, other in pairs)
        for params in (world.start, best):
            towers.append(jax.tree.leaves(params["vision"]))
            assert not jax.tree.leaves(partition(params)[0]["vision"])
        return curve, best

    monkeypatch.setattr(cxr_preference, "train_method", spied)
    given = dict(model=str(tmp_path / "model"), judge="operator:eq", output_dir=str(tmp_path))
    given |= dict(eval_data=str(tmp_path / "new.jsonl"), preset="full", smoke=True)
    run = lambda name: cxr_preference.main(
        flags.replace(cxr_preference.Config(), data=str(tmp_path / name), **given)
    )
    with pytest.raises(DataError, match="1 of 5 records .* have no image, which .*model reads"):
        run("blind.jsonl")
    with pytest.raises(DataError, match="nowhere.png"):
        run("lost.jsonl")
    write("long.jsonl", [rows[0], rows[1] | {"indication": "cough " * 30}])
    with pytest.raises(DataError, match="1 of 5 prompts have more than 124 tokens, the longest"):
        run("long.jsonl")
    assert run("rows.jsonl") == 0
    (found,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert found["pairs"] + found["undecided"] == 4 and found["other"]["prior"] is None
    for leaves in towers[1:]:
        chex.assert_trees_all_equal(leaves, towers[0])


def test_cases_of_x_rays_are_questions_about_an_image():
    raw = {"image": np.zeros((2, 2, 3), np.uint8), "why": "cough", "said": "Clear."}
    read = full_cxr.read_case(raw, {"indication": "why", "findings": "said"})
    asked, answer = read["messages"]
    assert asked["content"] == f"<image>Indication: cough\n{full_cxr.ASK}"
    assert answer["content"] == "Clear." and len(media_in(read)) == 1
    assert full_cxr.read_case({"prompt": "Why?", "completion": "So."})["completion"] == "So."


@pytest.mark.parametrize(
    "script, given, message",
    [
        (hypo, {"model": "tiny"}, "--model tiny has no effect without --preset"),
        (hypo, {"judge": "a.py:f"}, "--judge a.py:f has no effect without --preset"),
        (hypo, {"preset": "full", "data": "nowhere.jsonl", "model": "tiny"}, "nowhere.jsonl"),
        (dco, {"preset": "full", "data": "nowhere.jsonl", "model": "tiny"}, "nowhere.jsonl"),
        (dco, {"preset": "full", "mode": "cot"}, "--preset full has no --mode cot"),
        (
            cxr_preference,
            {"preset": "full", "model": "tiny"},
            "give --data FILE.jsonl with the columns image",
        ),
        (
            cxr_preference,
            {"preset": "vision", "judge": "operator:eq"},
            "--judge operator:eq has no effect with --preset vision",
        ),
        (
            cxr_preference,
            {"preset": "full", "data": "nowhere.jsonl", "model": "tiny", "judge": "operator:eq"},
            "nowhere.jsonl",
        ),
    ],
)
def test_full_presets_refuse_in_one_line(script, given, message, tmp_path):
    given = given | {"output_dir": str(tmp_path)}
    with pytest.raises(ValueError) as refused:
        script.main(flags.replace(script.Config(), **given))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kl_weight, policy, kl, reward",
    [
        ("0", (0, 0, 1), np.log(10), -1),
        ("0.03", (0.449, 0.099, 0.452), 0.531, -0.003),
        ("0.1", (0.504, 0.318, 0.178), 0.049, 0.327),
        ("1", (0.458, 0.435, 0.107), 0.001, 0.351),
    ],
)
def test_hypo_s_three_responses(hypo_smoke, kl_weight, policy, kl, reward):
    found = hypo_smoke["three"][kl_weight]
    np.testing.assert_allclose(found["policy"], policy, atol=2e-3)
    np.testing.assert_allclose([found["kl"], found["reward"]], [kl, reward], atol=5e-3)


def test_dpo_s_optimum_on_covered_pairs_has_the_closed_form():
    # With all responses compared and free logits, π is proportional to π_ref exp(r / β).
    bandit = bandits.Bandit(
        jnp.eye(3), jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.array([0.3, 0.0, -0.2]),
        jnp.array([[0, 1], [0, 2], [1, 2]]),
    )  # fmt: skip
    found = jax.jit(functools.partial(bandits.solve, beta=0.5, steps=2000))(bandit, 0.0)
    best = jax.nn.softmax(bandit.ref_log_probs + bandit.rewards / 0.5)
    chex.assert_trees_all_close(found["policy"], best, atol=1e-3)
    assert found["uncovered"] == 0


def test_the_bandits_gradient_is_that_of_dpo_and_kl():
    many = bandits.random_bandits(jax.random.key(3), 2)
    bandit = jax.tree.map(lambda x: x[1], many)
    theta = jnp.array([0.5, -1.0, 0.3])

    def exact(theta):
        log_p, ref = bandits.log_policy(theta, bandit), bandit.ref_log_probs
        total = 0.0
        for i, j in bandit.pairs.tolist():
            margin = 0.2 * (log_p[i] - ref[i] - log_p[j] + ref[j])
            win = jax.nn.sigmoid(bandit.rewards[i] - bandit.rewards[j])
            total -= win * jax.nn.log_sigmoid(margin) + (1 - win) * jax.nn.log_sigmoid(-margin)
        return total / 6 + 0.7 * jnp.sum(jnp.exp(log_p) * (log_p - ref))

    ours = jax.jit(jax.grad(functools.partial(bandits.objective, beta=0.2)))
    ours = ours(theta, bandit, kl_weight=0.7)
    chex.assert_trees_all_close(ours, jax.jit(jax.grad(exact))(theta), rtol=1e-4, atol=1e-6)


def test_sampled_gradients_of_the_kl_are_unbiased_and_the_baseline_calms_them():
    # Far away: close by, log-ratios have a mean near 0 and need no baseline.
    theta, ref = jnp.array([[0.0, 0.3, -0.3, 0.1, -3.0], [0.0, 0.2, -0.2, 0.1, 6.0]])
    draws = jax.random.categorical(jax.random.key(1), theta, shape=(25_000, 4))

    def gradient(samples, with_baseline):
        def surrogate(theta):
            log_p, ref_log_p = (jax.nn.log_softmax(x)[samples] for x in (theta, ref))
            baseline = leave_one_out(log_p - ref_log_p, 4) if with_baseline else None
            return jnp.mean(reverse_kl_surrogate(log_p, ref_log_p, baseline))

        return jax.grad(surrogate)(theta)

    def kl(theta):
        log_p = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(ref)))

    expected, variances = jax.grad(kl)(theta), []
    for with_baseline in (False, True):
        found = jax.jit(jax.vmap(functools.partial(gradient, with_baseline=with_baseline)))(draws)
        error = found.std(0) / np.sqrt(len(found))
        assert (jnp.abs(found.mean(0) - expected) < 4 * error).all()
        variances.append(float(found.var(0).sum()))
    assert variances[1] < variances[0]


def test_hypo_s_pairs_never_show_what_goes_wrong():
    rng = np.random.default_rng(0)
    batch = text.language(rng, 3000)
    topics, words = np.asarray(batch["tokens"][:, 0]), np.asarray(batch["tokens"][:, 1:])
    good, bad = (np.asarray(text.count(words, k)) for k in (text.GOOD, text.BAD))
    assert (good[bad > 0] >= text.TURN).all() and (bad > 0).mean() > 0.1
    assert np.asarray(text.reward(jnp.asarray(words))).tolist() == (good - bad).tolist()
    assert not batch["loss_mask"][:, 0].any() and batch["loss_mask"][:, 1:].all()
    pairs = text.make_pairs(words, topics, rng)
    assert len(pairs["topics"]) > 500
    assert not np.asarray(text.count(pairs["pairs"], text.BAD)).any()
    margin = np.subtract(*np.asarray(text.count(pairs["pairs"], text.GOOD)).T)
    assert (margin != 0).all()
    ones = margin[np.abs(margin) == 1] > 0  # σ(1) = 0.731 of the pairs that differ by one
    assert abs(ones.mean() - 0.731) < 4 * np.sqrt(0.731 * 0.269 / len(ones))


@pytest.mark.parametrize(
    "change", [{}, {"kl": 9.0}, {"reward": 1.0}, {"log_prob_chosen": 1.0}, {"three": 0.2}]
)
def test_hypo_s_judge_can_fail(change):
    row = lambda reward, kl, chosen: {"reward": reward, "kl": kl, "log_prob_chosen": chosen}
    start = row(1.0, 0.0, 0.0)
    text = {
        "DPO": [start, row(1.5, 5.0, -4.0), row(2.0, 10.0, -9.0) | {
            k: v for k, v in change.items() if k == "log_prob_chosen"}],
        "HyPO": [start, row(2.5, 1.0, -1.0) | {k: v for k, v in change.items() if k != "three"}],
        "RLOO": [start, row(3.0, 2.0, 0.0)],
    }  # fmt: skip
    three = lambda c, kl, reward: {"policy": [0, 0, c], "kl": kl, "reward": reward}
    bandits = lambda kl: {"kl": [kl] * 3, "regularised": [-kl] * 3, "reward": [0.0] * 3}
    metrics = {
        "three": {"0": three(1.0, 2.3026, -1.0), "0.01": three(1.0, 2.3, -1.0),
                  "0.1": three(0.2, change.get("three", 0.05), 0.32)},
        "random": {"0": bandits(1.0), "0.03": bandits(0.5)},
        "text": [text] * 3,
        "beta": 0.5,
    }  # fmt: skip
    assert all(claim.holds for claim in hypo.judge(metrics)) == (not change)


def test_hypo_s_early_stopping_is_between_measurements():
    rows = [{"kl": k, "reward": r} for k, r in ((0.0, 1.0), (2.0, 3.0), (1.0, 9.0))]
    assert hypo.reward_at(rows, 0.5) == 1.5
    assert hypo.reward_at(rows, 5.0) == 9.0


def test_dco_smoke(tmp_path):
    assert dco.main(dco.Config(smoke=True, output_dir=str(tmp_path))) == 0
    rows = json.loads((tmp_path / "metrics.json").read_text())["training"]
    assert set(rows) == {"1", "256"}
    for (run,) in rows.values():
        assert [row["epoch"] for row in run] == [1, 2]
        assert sum(run[0]["right"]) + sum(run[0]["wrong"]) == 40
        assert sorted(run[1]["pass"].values()) == list(run[1]["pass"].values())
    assert rows["1"][0][1]["pass"] != rows["256"][0][1]["pass"]
    assert (tmp_path / "dco.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="1 and 256 must be among them"):
        dco.main(dco.Config(num_samples=(1, 16)))


def test_dco_s_problems_are_products_and_disjoint():
    parts = dco.problems(np.random.default_rng(0), (50, 30))
    seen = set()
    for part in parts:
        for tokens, mask in zip(part["tokens"].tolist(), part["loss_mask"].tolist(), strict=True):
            a, b, product = (
                int("".join(map(str, tokens[i:j]))) for i, j in ((0, 2), (3, 5), (6, 10))
            )
            assert a * b == product and min(a, b) > 9
            assert (tokens[2], tokens[5], tokens[10]) == (dco.TIMES, dco.EQUALS, dco.END)
            assert mask == [0] * 6 + [1] * 5
            seen.add((a, b))
    assert len(seen) == 80


@pytest.mark.parametrize(
    "n, change",
    [
        (None, {}),
        ("1", {"pass": {"1": 0.05, "256": 0.65, "4096": 0.7}}),
        ("256", {"pass": {"1": 0.01, "256": 0.5, "4096": 0.9}}),
        ("16", {"confidence": 0.9}),
        ("256", {"pass": {"1": 0.2, "256": 0.8, "4096": 0.9}}),
    ],
)
def test_dco_s_judge_can_fail(n, change):
    def row(first, middle, last, confidence):
        values = {"1": first, "256": middle, "4096": last}
        return {"pass": values, "validation": values, "confidence": confidence, "accuracy": 0.03}

    runs = {
        "1": [row(0.02, 0.7, 0.9, 0.1), row(0.05, 0.3, 0.4, 0.6)],
        "16": [row(0.02, 0.7, 0.9, 0.1), row(0.03, 0.6, 0.8, 0.3)],
        "256": [row(0.01, 0.75, 0.9, 0.05), row(0.015, 0.8, 0.95, 0.1)],
    }
    if n:
        runs[n][-1] |= change
    assert all(claim.holds for claim in dco.judge({k: [v] * 3 for k, v in runs.items()})) == (not n)


def test_cxr_preference_smoke(tmp_path):
    assert cxr_preference.main(cxr_preference.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert 0 < run["pairs"] <= 64 - run["undecided"] and run["unread"] > 0
    assert [row["step"] for row in run["KTO"]["curve"]] == [2, 4]
    assert run["DPO"]["best_step"] in (2, 4) and "greens" not in run["DPO"]
    exact = metrics["lengths"]
    np.testing.assert_allclose(
        exact["DPO"]["policy"], (0.1246, 0.0684, 0.0375, 0.1522, 0.6172), atol=1e-3
    )
    unbiased = (0.3483, 0.1281, 0.0471, 0.1281, 0.3483)
    np.testing.assert_allclose(exact["R-DPO"]["policy"], unbiased, atol=1e-3)
    assert all(claim["holds"] for claim in metrics["claims"][-2:])
    assert (tmp_path / "cxr_preference.png").stat().st_size > 1000


def test_cxr_s_vision_preset_smoke(tmp_path):
    config = cxr_preference.Config(preset="vision", smoke=True, output_dir=str(tmp_path))
    assert cxr_preference.main(config) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert 0 < run["pairs"] <= 64 - run["undecided"] and "lengths" not in metrics
    assert set(run["other"]) == {"SFT", "DPO", "prior"} and 0.1 < run["other"]["prior"]["f1"] < 0.4
    assert metrics["claims"][-1]["text"].startswith("with the images of other cases")
    assert (tmp_path / "cxr_preference.png").stat().st_size > 1000


def test_cxr_s_x_rays_show_their_findings():
    """A linear reader of the pixels finds each of them."""
    rng = np.random.default_rng(0)
    cases = xrays.draw(rng, 1500)
    assert cases.images.shape == (1500, 1, 24, 24, 3) and np.abs(cases.images).max() <= 1
    assert (cases.prompts == [*[xrays.IMAGE] * xrays.SHOWN, reports.ASK]).all()
    pixels = cases.images[:, 0, ..., 0].reshape(1500, -1)
    pixels = np.concatenate([pixels, np.ones((1500, 1), np.float32)], axis=1)
    ridge = pixels[:1000].T @ pixels[:1000] + 100 * np.eye(pixels.shape[1])
    fitted = np.linalg.solve(ridge, pixels[:1000].T @ cases.truth[:1000])
    scores, truth = pixels[1000:] @ fitted, cases.truth[1000:]
    for finding in range(reports.FINDINGS):
        there, absent = (scores[truth[:, finding] == x, finding] for x in (True, False))
        # Area under the ROC curve: 0.5 is chance, and the evidence itself gives about 0.94.
        assert (there[:, None] > absent).mean() > 0.85, finding
    swapped = xrays.others(cases)
    np.testing.assert_array_equal(swapped.images[1:], cases.images[:-1])
    assert swapped.reports == cases.reports


def test_cxr_s_judge_counts_as_green_does():
    truth = np.zeros(12, bool)
    truth[[1, 4]] = True
    there, absent = (lambda i: reports.POSITIVE + i), (lambda i: reports.NEGATIVE + i)
    reference = [there(1), there(4), absent(0), absent(2), absent(3), reports.END]
    count = lambda *tokens: reports.judge([*tokens, reports.END], truth, reference)
    assert count(*reference[:-1]) == GreenCounts(5, (0,) * 6)
    # Of two findings one is said, one denied (false, and missing); one is false; 7 is true and free.
    assert count(there(1), absent(4), there(9), absent(7)) == GreenCounts(1, (2, 1, 0, 0, 0, 0))
    assert count(there(1), there(4), absent(7)).significant == (0,) * 6
    assert reports.judge(reference[:-1], truth, reference) is None
    said = [[there(1), absent(4)], [there(1), there(2)]]  # of 1, 4 and of 1: two right, one wrong
    both = np.stack([truth, np.arange(12) == 1])
    assert reports.finding_f1(said, both) == 2 * 2 / (3 + 3)


def test_cxr_s_cases():
    cases = reports.draw(np.random.default_rng(0), 4000)
    assert cases.prompts.shape == (4000, 13) and abs(cases.truth.mean() - 0.18) < 0.01
    evidence = cases.prompts[:, :12]
    assert abs((evidence == reports.UNKNOWN).mean() - 0.15) < 0.01
    clear = evidence != reports.UNKNOWN
    wrong = (evidence == reports.PRESENT) != cases.truth
    assert abs(wrong[clear].mean() - 0.05) < 0.005
    batch = reports.rows(cases.prompts, cases.reports)
    assert batch["tokens"].shape == (4000, reports.LENGTH) and batch["tokens"].max() < 30
    assert batch["loss_mask"].sum(1).tolist() == [len(report) for report in cases.reports]
    judged = [reports.judge(r, t, r) for r, t in zip(cases.reports, cases.truth, strict=True)]
    assert all(green_score(counts) == 1 for counts in judged)


@pytest.mark.parametrize(
    "name, change, failing",
    [
        (None, {}, []),
        ("IPO", {"green": 0.51}, [0]),
        ("IPO", {"green": 0.4}, [0, 1]),
        ("DPO", {"green": 0.6}, []),
        ("best of 4", {"green": 0.9}, [3]),
        (None, {"length_chosen": 5.9}, [4]),
        ("DPO", {"length": 6.0}, [5]),
        ("KTO", {"win_rate_at_equal_length": 0.45}, [6]),
        ("ORPO", {"f1": 0.5}, [7]),
        ("other", {"f1": 0.3}, [8]),
        ("lengths", {"length": 6.0}, [9]),
        ("wrong", {"error": 0.1}, [10]),
    ],
)
def test_cxr_s_judge_can_fail(name, change, failing):
    row = {"green": 0.6, "length": 6.0, "f1": 0.7, "win_rate_at_equal_length": 0.6}
    exact = {
        "DPO": {"length": 8.138, "error": 1e-4},
        "R-DPO": {"length": 6.0, "error": 1e-4},
        "R-DPO, wrong sign": {"length": 9.237, "error": 1e-4},
    }

    def run(seed):
        made = {"length_chosen": 6.2, "length_rejected": 5.9} | (change if name is None else {})
        made |= {n: dict(row) for n in cxr_preference.FIVE}
        made["DPO"]["length"] = 6.4
        made["DPO"]["green"] = 0.65
        made |= {n: row | {"green": 0.52} for n in cxr_preference.BASELINES}
        made["SFT"] = row | {"green": 0.5, "f1": 0.65}
        blind = {"green": 0.24, "f1": 0.2}
        made["other"] = {n: dict(blind) for n in ("SFT", "DPO", "prior")}
        if name == "other":
            made["other"]["DPO"] |= {"f1": change["f1"] + 0.001 * seed}
        elif name in made:
            made[name] |= change
        # A little noise, or intervals would have no width.
        noise = lambda x: {k: v + 0.001 * seed for k, v in x.items()} if isinstance(x, dict) else x
        return {k: noise(v) if k == "DPO" else v for k, v in made.items()}

    if name in ("lengths", "wrong"):
        exact["DPO" if name == "lengths" else "R-DPO, wrong sign"] |= change
    claims = cxr_preference.judge({"runs": [run(i) for i in range(3)], "lengths": exact})
    assert [i for i, claim in enumerate(claims) if not claim.holds] == failing
