"""Log-likelihoods and answers of text against slow loops over model.apply, and the harness's own rules."""

import dataclasses
import json
import sys
import types

import jax
import numpy as np
import pytest

from experiments import evaluate
from experiments.cli import flags
from jaxft import train
from jaxft.analysis import (
    TextModel,
    evaluate_tasks,
    harness,
    harness_metrics,
    harness_model,
    load_tasks,
    metrics_of,
)
from jaxft.analysis import text_model as text_model_module
from jaxft.analysis.text_model import rolling_windows, sampling_rules
from jaxft.checkpoints import load_model, load_tokenizer
from jaxft.parallel import make_mesh, shard_params
from tests.small_models import jitted

LENGTH = 32  # of all rows: one compiled shape
REQUESTS = [
    ("The capital of France is", " Paris"),
    ("2 + 2 = ", "4"),
    ("", "no context"),
    ("   ", "blanks alone"),
    ("a context of more tokens than the model may have, cut at its beginning", " end"),
    ("a", "b" * (LENGTH - 1)),
]


@pytest.fixture(scope="module")
def text_model():
    model, params = load_model("tiny")
    params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, params)
    return TextModel(model, params, load_tokenizer("tiny"), batch_size=4, max_length=LENGTH)


def log_probs(text_model, row):
    """[T, V] of one row of ids, by model.apply."""
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(row)] = row
    logits = jitted(text_model.model)({"params": text_model.params}, tokens).logits
    return np.asarray(jax.nn.log_softmax(logits[0, : len(row)], axis=-1))


def slow_score(text_model, before, after):
    row = [*before, *after][-(LENGTH + 1) :]
    table = log_probs(text_model, row[:-1])[-len(after) :]
    greedy = table.argmax(axis=-1).tolist() == list(after)
    return float(sum(table[i, token] for i, token in enumerate(after))), greedy


def test_loglikelihood_equals_a_slow_loop(text_model):
    found = text_model.loglikelihood(REQUESTS)
    bytes_of = lambda text: [text_model.tokenizer.encode(c)[0] for c in text]
    eos = text_model.tokenizer.eos_token_id
    for (before, after), (value, greedy) in zip(REQUESTS, found, strict=True):
        blanks = before[len(before.rstrip()) :]
        pair = bytes_of(before.rstrip()) or [eos], bytes_of(blanks + after)
        expected, likeliest = slow_score(text_model, *pair)
        assert value == pytest.approx(expected, rel=1e-5) and greedy is likeliest


def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(text_model):
    row = [5, 9]
    for _ in range(6):
        row.append(int(log_probs(text_model, row)[-1].argmax()))
    wrong = [*row[2:-1], (row[-1] + 1) % 256]
    scores = text_model.token_scores([(row[:2], row[2:]), (row[:2], wrong)], "")
    assert [greedy for _, greedy in scores] == [True, False]
    assert scores[0][0] == pytest.approx(slow_score(text_model, row[:2], row[2:])[0], rel=1e-5)


def test_choices_of_one_token_share_the_row_of_their_question(text_model, monkeypatch):
    run, calls = text_model_module._signed_losses, []
    monkeypatch.setattr(
        text_model_module, "_signed_losses", lambda *args: calls.append(args) or run(*args)
    )
    pairs = [([5, 9, 7], [c]) for c in (3, 4, 6, 3, 8, 11)] + [([5, 9], [7, 4]), ([9, 7], [3])]
    found = text_model.token_scores(pairs, "")
    for (before, after), (value, greedy) in zip(pairs, found, strict=True):
        expected, likeliest = slow_score(text_model, before, after)
        assert value == pytest.approx(expected, rel=1e-5) and greedy is likeliest
    assert len(calls) == 1  # two rows; batch_size is 4


def test_a_mesh_changes_no_value(text_model):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    params = shard_params(text_model.params, mesh)
    spread = dataclasses.replace(text_model, params=params, mesh=mesh)
    for (value, greedy), (there, also) in zip(
        text_model.loglikelihood(REQUESTS), spread.loglikelihood(REQUESTS), strict=True
    ):
        assert there == pytest.approx(value, rel=1e-5) and also is greedy
    asked = [(f"question {i}", {"until": [], "max_gen_toks": 8}) for i in range(3)]
    assert spread.generate_until(asked) == text_model.generate_until(asked)
    with pytest.raises(ValueError, match="multiple of the 4 devices on data x fsdp, got 6"):
        dataclasses.replace(spread, batch_size=6)


def test_windows_are_those_of_the_harness():
    """The example of lm_eval.api.model.LM.loglikelihood_rolling, with disjoint contexts."""
    windows = list(rolling_windows(list(range(10)), -1, 4))
    assert windows == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(rolling_windows([], -1, 4)) == []


def test_rolling_loglikelihood_is_the_sum_over_all_tokens(text_model):
    texts = ["short", "a text that is longer than two windows of the model " * 2, ""]
    expected = []
    for text in texts:
        ids, total = text_model.encode(text), 0.0
        for i, token in enumerate(ids):
            window = i // LENGTH
            end = min((window + 1) * LENGTH, len(ids))
            start = max(end - LENGTH, 0) if window else 0
            row = [text_model.tokenizer.eos_token_id, *ids][start : i + 1]
            total += log_probs(text_model, row)[-1, token]
        expected.append(total)
    np.testing.assert_allclose(text_model.loglikelihood_rolling(texts), expected, rtol=1e-5)


