"""RIF-RFT's script: the stream, batches with replay, filters, and a judge that can fail."""

import json
import re

import jax
import numpy as np
import pytest

from experiments.cli import flags
from experiments.papers.rif_rft import main as rif
from experiments.papers.rif_rft import smollm2, worlds
from experiments.worlds import questions, words
from jaxft import rl
from jaxft.adapters import partition
from jaxft.checkpoints import load_model
from jaxft.data import DataError
from tests.experiments.tracing import trace_fits


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    output = tmp_path_factory.mktemp("rif")
    config = rif.Config(smoke=True, methods=rif.METHODS, output_dir=str(output))
    assert rif.main(config) == 0
    assert (output / "rif_rft.png").stat().st_size > 1000
    return json.loads((output / "metrics.json").read_text())["runs"][0]


def test_smoke(smoke):
    assert set(smoke["methods"]) == set(rif.METHODS)
    for name, row in smoke["methods"].items():
        assert row["steps"] == [2, 2, 2] and len(row["after"]) == 3
        assert all(len(one["tasks"]) == 3 for one in row["after"])
        # Untrained, the model gives no right answer: what trains on its answers learns nothing.
        assert (row["after"][-1]["kl"] > 1e-6) == (name not in rif.SAMPLED)
    assert smoke["start"]["kl"] == pytest.approx(0, abs=1e-5)


def test_full_preset(tmp_path, monkeypatch):
    traced = []
    trace_fits(monkeypatch, traced)
    given = dict(preset="full", smoke=True, fsdp=1, methods=("sft", "grpo"))
    assert rif.main(flags.replace(rif.Config(), **given, output_dir=str(tmp_path))) == 0
    (run,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert run["tasks"] == ["chain_sum", "chain_sum"]
    assert set(run["methods"]) == set(given["methods"])
    # Two tasks of SFT and of GRPO, and GRPO without and with the filter.
    assert traced == [4, 4] + [2 * 2] * 4


def test_smollm2_s_prompts_have_a_solved_example():
    about = {"source_dataset": "products", "num_terms": 2, "expression": "3 * 4"}
    entry = {"metadata": about}
    record = smollm2.record_of({"question": "?", "answer": "12", "metadata": entry}, None)
    assert record["prompt"] == "2*6=12\n5*4=20\n3*4=" and record["completion"] == "12\n"
    for (_, terms), lines in smollm2.SOLVED.items():
        for expression, result in (line.split("=") for line in lines.split()):
            assert eval(expression) == int(result)
            assert len(re.findall(r"\d+", expression)) == terms
    about["source_dataset"] = "maze"
    with pytest.raises(DataError, match="maze.*no solved example"):
        smollm2.record_of({"question": "", "answer": "", "metadata": entry}, None)


def test_smollm2_trains_lora_alone():
    model, params = load_model("tiny")
    task = questions.Task(None, model, params, *[None] * 5)
    trained, frozen = (jax.tree.leaves(tree) for tree in partition(smollm2.adapted(task, 0).params))
    assert sum(x.size for x in frozen) == sum(x.size for x in jax.tree.leaves(params))
    assert {smollm2.RANK} <= {size for x in trained for size in x.shape}


def test_answers_are_sampled_in_groups_and_graded(world):
    model = world[1].model
    prompts, answers = worlds.asked("sort", words.words(np.random.default_rng(0), 4))
    asked = rl.Asked(prompts, [{}] * 4, {"answer": answers})
    sample = lambda answers: worlds.answered(model, 2)(
        world[1].start, asked._replace(columns={"answer": answers}), jax.random.key(0)
    )
    batch = sample(answers)
    assert batch["tokens"].shape == (8, 12) and batch["completion_mask"].shape == (8, 6)
    assert (batch["tokens"][:, :6] == prompts.repeat(2, axis=0)).all()
    # Asked for what the first sample of each pair says, only these are right.
    given = np.where(batch["completion_mask"], batch["tokens"][:, 6:], -1)
    right = (given == given[::2].repeat(2, axis=0)).all(axis=1)
    assert sample(given[::2])["rewards"].tolist() == right.tolist() and right[::2].all()
    ended = (batch["tokens"][:, 6:] == words.END) & batch["completion_mask"]
    assert batch["truncated"].tolist() == (~ended.any(axis=1)).tolist()


def test_tasks_of_the_stream():
    word = np.array([[3, 1, 4, 1, 5]])
    answers = {name: task(word)[0].tolist() for name, task in worlds.STREAM.items()}
    assert answers == {
        "sort": [1, 1, 3, 4, 5], "sort down": [5, 4, 3, 1, 1], "sort to capitals": [11, 11, 13, 14, 15],
    }  # fmt: skip
    prompts, given = worlds.asked("sort down", word)
    assert prompts.tolist() == [[26, 3, 1, 4, 1, 5]] and given.tolist() == [[5, 4, 3, 1, 1, 20]]
    assert prompts.max() < worlds.VOCABULARY == 28


@pytest.fixture(scope="module")
def world():
    config = flags.with_small(
        rif.Config(hopeless=0.5), rif.SMOKE | {"examples": 200, "batch_size": 8}
    )
    return config, worlds.of_words(config, 0)


def test_replay_has_a_quarter_of_earlier_tasks(world):
    tokens = lambda earlier: next(world[1].rows(2, 0, earlier))["tokens"][:, 0]
    assert set(tokens(None)) == {27} and len(tokens(None)) == 8
    mixed = tokens([0, 1])
    assert len(mixed) == 8 and sum(mixed == 27) == 6 and set(mixed) <= {25, 26, 27}


def test_hopeless_prompts_are_filtered(world):
    """With a model that answers right: the prompts with another word's answer are left out."""
    config, made = world
    rates = np.array([0.0, 0.25, 1.0])
    stub = made._replace(rates=lambda params, i, seed: rates)
    assert worlds.kept_prompts(rif.Config(), stub, None, 0, 0).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="sort: of 3 prompts none"):
        worlds.kept_prompts(rif.Config(), made._replace(rates=lambda *_: rates * 0), None, 0, 0)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(methods=("sft",)), "methods: sft and grpo"),
        (dict(methods=("sft", "grpo", "ppo")), "methods: sft and grpo"),
        (dict(stream=("rg:chain_sum",)), "stream and eval_stream"),
        (dict(preset="smollm2", level=0.5), "--level 0.5 has no effect with --preset smollm2"),
    ],
)
def test_bad_settings_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        rif.main(rif.Config(**change))


