"""Held-out loss, perplexity and, if answers can be verified, accuracy of a model and adapter.

$ python experiments/evaluate.py --data held_out.jsonl --adapter runs/sft/adapter
$ python experiments/evaluate.py --data "rg:chain_sum?size=200&seed=9"
$ python experiments/evaluate.py --tasks arc_easy my_task --task-dir tasks --limit 100
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import json
import math
from typing import Any, Literal

import tyro

from experiments.cli import beams, flags, harness, limits
from experiments.cli.held_out import shown, tell_of, tell_of_columns
from experiments.cli.models import check_positions, load_trained, renderer_of, writable_file
from jaxft import data, train
from jaxft.objectives import supervised
from jaxft.output import writing
from jaxft.rewards import measure_accuracy, verifier_for


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model, on which records."""

    data: str | None = None  # file, rg:TASK, tfds:NAME or hub id; or --tasks
    harness: harness.Harness = harness.Harness()
    trained: flags.Trained = flags.Trained()
    columns: flags.Columns = flags.Columns()
    sound: flags.Sound = flags.Sound()
    limit: int | None = None  # use at most this many records, or documents per task; None: all
    # tokens that the loss counts: of the completion, of the last answer, all, or per message
    mask: Literal["completion", "last_turn", "all", "per_message"] = "completion"
    # maximum tokens of a record or context; None: 512, or the model's positions with --tasks
    max_length: int | None = None
    batch_size: int = 4  # rows per forward pass
    max_new_tokens: int = 64  # maximum tokens of an answer to verify
    beams: beams.BeamSearch = beams.BeamSearch()
    output: str | None = None  # JSON file for the metrics and answers; None: none
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Evaluates; prints and returns the metrics."""
    harness.check(limits.check(config))
    beams.check(config)
    if config.harness.tasks:
        return harness.run(config)
    renderer, longest = (
        renderer_of(config.trained, config.sound, mask=config.mask),
        config.max_length or 512,
    )
    output = writable_file(config.output) if config.output else None
    records = data.load(config.data, fields=config.columns.of(config.data), limit=config.limit)
    verifier = verifier_for(records[0]["_source"], records)  # an error now, not after the loss
    bad, what, metrics = data.BadRecords(), shown(config.data), {"records": len(records)}
    tell_of_columns(config, [records])
    tokenised = data.render(records, renderer, longest, bad=bad)
    tell_of(bad, len(tokenised), len(records), "evaluated")
    model, params = load_trained(config.trained)
    check_positions(model, config.trained.model, longest)
    if verifier is not None:  # first, as a prompt may be too long to answer
        how = dict(max_new_tokens=config.max_new_tokens, beams=config.beams.settings)
        result = measure_accuracy(model, params, renderer, records, verifier, **how)
        metrics |= {"accuracy": result.rate, "interval": result.interval}
        metrics["mentioned"] = result.mention_rate
        print(f"accuracy on {len(records)} records of {what}: {result}")
        metrics["answers"] = [
            {"id": r["id"], "completion": c, "correct": ok}
            for r, c, ok in zip(records, result.completions, result.correct, strict=True)
        ]
    batches = data.finite_batches(tokenised, batch_size=config.batch_size, max_length=longest)
    loss = train.evaluate(train.make_eval_step(supervised(model.forward)), params, batches)["loss"]
    metrics |= {"loss": loss, "perplexity": math.exp(loss)}
    on = f"on {len(tokenised)} of {len(records)} records of {what}"
    print(f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f} {on}")
    if output is not None:
        with writing(output):
            output.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