def test_answers_are_cut_at_the_first_stop_string_whatever_the_batch(text_model):
    contexts = ["a long context that has to lose its beginning to leave room", "Q", ""]
    plain = {"until": [], "max_gen_toks": 8}
    ask = lambda **more: text_model.generate_until([(c, {**plain, **more}) for c in contexts])
    whole = ask()
    until = whole[1][2]
    requests = [(c, {**plain, "until": u}) for c in contexts for u in (until, ["", "\ue000"])]
    assert text_model.generate_until(requests) == [
        text for answer in whole for text in (answer.split(until)[0], answer)
    ]
    sampled = ask(do_sample=True, temperature=2.0)
    assert sampled == ask(do_sample=True, temperature=2.0) and sampled != whole
    ids = text_model.encode(contexts[0])[-(LENGTH - 8) :]
    for _ in range(8):
        ids.append(int(log_probs(text_model, ids)[-1].argmax()))
    assert whole[0] == text_model.tokenizer.decode(ids[-8:], skip_special_tokens=True)


def test_options_of_a_request():
    rules = lambda **options: sampling_rules(options, 256, (2,))
    assert rules().max_new_tokens == 256 and rules().temperature == 0
    assert rules(until="a", max_tokens=4, max_gen_toks=5).max_new_tokens == 5
    assert rules(until="a").stop_strings == ("a",) and rules().stop_ids == (2,)
    assert rules(do_sample=False, temperature=0.7, top_p=0.9).temperature == 0
    assert rules(temperature=0.7, top_p=0.9).top_p == 0.9
    for options in ({"num_beams": 4}, {"do_sample": True}, {"max_length": 3}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rules(**options)


def test_bad_requests(text_model):
    with pytest.raises(ValueError, match="at most 32"):
        text_model.loglikelihood([("a", "b" * (LENGTH + 1))])
    with pytest.raises(ValueError, match="continuation of 0"):
        text_model.loglikelihood([("a", "")])
    with pytest.raises(ValueError, match="leaves no room"):
        text_model.generate_until([("a", {"max_gen_toks": LENGTH})])


def test_the_harness_model_passes_requests_on(text_model, monkeypatch):
    base = types.ModuleType("lm_eval.api.model")
    base.LM = object
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, base)
    model = harness_model(text_model)
    request = lambda *args: types.SimpleNamespace(args=args)
    pairs = REQUESTS[:2]
    expected = text_model.loglikelihood(pairs)
    assert model.loglikelihood([request(*pair) for pair in pairs]) == expected
    assert model.loglikelihood_rolling([request("ab")]) == text_model.loglikelihood_rolling(["ab"])
    asked = ("Q", {"until": [], "max_gen_toks": 8})
    assert model.generate_until([request(*asked)]) == text_model.generate_until([asked])
    turn = [{"role": "user", "content": "hi"}]
    template = text_model.tokenizer.chat_template
    assert model.apply_chat_template(turn).endswith("<|im_start|>assistant\n")
    assert model.chat_template(True) == template and model.chat_template() is None
    assert "/" not in model.tokenizer_name


def test_metrics_of_results():
    values = {
        "alias": "t",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 1,
        "n,none": "N/A",
    }
    assert metrics_of({"results": {"t": values}}) == {"t/acc": 0.5, "t/em/strict": 1.0}


@pytest.mark.parametrize(
    "given, code, said",
    [
        ({"tasks": ("arc_easy",)}, 3, "pip install 'jaxft[eval]'"),
        ({"tasks": ("own",), "task_dir": "nowhere"}, 2, "nowhere: no such directory of tasks"),
        ({"tasks": ("own",), "num_fewshot": -1}, 2, "--num-fewshot must be at least 0, got -1"),
        ({}, 2, "give --data, or --tasks"),
    ],
)
def test_what_is_missing_is_named(given, code, said, monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        train.run_main(evaluate.main, flags.replace(evaluate.Config(), **given))
    stderr = capsys.readouterr().err
    assert stop.value.code == code and said in stderr and len(stderr.splitlines()) == 1


def write_task(path):
    lines = [
        {"question": f"{i} + 1 =", "choices": [str(i + 1), "no"], "answer": 0} for i in range(6)
    ]
    (path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "own.yaml").write_text(
        "task: own\noutput_type: multiple_choice\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {path}/own.jsonl}}}}\nfewshot_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_runs_in_the_harness(text_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs pip install 'jaxft[eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    tasks = load_tasks(["own"], directory=tmp_path)
    found = metrics_of(evaluate_tasks(text_model, tasks, bootstraps=0))
    better = [
        scores[0][0] > scores[1][0]
        for i in range(6)
        for scores in [text_model.loglikelihood([(f"{i} + 1 =", f" {c}") for c in (i + 1, "no")])]
    ]
    assert found == {"own/acc": pytest.approx(np.mean(better))}
    measure = harness_metrics(text_model.model, text_model.tokenizer, tasks, max_length=LENGTH)
    state = types.SimpleNamespace(params=text_model.params)
    assert measure(state) == {"eval/own/acc": found["own/acc"]}
    output = tmp_path / "results.json"
    given = dict(model="tiny", tasks=("own",), task_dir=str(tmp_path), limit=2, num_fewshot=1)
    metrics = evaluate.main(flags.replace(evaluate.Config(), **given, output=str(output)))
    results = json.loads(output.read_text())
    assert results["n-shot"] == {"own": 1} and results["n-samples"]["own"]["effective"] == 2
    assert metrics["own/acc"] == results["results"]["own"]["acc,none"]
    assert "|own" in capsys.readouterr().out
    # Without the index of the harness's own tasks, which takes seconds.
    options = dict(include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(harness, "_manager", lambda tasks, *_: tasks.TaskManager(**options))
    with pytest.raises(ValueError, match="task 'owm' is neither of lm-eval nor a file; near: own"):
        load_tasks(["owm"])
