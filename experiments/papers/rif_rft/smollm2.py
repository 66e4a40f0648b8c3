"""The part `--preset smollm2`: SmolLM2-135M-Instruct with LoRA on easy tasks of reasoning-gym.

A prompt is a chat whose first turns are a solved example of the task; the answer is the result alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from experiments.papers.rif_rft import worlds
from experiments.worlds import questions, smollm2
from jaxft import data, rl
from jaxft.adapters import ALL_LINEAR, adapt, lora
from jaxft.rewards import RewardFn, in_process, verifier_for

# Task -> what it is asked and answered first.
SOLVED = {
    "chain_sum": ("State the final answer to the following arithmetic problem: 13 + 24 =", "37"),
    "products": (
        "Solve the following multiplication: 2 * 6. Give only the result as your final answer.",
        "12",
    ),
    "letter_counting": (
        'How many times does the letter "e" appear in the text: "the tree"?',
        "3",
    ),
}
SUMS = "rg:chain_sum?min_terms=2&max_terms=2&min_digits=2&max_digits=2&size={}&seed={}"
PRODUCTS = "rg:products?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size={}&seed={}"
LETTERS = "rg:letter_counting?min_words=1&max_words=2&size={}&seed={}"
SIZES = dict(
    model="smollm2", data=LETTERS.format(16, 1), eval_data=LETTERS.format(24, 1_000_000), fields={},
    eval_fields={}, stream=(SUMS.format(200, 1), PRODUCTS.format(60, 1)),
    eval_stream=(SUMS.format(24, 1_000_000), PRODUCTS.format(24, 1_000_000)),
    methods=("sft", "grpo"), steps=10, batch_size=8, prompts_per_step=6, group_size=4,
    learning_rate=5e-4, max_prompt=112, max_new_tokens=8, sampled_at_once=24, trained_at_once=24,
)  # fmt: skip
RANK = 8  # of LoRA on all projections


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], worlds.World]]:
    """Yields seed -> World; seeds differ in LoRA's first values, and in samples."""
    with questions.opened(config.source, record_of) as task:
        task = smollm2.in_float32(task)
        yield lambda seed: worlds.of_sources(config, adapted(task, seed), seed, others)


def adapted(task: questions.Task, seed: int) -> questions.Task:
    """Returns the task with LoRA on all projections, which alone trains."""
    params = adapt(jax.random.key(seed), task.params, {ALL_LINEAR: lora(RANK, 2.0 * RANK)})
    return task._replace(params=params)


def record_of(row: Mapping[str, Any], fields: Mapping[str, str] | None) -> data.Record:
    """The record of an entry of one of SOLVED: a chat with the solved example, and the answer.

    Raises:
        DataError: for an entry of another task.
    """
    task = row["metadata"]["metadata"]["source_dataset"]
    if task not in SOLVED:
        raise data.DataError(f"{task}: no solved example; expected one of {', '.join(SOLVED)}.")
    said = [*SOLVED[task], row["question"], row["answer"]]
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
    ]
    first = {"role": "system", "content": "Give the answer only."}
    kept = {name: row[name] for name in ("answer", "metadata")}
    return {"prompt": [first, *turns[:3]], "completion": turns[3:]} | kept


def others(task: questions.Task, spec: str) -> tuple[rl.Asked, RewardFn]:
    """(questions of another source, what verifies their answers)."""
    records = data.load(spec, form=record_of)
    asked = questions.asked(task.settings, task.renderer, records)
    return asked, in_process(verifier_for(spec, records))
