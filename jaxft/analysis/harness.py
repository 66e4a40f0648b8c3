"""Tasks of EleutherAI's lm-evaluation-harness, for a model and as a callback of training.

github.com/EleutherAI/lm-evaluation-harness; the package is `lm-eval`, of the extra `eval`. Its own evaluator
does the rest: prompts, few-shot examples, filters, metrics. It imports no torch unless a task does.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxft.analysis.text_model import TextModel
from jaxft.parallel import several_hosts
from jaxft.train import MissingDependencyError, TrainState

_BOOTSTRAPS = (
    1000  # samples of a standard error that has no closed form; the harness's CLI: 100,000
)


def load_tasks(
    names: Sequence[str],
    *,
    directory: str | os.PathLike | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """The harness's tasks, groups and tags of these names, with their data; `evaluate_tasks` takes it.

    Args:
        names: of the harness, of `directory`, or paths of task files (.yaml); "mmlu_*" is a pattern.
        directory: of task files of your own; it is searched first.
        num_fewshot: examples before each question; None: the task's own number. A task that fixes 0 keeps it,
            as in the harness.

    Raises:
        MissingDependencyError: if lm-eval is not installed.
        ValueError: for a name without a task, a directory that does not exist, or a task that cannot be read.
    """
    if directory is not None and not pathlib.Path(directory).is_dir():
        raise ValueError(f"{directory}: no such directory of tasks.")
    if not names:
        raise ValueError("load_tasks: names is empty; give at least one task.")
    tasks = _module("lm_eval.tasks")
    manager, found = _manager(tasks, names, directory), []
    for name in names:
        matches = [name] if _is_file(name) else manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"task {name!r} is neither of lm-eval nor a file{hint}.")
        found += matches
    try:
        loaded = manager.load(found)
    except Exception as error:  # Of task files, templates and data sets: any.
        raise ValueError(f"tasks {', '.join(names)} cannot be loaded: {error}") from error
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=_module("lm_eval.defaults").DEFAULT_OTHER_SEED)
    return loaded


def evaluate_tasks(
    text_model: TextModel,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    apply_chat_template: bool = False,
    bootstraps: int = _BOOTSTRAPS,
    log_samples: bool = False,
) -> dict[str, Any]:
    """The harness's results: "results", "groups", "versions", "n-shot" and so on, as it writes them.

    Args:
        tasks: from `load_tasks`.
        limit: documents of each task, the first ones; None: all.
        apply_chat_template: ask in the form of a conversation.
        bootstraps: samples of the standard errors that have no closed form.
        log_samples: with each document, request and answer.

    Raises:
        ValueError: for a task that runs programs which a model wrote, or that asks about images.
    """
    evaluator = _module("lm_eval.evaluator")
    if several_hosts():
        raise ValueError(
            "evaluate_tasks runs in a single process; evaluate the saved model instead."
        )
    with _seeded():
        return evaluator.evaluate(
            harness_model(text_model),
            tasks,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            bootstrap_iters=bootstraps,
            log_samples=log_samples,
        )


def harness_model(text_model: TextModel) -> Any:
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)` too."""
    base = _module("lm_eval.api.model").LM

    class JaxModel(base):
        """Passes the texts of requests on."""

        def loglikelihood(self, requests):
            return text_model.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests):
            return text_model.loglikelihood_rolling([request.args[0] for request in requests])

        def generate_until(self, requests):
            return text_model.generate_until([request.args for request in requests])

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return text_model.chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template=False):
            own = text_model.template or text_model.tokenizer.chat_template
            return own if chat_template else None

        @property
        def tokenizer_name(self):
            return text_model.tokenizer.name_or_path.replace("/", "__")

    return JaxModel()


def harness_metrics(
    model: Any, tokenizer: Any, tasks: dict[str, Any], *, limit: int | None = None, **options: Any
) -> Callable[[TrainState], dict[str, float]]:
    """A function for `train.every(steps, function)`: state -> {"eval/<task>/<metric>": value}.

    A filter other than "none" follows its metric: "eval/gsm8k/exact_match/strict-match".

    Args:
        tasks: from `load_tasks`, so that mistakes show before training.
        limit: documents of each task; None: all.
        options: of `TextModel`, such as batch_size, template and mesh.
    """

    def measure(state):
        text_model = TextModel(model, state.params, tokenizer, **options)
        results = evaluate_tasks(text_model, tasks, limit=limit, bootstraps=0)
        return {f"eval/{name}": value for name, value in metrics_of(results).items()}

    return measure


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """{"<task>/<metric>": value} of the harness's results, without standard errors."""
    found = {}
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, comma, rule = name.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                found[f"{task}/{metric}" + ("" if rule == "none" else f"/{rule}")] = float(value)
    return found


def results_table(results: dict[str, Any]) -> str:
    """The harness's tables of tasks and of groups, as Markdown."""
    make = _module("lm_eval.utils").make_table
    parts = [make(results)] + ([make(results, "groups")] if results.get("groups") else [])
    return "\n".join(parts)


def _manager(tasks, names, directory):
    """The index of tasks; that of the harness's own 14,000 takes seconds, so only where it is needed."""
    if directory is not None or all(map(_is_file, names)):
        options = {} if directory is None else {"include_path": str(directory)}
        own = tasks.TaskManager(include_defaults=False, **options)
        if all(_is_file(name) or name in own.all_subtasks for name in names):
            return own
    return tasks.TaskManager(include_path=None if directory is None else str(directory))


def _is_file(name):
    return name.endswith((".yaml", ".yml")) and pathlib.Path(name).is_file()


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The seeds of the harness's command line, and afterwards the generators as they were."""
    seeds = _module("lm_eval.defaults")
    states = random.getstate(), np.random.get_state()
    random.seed(seeds.DEFAULT_RANDOM_SEED), np.random.seed(seeds.DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"tasks need lm-eval, which is not installed ({error}): pip install 'jaxft[eval]'"
        ) from error
