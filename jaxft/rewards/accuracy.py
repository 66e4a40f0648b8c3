"""Accuracy of a model's answers, by a verifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxft.checkpoints import end_tokens
from jaxft.data import DataError, Renderer, prompt_columns, render_prompts
from jaxft.generation import Beams, SamplingConfig, beam_search, generate, needed_positions
from jaxft.metrics import wilson_interval
from jaxft.models import Decoder
from jaxft.rewards.verifiers import Verifier, mentions_answer


class Accuracy(NamedTuple):
    """A model's answers, and how often they were right."""

    completions: list[str]
    correct: list[bool]  # by the verifier
    mentioned: list[bool]  # the answer occurs somewhere: right except for the format

    @property
    def rate(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def mention_rate(self) -> float:
        """Share of completions in which the answer occurs."""
        return sum(self.mentioned) / len(self.mentioned)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson_interval(sum(self.correct), len(self.correct))

    def __str__(self):
        low, high = self.interval
        return (
            f"{self.rate:.1%} (95 % interval {low:.1%} to {high:.1%}, {len(self.correct)} records; "
            f"answer mentioned in {self.mention_rate:.1%})"
        )


def _prompts(
    model: Decoder, renderer: Renderer, records: Sequence[Mapping[str, Any]], max_new_tokens: int
) -> list[list[int]]:
    """Returns the ids of each record's prompt; DataError names one that leaves no room for the answer."""
    prompts = render_prompts(records, renderer)
    for i, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        length = len(prompt)
        if needed_positions(model, length, max_new_tokens) > model.config.max_length:
            where = record.get("_where", record.get("id", f"record {i}"))
            raise DataError(
                f"{where}: a prompt of {length} tokens and an answer of {max_new_tokens} exceed the model's "
                f"{model.config.max_length} positions; remove the record, or allow shorter answers "
                "(--max-new-tokens).",
                "too_long",
            )
    return prompts


def measure_accuracy(
    model: Decoder,
    params: Any,
    renderer: Renderer,
    records: Sequence[Mapping[str, Any]],
    verifier: Verifier,
    *,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    beams: Beams | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Answers every record greedily, or by beam search, and verifies the answers.

    Args:
        stop_ids: tokens that end an answer; None: `checkpoints.end_tokens`.
        stop_strings: texts that also end an answer; not with beams.
        beams: settings of beam search; None: the likeliest token each time.
        batch_size: prompts at a time, grouped by length to save padding.
        progress: called with (records done, number of records).

    Raises:
        DataError: for a record that has no prompt, or whose prompt and answer exceed the model's positions.
    """
    tokenizer = renderer.tokenizer
    if stop_ids is None:
        stop_ids = end_tokens(tokenizer, model.config, renderer.template)
    config = SamplingConfig(
        max_new_tokens,
        temperature=0.0,
        stop_ids=tuple(stop_ids),
        stop_strings=tuple(stop_strings),
    )
    prompts = _prompts(model, renderer, records, max_new_tokens)
    columns = prompt_columns(renderer, records)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [prompts[i] for i in chosen]
        own = {name: column.rows(chosen) for name, column in columns.items()}
        if beams is None:
            how = dict(tokenizer=tokenizer, columns=own)
            out = generate(model, params, batch, jax.random.key(0), config, **how)
        else:
            out = beam_search(model, params, batch, beams, config, columns=own)
        for i, ids in zip(chosen, out.completions, strict=True):
            completions[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    pairs = list(zip(completions, records, strict=True))
    return Accuracy(
        completions,
        [verifier(completion, record) for completion, record in pairs],
        [mentions_answer(completion, record) for completion, record in pairs],
    )