def result(i, sft=-0.4, grpo=-0.1, general=0.9, expert=-0.1, kl=-0.1, saved=0.6, learned=0.8):
    small = 0.01 * i
    row = lambda forgetting, general: {
        "forgetting": forgetting + small, "average": 0.8, "steps": [1, 2, 3],
        "after": [{"general": general, "kl": 0.1, "tasks": [learned] * 3}] * 3,
    }  # fmt: skip
    methods = {
        "sft": row(sft - 2 * small, 0.5 + small), "grpo": row(grpo, general), "grpo_kl": row(kl, 0.9),
        "expert_iteration": row(expert, 0.9),
    }  # fmt: skip
    part = lambda rollouts: {"rollouts": rollouts, "kept": 0.7, "accuracy": 0.8}
    rows = part(1000), part(1000 * saved + i)
    start = {"tasks": [0.4] * 3}
    filters = dict(zip(rif.FILTERS, rows, strict=True))
    return {"methods": methods, "start": start, "filter": filters}


@pytest.mark.parametrize(
    "change, fails",
    [({}, []), (dict(grpo=-0.5, kl=-0.5), [0]), (dict(general=0.4), [1]), (dict(kl=-0.3), [2]),
     (dict(expert=-0.5), [3]), (dict(learned=0.7), [4]), (dict(saved=1.1), [5])],
)  # fmt: skip
def test_judge_can_fail(change, fails):
    claims = rif.judge(rif.Config(), [result(i, **change) for i in range(3)])
    assert [i for i, claim in enumerate(claims) if not claim.holds] == fails


@pytest.mark.parametrize("learned, fails", [(0.5, []), (0.35, [4])])
def test_one_run_of_smollm2_is_judged_by_its_estimates(learned, fails):
    run = result(0, learned=learned)
    del run["filter"]
    claims = rif.judge(rif.Config(preset="smollm2"), [run])
    assert [i for i, claim in enumerate(claims) if not claim.holds] == fails and len(claims) == 5
