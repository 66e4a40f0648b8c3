"""Tasks of EleutherAI's lm-evaluation-harness: the flags of evaluate.py --tasks, and what they run."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import tyro

from experiments.cli import choices
from experiments.cli.models import check_positions, load_trained, renderer_of, writable_file
from jaxft import analysis, data
from jaxft.output import writing

_COMPANIONS = ("task_dir", "num_fewshot", "apply_chat_template")
# Flags of evaluate.py that tasks do not read: they say themselves what is asked and how it is answered.
_NOT_READ = ("data", "fields", "mask", "max_new_tokens", "num_beams")


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclasses.dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness, instead of --data; they need pip install 'jaxft[eval]'."""

    tasks: tuple[str, ...] = ()  # names, such as arc_easy or "mmlu_*", or task files (.yaml)
    task_dir: str | None = None  # directory of task files of your own, searched first
    num_fewshot: int | None = None  # examples before each question; default: the task's own number
    apply_chat_template: bool = False  # ask in the form of a conversation


def check(config: Any) -> None:
    """Raises ValueError if neither --data nor --tasks is given, or a flag that has no effect with them."""
    if not config.harness.tasks:
        choices.check_companions(config, dict.fromkeys(_COMPANIONS, "tasks"))
        if config.data is None:
            raise data.DataError("nothing to evaluate on; give --data, or --tasks of lm-eval.")
        return
    choices.check_excluded(config, _NOT_READ, "--tasks")
    number = config.harness.num_fewshot
    if number is not None and number < 0:
        raise ValueError(f"--num-fewshot must be at least 0, got {number}.")


def run(config: Any) -> dict[str, Any]:
    """Evaluates the tasks, prints the harness's table, and returns {"<task>/<metric>": value}.

    --output gets the harness's results as JSON.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # It warns of each default of a task file.
    asked, output = config.harness, writable_file(config.output) if config.output else None
    options = dict(directory=asked.task_dir, num_fewshot=asked.num_fewshot)
    tasks = analysis.load_tasks(asked.tasks, **options)
    for name, task in tasks["tasks"].items():
        used = task.get_config("num_fewshot")
        if asked.num_fewshot not in (None, used):
            print(f"{name}: --num-fewshot has no effect, since the task fixes {used} examples")
    renderer = renderer_of(config.trained)
    if asked.apply_chat_template and not renderer.template:
        raise ValueError(
            "--apply-chat-template needs a chat template, and the model has none; give --template."
        )
    model, params = load_trained(config.trained)
    if config.max_length is not None:
        check_positions(model, config.trained.model, config.max_length)
    text_model = analysis.TextModel(
        model,
        params,
        renderer.tokenizer,
        template=renderer.template,
        batch_size=config.batch_size,
        max_length=config.max_length,
        progress=True,
    )
    chat = dict(apply_chat_template=asked.apply_chat_template)
    results = analysis.evaluate_tasks(text_model, tasks, limit=config.limit, **chat)
    print(analysis.results_table(results))
    if output is not None:
        with writing(output):
            output.write_text(json.dumps(results, indent=2, default=str) + "\n")
        print(f"wrote {output}")
    return analysis.metrics_of(results)
