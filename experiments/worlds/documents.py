"""Rows to train on for the tasks of `questions`: answers, workings and documents of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.worlds.questions import Task, microbatches
from jaxft import data, train
from jaxft.data.batching import padded_row
from jaxft.objectives import supervised
from jaxft.rewards import stated_answer


def worked(
    row: Mapping[str, Any], fields: Mapping[str, str] | None, asked: str = "{}\n\n"
) -> data.Record:
    """Returns the record of a question with its working as plain text, and the final `answer`.

    Args:
        asked: the text of the prompt, with {} for the question.

    Raises:
        DataError: for a row without a working.
    """
    record = data.normalise_question(row, fields)
    said = data.as_messages(record)
    if said is None:
        said = [{"content": record.get(name)} for name in ("prompt", "completion")]
    question, working = (message["content"] for message in said[-2:]) if said[1:] else ("", None)
    if not working:
        raise data.DataError("no working; name its column by --fields answer NAME.", "schema")
    answer = record.get("answer", working)
    return {
        "question": question,
        "prompt": asked.format(question),
        "completion": working,
        "answer": stated_answer(str(answer)) or answer,
    }


def batches(task: Task, batch_size: int, seed: int) -> data.DataIterator:
    """Returns endless packed batches of the questions to train on with the answers of the data."""
    length = task.settings.max_prompt + task.settings.max_new_tokens
    rows = data.render(task.known.records, task.renderer, length)
    return data.batches(rows, batch_size=batch_size, max_length=length, seed=seed)


def lay_out(
    task: Task, records: Sequence[Mapping[str, Any]], texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Rows of the records answered with `texts`, [N, T] each; padded to the longest, or cut at the end."""
    length = task.settings.max_prompt + task.settings.max_new_tokens
    made = [data.answered(*pair) for pair in zip(records, texts, strict=True)]
    parts = data.render(made, task.renderer, length, too_long="truncate")
    if len(parts) != len(made):
        raise data.DataError(f"{len(made) - len(parts)} of {len(made)} answers are empty.")
    width = max(len(part.tokens) for part in parts)
    rows = [padded_row([part], width) for part in parts]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def pretrained(
    task: Task,
    sources: Sequence[tuple[str, Mapping[str, str]]],
    shares: Sequence[float],
    form: Callable[..., data.Record],
    *,
    rows: int,
    steps: int,
    seed: int,
) -> Task:
    """Returns the task with params trained from random ones on documents of up to 2048 tokens.

    AdamW, learning rate 1e-3 with warm-up over a tenth of the steps and a cosine, decay 0.1.

    Args:
        task: its model gives the architecture, the tokenizer and the mesh.
        sources: pairs of a source and its columns, as for `data.load`.
        shares: fraction of the documents from each source.
        form: function from a row to a record.
        rows: rows per step.
    """
    length = min(2048, task.model.config.max_length)
    renderer = data.Renderer(task.renderer.tokenizer, mask="all")
    parts = [
        data.render(data.load(spec, fields=fields, form=form), renderer, length)
        for spec, fields in sources
    ]
    documents = data.batches(
        *parts,
        batch_size=rows,
        max_length=length,
        weights=shares,
        packing="concat_split",
        seed=seed,
    )
    init = lambda key: task.model.init(key, task.model.example_input())["params"]
    places = jax.tree.map(lambda x: x.sharding, task.params)
    state, history = train.fit(
        jax.jit(init, out_shardings=places)(jax.random.key(seed)),
        supervised(task.model.forward),
        train.make_optimizer(1e-3, total_steps=steps, warmup_ratio=0.1, weight_decay=0.1),
        documents,
        steps=steps,
        key=jax.random.key(seed),
        mesh=task.mesh,
        microbatches=microbatches(task, rows),
        callbacks=[train.progress(steps=100)],
        donate=True,
    )
    print(f"pretrained: loss {history[-1]['loss']:.3f} nats per token", flush=True)
    return task._replace(params=state.params)
