"""Every script, run small; and what a user sees who gets something wrong."""

import functools
import json
import logging
import math
import os
import pathlib
import shutil
import subprocess
import sys
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import __main__ as listing
from experiments import (
    evaluate,
    generate,
    preference,
    reinforce,
    sample_pairs,
    sft,
)
from experiments.cli import flags, optimizers, quiet
from jaxft import checkpoints, data, train
from jaxft.adapters import load_adapter
from jaxft.checkpoints import load_model
from jaxft.generation import Beams
from jaxft.models import Prediction
from jaxft.objectives import supervised
from jaxft.rewards import Failures, model_rewards
from jaxft.rl.advantages import normalised_sum_advantages
from tests.processes import WITHOUT_TORCH

ROOT = pathlib.Path(__file__).parents[2]
TASK = "rg:chain_sum?size=40&seed=1&max_terms=2&min_digits=1&max_digits=1"


def run(script, *arguments):
    """Runs a script as a user does after `pip install "jaxft[text]"`, without torch."""
    command = [sys.executable, str(ROOT / "experiments" / f"{script}.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), WITHOUT_TORCH])}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def config_of(script, *data, **given):
    """A script's config with flags named as on the command line."""
    return flags.replace(script.Config(*data), **given)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke run's output directory and metrics; of the default adapter it is test_hosts.py's."""
    output = tmp_path_factory.mktemp("smoke") / "run"
    settings = dict(adapter="dora", quantise="int8", report_to=("tensorboard",), teacher="tiny")
    return output, sft.main(config_of(sft, smoke=True, output_dir=str(output), **settings))


def test_smoke_writes_all_it_promises(smoke):
    output, metrics = smoke
    files = {path.name for path in output.iterdir()}
    assert files >= {
        "adapter",
        "checkpoints",
        "metrics.json",
        "metrics.jsonl",
        "training.png",
        "tensorboard",
    }
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    # Half of the loss is the divergence from the teacher, whose kernels are not rounded.
    assert rows[0]["divergence"] > 0
    half = (rows[0]["divergence"] + rows[0]["task_loss"]) / 2
    assert rows[0]["loss"] == pytest.approx(half, rel=1e-5)
    assert json.loads((output / "metrics.json").read_text())["steps"] == metrics["steps"] == 6
    assert math.isfinite(metrics["last_loss"])
    assert (output / "adapter" / "adapter_model.safetensors").exists()


def test_the_adapter_is_used_by_the_other_scripts(smoke, tmp_path, capsys):
    adapter = str(smoke[0] / "adapter")
    report = tmp_path / "metrics.json"
    plain = evaluate.main(config_of(evaluate, TASK, model="tiny", limit=5, max_new_tokens=2))
    tuned = evaluate.main(
        config_of(
            evaluate,
            TASK,
            model="tiny",
            limit=5,
            max_new_tokens=2,
            adapter=adapter,
            output=str(report),
        )
    )
    assert tuned["loss"] < plain["loss"]
    assert len(json.loads(report.read_text())["answers"]) == 5
    prompts = config_of(
        generate, model="tiny", adapter=adapter, prompt=("1 + 1 =", "2"), max_new_tokens=3
    )
    assert len(generate.main(prompts)) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    "settings",
    [
        dict(updates=2, kl_weight=0.1, turns=2, stop=tuple("aeiou 0123456789"))
        | dict(teacher="tiny", distil_weight=0.5),
        dict(algorithm="ppo", epochs=2, reward_kl=0.1, kl_target=1.0, kl_horizon=50.0)
        | dict(scan_layers=True, remat="full", sharpness="sam"),
    ],
    ids=["grpo", "ppo"],
)
def test_reinforcement_learning_writes_all_it_promises_and_goes_on(settings, tmp_path):
    settings = settings | dict(smoke=True, save_steps=1)
    rows = lambda path: [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    metrics = reinforce.main(config_of(reinforce, **settings, output_dir=str(whole)))
    assert {path.name for path in whole.iterdir()} == {
        "adapter",
        "checkpoints",
        "metrics.json",
        "metrics.jsonl",
        "training.png",
    }
    assert metrics["steps"] == 4 and metrics["gap"] < 1e-4
    assert {*reinforce.SHOWN, "clipped_low", "no_contrast"} <= set(rows(whole)[0])
    assert ("divergence" in rows(whole)[0]) == ("teacher" in settings)
    if settings.get("algorithm") == "ppo":
        return  # A run of PPO that is cut is tests/rl/test_ppo.py's.
    # Cut inside a rollout and resumed, it continues with the same experience.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "4")
    assert (parts / "checkpoints" / "3").exists()
    reinforce.main(config_of(reinforce, **settings, output_dir=str(parts), resume=True))
    assert rows(parts) == rows(whole)


JUDGE = "def score(text, record):\n    return None if text.startswith('x') else len(set(text))\n"


def judge_file(path):
    (path / "judge.py").write_text(JUDGE)
    return f"{path / 'judge.py'}:score"


def test_answers_that_a_judge_scores_become_pairs_or_train_online(tmp_path, capsys):
    """To questions of which no answer is known."""
    judge, file = judge_file(tmp_path), lambda name: str(tmp_path / f"{name}.jsonl")
    ask = lambda i: [{"role": "user", "content": f"say {i}"}]
    for name, make in (
        ("questions", lambda i: {"question": f"say {i}"}),
        ("chats", lambda i: {"prompt": ask(i)}),
        ("held_out", lambda i: {"prompt": ask(100 + i), "answer": "7"}),
    ):
        rows = "\n".join(json.dumps(make(i)) for i in range(8))
        pathlib.Path(file(name)).write_text(rows)
    output = tmp_path / "pairs.jsonl"
    settings = dict(smoke=True, judge=judge, data=file("questions"))
    counts = sample_pairs.main(config_of(sample_pairs, **settings, output=str(output)))
    pairs = data.load(str(output), form=data.normalise_pair)
    assert counts["questions"] == 8 == counts["pairs"] + counts["undecided"]
    assert len(pairs) == counts["pairs"] > 2
    text = lambda side: side[0]["content"]
    for pair in pairs:
        score = lambda side, pair=pair: len(set(text(pair[side])))
        assert (score("chosen"), score("rejected")) == (
            pair["score_chosen"],
            pair["score_rejected"],
        )
        assert score("chosen") > score("rejected") and pair["prompt"][-1]["role"] == "user"
    run = tmp_path / "run"
    settings |= dict(data=file("chats"), eval_data=file("held_out"), algorithm="online_dpo")
    settings |= dict(output_dir=str(run))
    metrics = reinforce.main(config_of(reinforce, **settings))
    assert metrics["steps"] == 4 and metrics["held_out_reward_before"] is not None
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    # The first policy is its reference: DPO's loss is log 2 where a group has a pair.
    assert row["paired"] == 0 or row["pair_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert row["reward"] > 0


@pytest.mark.parametrize("name", get_args(reinforce.Choice))
def test_every_algorithm_of_reinforce_is_there(name):
    made = reinforce.algorithm(config_of(reinforce, algorithm=name), load_model("tiny")[0].forward)
    assert callable(made.credit) and callable(made.objective)


def test_the_whole_model_in_a_subspace(tmp_path):
    subspace = dict(adapter="intrinsic", d=100, accuracy=False, learning_rate=1e-2, quantise="nf4")
    subspace |= dict(scan_layers=True)  # half as many tensors, each with its own map
    config = config_of(sft, smoke=True, output_dir=str(tmp_path), **subspace)
    metrics = sft.main(config)
    assert metrics["last_loss"] < metrics["first_loss"]
    assert (tmp_path / "adapter" / "jaxft_adapter.safetensors").stat().st_size < 1000


class Reached(Exception):
    """Raised where the library would be called, with what it gets."""


def test_several_rewards_and_an_adapted_bonus_of_reinforce(tmp_path):
    """The verifier's verdict and a judge's number, normalised one by one."""
    settings = dict(also_judge=(judge_file(tmp_path),), reward_weights=(2.0, -0.1), group_size=2)
    settings |= dict(entropy_target=50.0, entropy_weight=0.01, algorithm="luspo", workers=1)
    config = config_of(reinforce, reward_combination="normalize_then_sum", **settings)
    records = data.load(TASK, form=data.normalise_question)[:2]
    answer = records[0]["answer"]
    several = config.rewards, config.more, config.base
    with reinforce.rewards_cli.opened_several(*several, records) as rewards:
        parts = rewards.parts([answer, "xyz"], records[:1] * 2)
        sums = rewards([answer, "xyz"], records[:1] * 2)
    assert rewards.failures == Failures() and parts[0, 0] == 1 and math.isnan(parts[1, 1])
    np.testing.assert_allclose(sums, [2 - 0.1 * len(set(answer)), 2 * parts[1, 0]], rtol=1e-6)
    credit = reinforce.credit_of(config, lambda *_: None)
    (found,) = credit(sums, {"reward_parts": parts}).values()
    wanted = normalised_sum_advantages(jnp.asarray(parts), jnp.array([2.0, -0.1]), 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    weight, entropy = reinforce.books_of(config)["entropy"].start(None)
    assert weight == pytest.approx(0.01) and entropy == math.inf
    assert reinforce.books_of(config_of(reinforce)) == {}


def test_label_smoothing_is_the_training_objective_s(tmp_path, monkeypatch):
    def objective(forward, **options):
        raise Reached(options)

    monkeypatch.setattr(sft, "supervised", objective)
    config = dict(smoke=True, adapter="full", accuracy=False, output_dir=str(tmp_path))
    with pytest.raises(Reached) as reached:
        sft.main(config_of(sft, **config, label_smoothing=0.1))
    assert reached.value.args[0]["label_smoothing"] == 0.1


def test_answers_to_verify_are_searched_with_beams(monkeypatch):
    def search(model, params, prompts, beams, rules, columns):
        raise Reached(beams, rules.temperature)

    monkeypatch.setattr("jaxft.rewards.accuracy.beam_search", search)
    flags = dict(num_beams=3, early_stopping="never", length_penalty=0.5)
    with pytest.raises(Reached) as reached:
        evaluate.main(config_of(evaluate, TASK, model="tiny", limit=2, **flags))
    assert reached.value.args == (Beams(3, 0.5, "never"), 0.0)


def test_training_learns_and_resumes_to_the_same_losses(tmp_path):
    settings = dict(
        model="tiny",
        data=(TASK,),
        eval_data="",
        validation=0.2,
        adapter="full",
        max_steps=8,
        max_length=128,
        eval_steps=4,
        accuracy=False,
        learning_rate=3e-3,
        save_steps=4,
        scan_layers=True,
    )
    losses = lambda path: [
        json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    metrics = sft.main(config_of(sft, **settings, output_dir=str(whole)))
    assert metrics["last_loss"] < 0.9 * metrics["first_loss"]
    # The schedule knows the whole length: the run is cut by removing its last checkpoint.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "8")
    sft.main(config_of(sft, **settings, output_dir=str(parts), resume=True))
    assert losses(parts) == losses(whole)
    model = dict(model=str(whole / "model"), prompt=("hi",), max_new_tokens=2, num_beams=2)
    assert len(generate.main(config_of(generate, **model, no_repeat_ngram_size=2))) == 1


# HyPO is DPO with samples beside its pairs.
@pytest.mark.parametrize("loss", ["kto", "bco", "hypo", "reward", "process"])
def test_preferences_are_learnt_from_a_file(loss, tmp_path):
    """Chosen answers end otherwise than rejected ones: held-out pairs show whether that was learnt."""
    rows = [
        {"prompt": f"{i} + 1 =", "chosen": f" {i + 1} yes", "rejected": f" {i + 1} no"}
        | {"completions": ["yes", "no", "yes"][: 2 + i % 2], "labels": [1, 0, 1][: 2 + i % 2]}
        for i in range(24)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = dict(model="tiny", data=(str(path),), eval_data="", validation=0.3, max_length=64)
    settings |= dict(max_steps=12, batch_size=4, learning_rate=3e-3, eval_steps=6, rank=4)
    settings |= dict(save_steps=6) | (dict(max_new_tokens=4) if loss == "hypo" else {})
    settings |= dict(fsdp=2, context=4, scan_layers=True) if loss == "kto" else {}
    moving = dict(ref_model_sync_steps=5, ref_model_mixup_alpha=0.3, prompt_embedder="tiny")
    settings |= moving if loss == "bco" else {}
    output = tmp_path / "run"
    config = config_of(preference, loss=loss, output_dir=str(output), **settings)
    metrics = preference.main(config)
    assert (output / "adapter" / "adapter_config.json").exists()
    assert (output / "training.png").exists()
    assert json.loads((output / "metrics.json").read_text())["steps"] == 12
    assert metrics["last_loss"] < metrics["first_loss"]
    if loss == "process":  # The report counts what evaluation counted, except blank groups.
        last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
        assert metrics["accuracy"] == pytest.approx(last["eval/accuracy"])
        assert metrics["commoner_label"] < 1
    elif loss == "reward":
        assert metrics["accuracy"] == 1.0 and metrics["accuracy_interval"][0] > 0.5
        model, base = load_model("tiny")
        params = load_adapter(output / "adapter", model.config, base)
        renderer = data.Renderer(checkpoints.load_tokenizer("tiny"))
        rewards = model_rewards(model.forward, params, renderer, max_length=64, batch_size=2)
        answers = [rows[0]["chosen"], rows[0]["rejected"], "x" * 80]
        good, bad, none = rewards(answers, [rows[0]] * 3)
        assert good > bad and math.isnan(none)
        assert metrics["reward_min"] < metrics["reward_mean"] < metrics["reward_max"]
    elif loss == "hypo":
        assert metrics["first_loss"] == pytest.approx(0.6931, abs=1e-3)
        assert metrics["accuracy"] == 1.0 and metrics["accuracy_interval"][0] > 0.5
        assert metrics["log_prob_chosen_gain"] > metrics["log_prob_rejected_gain"]
        # Cut in the middle and resumed, with the same pairs and the same samples.
        rows = lambda: [json.loads(x)["kl"] for x in (output / "metrics.jsonl").open()]
        whole = rows()
        assert abs(whole[0]) < 1e-4 and max(map(abs, whole)) > 1e-3
        shutil.rmtree(output / "checkpoints" / "12")
        again = flags.replace(config, resume=True)
        assert preference.main(again) == metrics and rows() == whole
    else:
        assert metrics["gain_desirable"] > metrics["gain_undesirable"]
    if loss == "bco":  # The reference and the mean of rewards go on where they were.
        rows = lambda: [json.loads(x)["delta"] for x in (output / "metrics.jsonl").open()]
        whole = rows()
        assert len(set(whole)) == 12
        shutil.rmtree(output / "checkpoints" / "12")
        assert preference.main(flags.replace(config, resume=True)) == metrics
        assert rows() == whole


@pytest.mark.parametrize("loss", get_args(preference.Loss))
def test_every_loss_of_preference_can_be_built(loss):
    given = {"beta": 0.2, "nll_alpha": 0.5}
    reads = preference.LOSSES[loss].reads
    config = config_of(preference, loss=loss, **{n: x for n, x in given.items() if n in reads})
    assert callable(preference.objective_of(config))


def test_other_divergences_are_dpo_with_another_h():
    model, params = load_model("tiny")
    part = data.Tokenised(jnp.arange(6), jnp.array([0, 0, 0, 1, 1, 1.0]))
    short = data.Tokenised(jnp.array([0, 1, 2, 9]), jnp.array([0, 0, 0, 1.0]))
    group = data.TokenisedGroup((part, short), {"ref_log_probs": jnp.array([-9.0, -7.0])})
    (batch,) = data.finite_group_batches([group], batch_size=1, max_length=8)

    def loss(**settings):
        config = config_of(preference, loss="dpo", beta=0.3, **settings)
        return float(preference.objective_of(config)(model.forward)(params, batch, None)[0])

    found = {loss(f_divergence=name) for name in ("reverse_kl", "forward_kl", "jensen_shannon")}
    assert len(found) == 3
    plain = pytest.approx(loss(), rel=1e-6)
    assert loss(f_divergence="alpha", f_alpha=1.0) == plain == loss(ld_alpha=1.0)
    assert loss(ld_alpha=0.0) != plain


def test_preview_prints_what_trains_and_stops(capsys):
    assert sft.main(config_of(sft, smoke=True, preview=True)) == {"records": 64}
    shown = capsys.readouterr().out
    assert shown.count("<|im_end|>⟧") == 3 and "tokens, " in shown


def test_what_cannot_fit_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train.memory, "device_memory", lambda device: 10**6)
    monkeypatch.setattr(checkpoints, "load_model", pytest.fail)
    config = config_of(sft, smoke=True, adapter="full", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="needs at least 0.0 GB .weights .* use --adapter lora"):
        sft.main(config)


def test_the_shell_sees_the_exit_code(tmp_path):
    result = run("sft", "--smoke", "--output-dir", tmp_path, "--data", "nowhere.jsonl")
    assert result.returncode == 2 and "nowhere.jsonl: no such file" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1, (
        "lines of other libraries: experiments/cli/quiet.py"
    )


@pytest.mark.parametrize("name, text", quiet.MESSAGES.items())
def test_messages_of_other_libraries_are_left_out_by_name_and_no_others(name, text, monkeypatch):
    logger, seen = logging.getLogger(name), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")  # the user's own, which stays
    quiet.silence()
    logger.warning(f"before {text} after")
    logger.warning("something else")
    assert seen == ["something else"] and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "0"


# What `python experiments/NAME.py ARGUMENTS` does, for several in a process: imports take seconds.
SCRIPTS = """
import contextlib, io, json, pathlib, runpy, sys
found = []
for name, *arguments in json.loads(sys.argv[1]):
    file, out, code = pathlib.Path("experiments", name).resolve(), io.StringIO(), None
    sys.argv, sys.path[0] = [name, *arguments], str(file.parent)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    found.append([code, out.getvalue()])
print(json.dumps(found))
"""


def test_help_is_readable_and_a_wrong_option_is_named():
    scripts = ("sft", "preference", "reinforce", "generate", "evaluate", "merge", "sample_pairs")
    scripts += ("papers/lion",)
    names = [f"{name}.py" for name in scripts]
    calls = json.dumps([[name, "--help"] for name in names] + [["sft.py", "--rnk", "1"]])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPTS, calls], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    *helped, (code, printed) = json.loads(result.stdout)
    for name, (exit_code, text) in zip(names, helped, strict=True):
        assert exit_code == 0 and "--model" in text, name
    # A comment inside brackets around a long default would not be shown.
    assert "lion: use a learning rate" in " ".join(helped[0][1].replace("│", " ").split())
    assert code == 2 and "rnk" in printed and "Traceback" not in printed


def test_the_list_of_scripts(capsys):
    listing.main([])
    assert "python experiments/sft.py" in capsys.readouterr().out


def test_a_missing_extra_is_one_line_and_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    config = config_of(sft, model=str(tmp_path), output_dir=str(tmp_path / "run"))
    with pytest.raises(SystemExit) as stopped:
        train.run_main(sft.main, config)
    said = capsys.readouterr().err
    assert stopped.value.code == 3 and said.count("\n") == 1
    assert "pip install 'jaxft[text]'" in said


@pytest.mark.parametrize("name", get_args(optimizers.Optimizer))
def test_every_optimizer_of_sft_lowers_a_parabola(name):
    optimizer = train.make_optimizer(1e-2, total_steps=200, rule=optimizers.OPTIMIZERS[name]())
    params = {"kernel": jnp.full((16, 16), 0.5), "bias": jnp.full(16, 0.5)}
    objective = lambda p, batch, key: (sum(jnp.mean(x**2) for x in p.values()), {})
    state = train.init_state(params, optimizer, jax.random.key(0))
    step = jax.jit(train.make_step(objective, optimizer))
    losses = []
    for _ in range(60):
        state, metrics = step(state, None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] * (0.99 if name == "sgd" else 0.7)
    assert 0 < float(metrics["learning_rate"]) <= 1e-2


def linear_forward(params, batch, key, noise=None):
    inputs = batch["x"] if noise is None else noise(batch["x"])
    return Prediction(inputs, params["kernel"])


@functools.cache
def linear_task():
    """(batch, initial params, their loss as a compiled function)."""
    x = jax.random.normal(jax.random.key(0), (32, 2, 8))
    label = jnp.argmax(x[..., :3] + 0.3 * x[..., 3:6], axis=-1)
    batch = {"x": x, "tokens": jnp.pad(label[:, :1], ((0, 0), (1, 0)))}
    params = {"kernel": 0.5 * jax.random.normal(jax.random.key(1), (8, 3))}
    return batch, params, jax.jit(lambda p: supervised(linear_forward)(p, batch, None)[0])


@functools.cache
def trained_linear(name):
    """(loss before, loss after 20 steps, kernel) of a linear model of tokens under a --sharpness."""
    batch, params, loss = linear_task()
    # One radius for all, so that none of them is too small to see.
    rho = None if name == "none" else 0.5
    method = optimizers.sharpen(name, supervised, linear_forward, optax.adam(0.05), rho)
    state = train.init_state(params, method.optimizer, jax.random.key(2))
    options = dict(gradient=method.gradient, extra_args=method.extra_args, microbatches=2)
    step = jax.jit(train.make_step(method.objective, method.optimizer, **options))
    for _ in range(20):
        state, _ = step(state, batch)
    return loss(params), loss(state.params), np.asarray(state.params["kernel"])


@pytest.mark.parametrize("name", get_args(optimizers.Sharpness))
def test_every_sharpness_goes_its_own_way_down(name):
    before, after, kernel = trained_linear(name)
    assert after < 0.8 * before
    if name != "none":
        assert np.max(np.abs(kernel - trained_linear("none")[2])) > 1e-4
