"""The part `--preset smollm2`: SmolLM2-135M-Instruct with LoRA on easy tasks of reasoning-gym.

A prompt is plain text, two solved expressions of the same task and one to solve; the answer is the result
and the end of its line:

    24+5=29
    41-13=28
    13+24=

Sums of two numbers of two digits come first, then products of two digits. Sums of three one-digit numbers,
which never train, are the general ability. There are 100 products, so that held-out ones may be known.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from experiments.papers.rif_rft import worlds
from experiments.worlds import questions, smollm2
from jaxft import data, rl
from jaxft.adapters import ALL_LINEAR, adapt, lora
from jaxft.models import SpecialIds, stack_layers
from jaxft.rewards import RewardFn, in_process, verifier_for

# (Task, number of its terms) -> solved expressions.
SOLVED = {
    ("chain_sum", 2): "24+5=29\n41-13=28\n",
    ("chain_sum", 3): "6-2+9=13\n3+8+5=16\n",
    ("products", 2): "2*6=12\n5*4=20\n",
}
_SIZED = "min_terms={0}&max_terms={0}&min_digits={1}&max_digits={1}&size={2}&seed={3}"
SUMS, PRODUCTS = f"rg:chain_sum?{_SIZED}", f"rg:products?{_SIZED}"
LATER = 1_000_000  # seed of held-out questions
SIZES = dict(
    model="smollm2", data=SUMS.format(3, 1, 16, 1), eval_data=SUMS.format(3, 1, 32, LATER), fields={},
    eval_fields={}, stream=(SUMS.format(2, 2, 300, 1), PRODUCTS.format(2, 1, 60, 1)),
    eval_stream=(SUMS.format(2, 2, 32, LATER), PRODUCTS.format(2, 1, 32, LATER)),
    methods=("sft", "grpo"), steps=10, batch_size=8, prompts_per_step=8, group_size=4,
    learning_rate=5e-4, max_prompt=40, max_new_tokens=4, sampled_at_once=32, trained_at_once=32,
)  # fmt: skip
RANK = 8  # of LoRA on all projections


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], worlds.World]]:
    """Yields seed -> World; seeds differ in LoRA's first values, and in samples."""
    with questions.opened(config.source, record_of) as task:
        task = of_lines(smollm2.in_float32(task))
        yield lambda seed: worlds.of_sources(config, adapted(task, seed), seed, others)


def of_lines(task: questions.Task) -> questions.Task:
    """Returns the task with answers that end with a line, and stacked layers, which compile faster."""
    tokenizer, config = task.renderer.tokenizer, task.model.config
    ends = (*config.special.eos, *tokenizer("\n", add_special_tokens=False)["input_ids"])
    config = dataclasses.replace(config, special=SpecialIds(eos=ends))
    return task._replace(
        model=task.model.clone(config=config, scan_layers=True),
        params=stack_layers(task.params),
        renderer=data.Renderer(tokenizer, append_eos=False),
    )


def adapted(task: questions.Task, seed: int) -> questions.Task:
    """Returns the task with LoRA on all projections; nothing else trains."""
    params = adapt(jax.random.key(seed), task.params, {ALL_LINEAR: lora(RANK, 2.0 * RANK)})
    return task._replace(params=params)


def record_of(row: Mapping[str, Any], fields: Mapping[str, str] | None) -> data.Record:
    """The record of an entry of one of SOLVED: lines with solved expressions, and the answer.

    Raises:
        DataError: for an entry of another task.
    """
    about = row["metadata"]["metadata"]
    kind = about["source_dataset"], about.get("num_terms")
    if kind not in SOLVED:
        raise data.DataError(f"{kind}: no solved example; expected one of {list(SOLVED)}.")
    expression = about["expression"].replace(" ", "")
    kept = {name: row[name] for name in ("answer", "metadata")}
    return {"prompt": f"{SOLVED[kind]}{expression}=", "completion": f"{row['answer']}\n"} | kept


def others(task: questions.Task, spec: str) -> tuple[rl.Asked, RewardFn]:
    """(questions of another source, what verifies their answers)."""
    records = data.load(spec, form=record_of)
    asked = questions.asked(task.settings, task.renderer, records)
    return asked, in_process(verifier_for(spec, records))
