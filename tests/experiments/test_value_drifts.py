"""The script of value drifts: its world is what it says, its judge can fail, both presets run small."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers.value_drifts import full, small
from experiments.papers.value_drifts import main as drifts
from experiments.papers.value_drifts.worlds import Arm
from jaxft import data
from jaxft.analysis import value_gap


def test_smoke(tmp_path):
    assert drifts.main(drifts.Config(smoke=True, output_dir=str(tmp_path))) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (run,) = metrics["runs"]
    assert set(run["sets"]) == {"neutral set"}
    for own in run["sets"].values():
        assert set(own["arms"]) == {"DPO, ρ = 0", "RLOO, strong KL, ρ = 1"}
        assert own["sft"]["steps"] == [0, 1, 2, 3]
        for stage in own["arms"].values():
            assert stage["steps"] == [0, 1, 2] and np.shape(stage["p"]) == (3, 11, 3)
            np.testing.assert_allclose(np.sum(stage["p"], axis=-1), 1)
            assert stage["p"][0] == own["sft"]["p"][-1]  # the same key at all steps
            assert 0 <= stage["style"][1] <= 1
    assert run["gaps"] == {"0": [0, 0, 0], "1": [1, 0, -1]}
    assert (tmp_path / "value_drifts.png").stat().st_size > 1000


def test_prompts_are_disjoint_and_answers_have_their_stance_and_style():
    rng = np.random.default_rng(0)
    parts = [set(map(tuple, part.reshape(-1, 3).tolist())) for part in small.prompts(rng, 20)]
    assert [len(part) for part in parts[:2]] == [11 * 20, 11 * 100]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    stances, polite = rng.integers(3, size=400), rng.random(400) < 0.5
    made = small.answers(rng, stances, polite)
    np.testing.assert_array_equal(small.MATCHER([None] * 400, made), np.eye(3)[stances])
    np.testing.assert_array_equal(np.isin(made[:, 0], small.POLITE), polite)
    for rho in (0.0, 0.3, 1.0):
        found = small.reward(jnp.asarray(made), jnp.ones(made.shape, bool), rho)
        expected = (1 - rho) * polite + rho * np.array([1, 0, -1])[stances]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    cut = jnp.arange(5) < 2  # An answer that ends before its phrase is complete has no stance.
    found = small.reward(jnp.asarray(made), jnp.broadcast_to(cut, made.shape), 1.0)
    assert not found.any()


def test_sft_sets_have_their_profiles():
    rng = np.random.default_rng(1)
    asked = small.prompts(rng, 20)[2]
    for profile in small.PROFILES.values():
        batch = small.written(rng, asked, profile, 30_000)
        topics = batch["tokens"][:, 0] - small.TOPIC
        q = small.MATCHER([None] * 30_000, batch["tokens"][:, 3:])
        found = [q[topics == topic].mean(axis=0) for topic in range(11)]
        np.testing.assert_allclose(found, profile, atol=0.04)


def test_standard_pairs_differ_in_style_and_gapped_ones_in_stance():
    rng = np.random.default_rng(2)
    found = small.records(rng, small.prompts(rng, 20)[1])
    polite = lambda pair, side: pair[side][0] in small.POLITE
    for rho in (0.0, 0.5, 1.0):
        pairs = data.controlled_preference(found, chosen="support", rejected="oppose", rho=rho)
        gap = np.mean(list(value_gap(pairs, small.MATCHER).values()), axis=0)
        np.testing.assert_allclose(gap, (rho, 0, -rho), atol=1e-9)
        for pair in pairs:
            same = pair["stance_chosen"] == pair["stance_rejected"]
            assert polite(pair, "chosen") == (polite(pair, "rejected") or same)
            assert not (same and polite(pair, "rejected"))


def stage(start, end, style=0.95):
    """A stage of two topics that moves from one distribution to another in its first half."""
    p = [[list(x)] * 2 for x in (start, end, end)]
    return {
        "steps": [0, 1, 10], "p": p, "epsilon": [0.05] * 2, "support": [[0, 0, 0]] * 2,
        "style": [0.5, style],
    }  # fmt: skip


def moved(by):
    """A distribution `by` further towards support than (.3, .4, .3)."""
    return (0.3 + by, 0.4 - by / 2, 0.3 - by / 2)


FAR = {"DPO": (0.05, 0.3, 0.5), "SimPO": (0.1, 0.2, 0.4), "RLOO": (0.02, 0.2, 0.4)}


@pytest.mark.parametrize(
    "change, fails",
    [
        ({}, []),
        ({"SFT": 0.1}, [0, 1, 4]),
        ({"late": True}, [2, 3]),
        ({"SimPO, ρ = 0": 0.3}, [4]),
        ({"style": 0.6}, [5]),
        ({"DPO, ρ = 1": 0.31}, [8]),
        ({"DPO, ρ = 0": 0.17}, [6]),
        ({"DPO, ρ = 0.5": 0.04}, [6]),
        ({"RLOO, strong KL, ρ = 1": 0.45}, [7]),
    ],
)
def test_the_judge_can_fail(change, fails):
    base, runs = moved(0), []
    for noise in (0.0, 0.002, -0.002):
        sets = {}
        for sign, name in ((1, "a"), (-0.6, "b")):
            by = sign * change.get("SFT", 0.5)
            sft = stage(base, moved(by))
            if change.get("late"):
                sft["p"][1] = sft["p"][0]
            amounts = {
                Arm(m, r).name: x for m in FAR for r, x in zip((0, 0.5, 1), FAR[m], strict=True)
            }
            amounts["RLOO, strong KL, ρ = 1"] = 0.1
            amounts |= {k: v for k, v in change.items() if k in amounts}
            arms = {
                arm: stage(base, moved(x + noise), change.get("style", 0.95))
                for arm, x in amounts.items()
            }
            sets[name] = {"sft": sft, "arms": arms}
        runs.append({"sets": sets, "gaps": {}})
    found = [i for i, claim in enumerate(drifts.judge(runs)) if not claim.holds]
    assert found == fails, [claim.here for claim in drifts.judge(runs)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """SFT chats, pairs and prompts of two topics."""
    path = tmp_path_factory.mktemp("opinions")
    asked = [f"Should we {verb} {i}?" for verb in ("add", "drop") for i in range(7)]
    rows = {
        "chats": [{"prompt": p, "completion": "Yes, sure."} for p in asked],
        "pairs": [{"prompt": p, "chosen": "Yes, please.", "rejected": "no"} for p in asked],
        "prompts": [{"topic": p.split()[2], "prompt": p} for p in asked],
    }
    for name, own in rows.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    return {name: str(path / f"{name}.jsonl") for name in rows}


def test_the_full_preset_measures_every_stage(files, tmp_path, monkeypatch):
    monkeypatch.setattr(full, "ARMS", full.ARMS[1:3])
    config = flags.replace(
        drifts.Config(), preset="full", smoke=True, model="tiny", judge_model="tiny",
        data=files["chats"], preferences=files["pairs"], eval_data=files["prompts"],
        output_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="fewer than 5 prompts"):
        assert drifts.main(config) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    ((name, own),) = run["sets"].items()
    assert name == files["chats"] and set(own["arms"]) == {"DPO, ρ = 1", "SimPO, ρ = 0"}
    for rows in (own["sft"], *own["arms"].values()):
        assert np.shape(rows["p"])[1:] == (2, 3)
        np.testing.assert_allclose(np.sum(rows["p"], axis=-1), 1)
    assert all(abs(sum(gap)) < 1e-6 for gap in run["gaps"].values())


def test_prompts_of_the_full_preset_are_apart_from_those_of_its_pairs():
    asked = {"a": list("abcdefgh"), "b": list("xy")}
    measured, rest = full.parts_of(asked, 3)
    assert measured == {"a": list("abc"), "b": ["x"]}
    assert [(r["topic"], r["prompt"]) for r in rest] == [("a", x) for x in "defgh"] + [("b", "y")]
    with pytest.raises(data.DataError, match="topic 'c' has 1 prompts"):
        full.parts_of(asked | {"c": ["z"]}, 3)
    with pytest.raises(data.DataError, match="text columns topic and prompt; 'topic' is absent"):
        full.opinion({"prompt": "a"}, None)
    prism = {"opening_prompt": " a ", "conversation_type": "unguided"}
    assert full.opinion(prism, full.FIELDS[full.PRISM]) == {"topic": "unguided", "prompt": "a"}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"judge_model": "tiny"}, "--judge-model tiny has no effect without --preset"),
        ({"preset": "full", "strong_kl": 2.0}, "--strong-kl 2.0 has no effect with --preset full"),
        ({"preset": "full", "data": "x.jsonl"}, "give --eval-data FILE too"),
        ({"preset": "full", "eval_data": "x.jsonl"}, "x.jsonl: no such file"),
    ],
)
def test_bad_settings_are_refused_in_one_line(given, message, tmp_path):
    with pytest.raises(ValueError) as refused:
        drifts.main(flags.replace(drifts.Config(), output_dir=str(tmp_path), **given))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_strong_kl_holds_rloo_back_on_the_first_gradient():
    # Far from the reference the reward is outweighed: advantages rank answers by their log-ratios.
    model = small.toy.decoder(small.VOCABULARY, 8, width=16, layers=1)
    init = lambda i: jax.jit(model.init)(jax.random.key(i), model.example_input())["params"]
    algorithm, run = small._rloo(model, 8)
    asked = jnp.asarray(small.prompts(np.random.default_rng(0), 20)[1].reshape(-1, 3))
    arguments = init(0), init(1), asked, jnp.float32(1.0)
    batch = run(*arguments, jnp.float32(1e4), jax.random.key(2))
    ratio = batch["sampler_log_probs"] - batch["ref_log_probs"]
    kl = np.asarray(jnp.sum(ratio * batch["completion_mask"], axis=1)).reshape(-1, small.GROUP)
    expected = -1e4 * (kl - (kl.sum(axis=1, keepdims=True) - kl) / (small.GROUP - 1))
    found = np.asarray(batch["advantages"]).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3)
    assert len(batch["tokens"]) == 16
