"""Answers in text for MRT's script: how they are split and forced, and worked sums for SmolLM2."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import documents, questions
from jaxft import data, rl
from jaxft.adapters import apply_named
from jaxft.objectives import supervised
from jaxft.rewards import Verifier
from jaxft.rewards.answers import same_answer

FILLER, FILLED = "Let me think about it.", 0.4  # a line without use; chance of one, and of a second
ROWS, RATE = 8, 1e-3  # rows per step and learning rate of the pretraining on worked sums


class Reasoning(NamedTuple):
    """Functions and texts that split answers into episodes and force them."""

    split: Callable[[str], list[str]]
    close: str  # end of the reasoning
    stop_text: str  # forces an answer
    most: int  # episodes


STOP_TEXT = "\n\nTime is up. I will give the answer that follows from what I have.\n</think>\n\n**Answer:** "
THOUGHTS = Reasoning(rl.split_episodes, "</think>", STOP_TEXT, 6)
LINES = Reasoning(functools.partial(str.splitlines, keepends=True), "####", "####", 8)


def forced(task: questions.Task, reasoning: Reasoning) -> list[int]:
    """Returns the tokens of the text that forces an answer."""
    return task.renderer.tokenizer.encode(reasoning.stop_text, add_special_tokens=False)


def in_lines(row: Mapping[str, Any], fields: Mapping[str, str] | None) -> data.Record:
    """Returns the record of a sum of reasoning-gym's chain_sum, worked in lines, with filler lines.

    The prompt of 4 + 1 - 7 is the plain text "4 + 1 - 7 =" with a line end; the completion has the lines
    "4 + 1 = 5", "5 - 7 = -2" and "#### -2". Filler is drawn from a seed that the expression determines.

    Raises:
        DataError: for a row of another source.
    """
    expression = row.get("metadata", {}).get("metadata", {}).get("expression")
    if expression is None:
        raise data.DataError("--preset smollm2 takes only rg:chain_sum as --data.", "schema")
    rng = np.random.default_rng(zlib.crc32(expression.encode()))
    filler = lambda: [FILLER] * min(rng.geometric(1 - FILLED) - 1, 2)
    first, *rest = expression.split()
    total, lines = int(first), filler()
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        now = total + int(sign + term)
        lines += [f"{total} {sign} {term} = {now}", *filler()]
        total = now
    return {
        "question": expression,
        "prompt": f"{expression} =\n",
        "completion": "\n".join([*lines, f"#### {total}"]),
        "answer": str(total),
    }


def grader() -> Verifier:
    """Returns the verifier of `in_lines`: whether the stated number, or else the last one, is right."""
    return lambda text, record: same_answer(text, record["answer"])


def golds(task: questions.Task, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns the tokens of the results behind "####" with their stops, [P, A]; -1 behind them."""
    tokenizer = task.renderer.tokenizer
    ids = [
        [
            *tokenizer.encode(f" {record['answer']}", add_special_tokens=False),
            tokenizer.eos_token_id,
        ]
        for record in records
    ]
    longest = max(map(len, ids))
    return np.array([row + [-1] * (longest - len(row)) for row in ids], np.int32)


def filler(decode: Callable[..., str], batch: Mapping[str, Any]) -> float:
    """Returns the fraction of filler among the lines before the results of a batch's answers."""
    mask = np.asarray(batch["completion_mask"], bool)
    tokens = np.asarray(batch["tokens"])[:, -mask.shape[1] :]
    texts = [decode(ids[seen].tolist()) for ids, seen in zip(tokens, mask, strict=True)]
    lines = [line for text in texts for line in text.partition(LINES.close)[0].splitlines()]
    return lines.count(FILLER) / max(len(lines), 1)


def tuned(task: questions.Task, rank: int, steps: int, seed: int) -> questions.Task:
    """Returns the task with LoRA of its params, trained on worked sums: all methods start from there.

    The model computes in float32 and recomputes nothing: on CPUs bfloat16 is slow, and the answers are short.
    """
    task = task._replace(
        model=task.model.clone(dtype=jnp.float32, remat="none"),
        params=apply_named(task.params, "lora", rank=rank, alpha=2.0 * rank, seed=seed),
    )
    state, _ = questions.fit(
        task, task.params, supervised(task.model.forward), RATE, documents.batches(task, ROWS, seed), ROWS,
        steps=steps, key=jax.random.key(seed),
    )  # fmt: skip
    return task._replace(params=state.params)
