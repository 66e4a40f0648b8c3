r"""Preference pairs of a model's own answers: samples several per question, scores them, pairs the extremes.

    python experiments/sample_pairs.py --data rg:chain_sum?size=1000\&seed=1 --output pairs.jsonl
    python experiments/sample_pairs.py --data questions.jsonl --judge judge.py:score
    python experiments/sample_pairs.py --data questions.jsonl --reward-model runs/reward/adapter
    python experiments/preference.py --data pairs.jsonl --loss dpo

Answers are scored by the data's verifier (reasoning-gym tasks, records with an `answer`), by a function of
your own, score(completion, record) -> a number or None, or by a reward model of preference.py. Answers
without a score, without an end (--keep-truncated keeps these) or without text are excluded and counted; so
are questions whose answers have equal scores.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import collections
import dataclasses
import json
import math
import os
from typing import Any

import jax
import rich.console
import rich.progress
import tyro

from experiments.cli import flags, limits
from experiments.cli import rewards as rewards_cli
from experiments.cli.held_out import NEEDLE
from experiments.cli.models import load_trained, renderer_of, stop_ids, writable_file
from jaxft import data, train
from jaxft.generation import Generation, generate
from jaxft.keys import stream
from jaxft.output import writing

SMALL = dict(
    model="tiny",
    data="rg:chain_sum?size=8&seed=1&max_terms=2",
    max_new_tokens=4,
    samples=2,
    workers=1,
    keep_truncated=True,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, questions and scoring."""

    data: str = f"{NEEDLE}&size=1000&seed=1"  # file, rg:TASK, tfds:NAME or hub id
    trained: flags.Trained = flags.Trained()
    columns: flags.Columns = flags.Columns()
    output: str = "pairs.jsonl"  # file for the pairs
    limit: int | None = None  # use at most this many questions; None: all
    samples: int = 4  # answers to each question
    min_gap: float = 1e-8  # two answers give a pair only if their scores differ by more
    all_pairs: bool = False  # pair every two answers whose scores differ, not only best and worst

    rewards: flags.Rewards = flags.Rewards()
    sampling: flags.Sampling = flags.Sampling()
    keep_truncated: bool = False  # also use answers that reach --max-new-tokens
    batch_size: int = 8  # questions at a time
    seed: int = 0  # seed of the sampling
    smoke: bool = False  # a random tiny model, a few questions
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Writes the pairs; returns counts of pairs, and of answers and questions without one."""
    limits.check(config)
    if config.smoke:
        config = flags.with_small(config, rewards_cli.small(config.rewards, SMALL))
    if config.samples < 2 or config.batch_size < 1 or config.sampling.temperature <= 0:
        raise ValueError(
            f"--samples must be at least 2, --batch-size 1 and --temperature above 0; got {config.samples}, "
            f"{config.batch_size} and {config.sampling.temperature}."
        )
    output = writable_file(config.output)
    how = {"fields": config.columns.of(config.data), "form": data.normalise_question}
    records = data.load(config.data, limit=config.limit, **how)
    rewards_cli.check(config.rewards, {config.data: records})
    renderer = renderer_of(config.trained)
    tokenizer = renderer.tokenizer
    config.sampling.rules(tokenizer)  # an error before the model is loaded
    model, params = load_trained(config.trained)
    settings = config.sampling.rules(tokenizer, stop_ids(renderer, model))
    prompts = data.render_prompts(records, renderer)
    columns = data.prompt_columns(renderer, records)
    # Batch questions of similar length, to save padding.
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    chunks = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    counts, part = collections.Counter(questions=len(records)), f"{output}.part"
    console = rich.console.Console(stderr=True)
    with (
        rewards_cli.opened(config.rewards, config.trained, records) as rewards,
        open(part, "w") as file,
    ):
        for number, chunk in enumerate(rich.progress.track(chunks, "sampling", console=console)):
            key = stream(jax.random.key(config.seed), "sample", number)
            asked = [prompts[i] for i in chunk]
            own = {name: column.rows(chunk) for name, column in columns.items()}
            how = dict(samples=config.samples, tokenizer=tokenizer, columns=own)
            out = generate(model, params, asked, key, settings, **how)
            found = judged(config, rewards, tokenizer, [records[i] for i in chunk], out)
            counts.update(pairs=len(found.pairs), unscored=found.unscored)
            counts.update(undecided=found.undecided)
            with writing(part):
                file.writelines(json.dumps(data.json_row(pair)) + "\n" for pair in found.pairs)
                file.flush()
    if not counts["pairs"] and not config.smoke:
        os.remove(part)
        raise data.DataError(
            f"no pairs, so {output} is not written: {counts['unscored']} of {len(records) * config.samples} "
            "answers had no score (no end, see --max-new-tokens and --keep-truncated; no text; no verdict), "
            "and the other answers to a question had equal scores."
        )
    os.replace(part, output)
    print(
        f"{counts['pairs']} pairs of {counts['questions']} questions in {output}; {counts['undecided']} "
        f"questions gave none, {counts['unscored']} of {len(records) * config.samples} answers had no score"
    )
    return {name: counts[name] for name in ("questions", "pairs", "undecided", "unscored")}


def judged(
    config: Config, rewards: Any, tokenizer: Any, records: list[dict[str, Any]], out: Generation
) -> data.Judged:
    """Scores sampled answers to a batch of questions, and pairs them."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in out.completions]
    asked = [record for record in records for _ in range(config.samples)]
    whole = [finish != "length" or config.keep_truncated for finish in out.finish]
    scores = [
        float(score) if text and fine and score is not None else math.nan
        for score, text, fine in zip(rewards(texts, asked), texts, whole, strict=True)
    ]
    groups = lambda x: [x[i : i + config.samples] for i in range(0, len(x), config.samples)]
    ranked = []
    for record, answers in zip(records, groups(texts), strict=True):
        made = [data.answered(record, text) for text in answers]
        kept = {name: record[name] for name in ("id", *data.CONTEXT) if name in record}
        responses = [one["completion"] for one in made]
        ranked.append({**kept, "prompt": made[0]["prompt"], "responses": responses})
    choose = data.all_pairs if config.all_pairs else data.best_worst
    return data.judge_pairs(ranked, groups(scores), min_gap=config.min_gap, choose=choose)


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
