"""Supervised fine-tuning of a language model, with its accuracy before and after.

    python experiments/sft.py                       SmolLM2-135M learns a reasoning-gym task (5 min)
    python experiments/sft.py --data chats.jsonl --max-steps 500
    python experiments/sft.py --model meta-llama/Llama-3.1-8B-Instruct --data chats.jsonl --fsdp -1 \\
        --scan-layers --bfloat16 --remat dots --max-length 4096
    python experiments/sft.py --smoke               seconds, random weights

The output directory gets the adapter in PEFT's format (or the whole model), metrics.jsonl, metrics.json,
a figure, TensorBoard events and checkpoints; --resume goes on after an interruption.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any, Literal

import jax
import tyro

from experiments.cli import training as shared
from experiments.cli.optimizers import sharpen
from jaxft import checkpoints as files
from jaxft import data, train
from jaxft.adapters import (
    Name,
    check_same,
    intrinsic,
    intrinsic_apply,
    load_adapter,
    save_intrinsic,
)
from jaxft.keys import stream
from jaxft.objectives import reparametrised, supervised
from jaxft.rewards import Accuracy, measure_accuracy, verifier_for

# reasoning-gym draws entry i from seed + i: the seeds below are further apart than the sizes.
NEEDLE = "rg:needle_haystack?min_num_statements=4&max_num_statements=8"


@dataclasses.dataclass(frozen=True)
class Config(shared.Training):
    """What to train, on what, and how."""

    data: tuple[str, ...] = (f"{NEEDLE}&size=2000&seed=1",)  # files, rg:TASK, tfds:NAME, hub ids
    weights: tuple[float, ...] = ()  # share of each source; default: by size
    weights_by: Literal["records", "tokens"] = "records"  # of what they are shares
    eval_data: str = f"{NEEDLE}&size=100&seed=1000000"  # "": hold out a part of the data
    output_dir: str = "runs/sft"

    adapter: Name | Literal["intrinsic"] = "lora"  # what trains; full: everything
    d: int = 1000  # intrinsic: numbers that train, moving all params in a random subspace

    packing: bool = True
    mask: Literal["completion", "last_turn", "all", "per_message"] = "completion"  # what trains
    train_on: str | None = None  # regular expression that narrows it, such as "Answer: (.*)"
    too_long: Literal["drop", "truncate", "error"] = "drop"

    max_new_tokens: int = 16  # of the answers that are verified
    accuracy: bool = True  # verify answers before and after, where the data can be verified


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = _smoke(config) if config.smoke else config
    shared.start(config)
    renderer, training, held_out = load_data(config)
    if config.preview:
        return {"records": len(training)}
    output = pathlib.Path(config.output_dir)
    shared.check_output(config, output)
    mesh = shared.mesh_of(config)
    model, base = shared.load_base(config, mesh)
    params = adapt_params(config, base, mesh)
    read = jax.jit(intrinsic_apply) if config.adapter == "intrinsic" else lambda params: params
    forward = reparametrised(model.forward, read)
    optimizer = shared.make_optimizer(config)
    method = sharpen(config.sharpness, supervised, forward, optimizer, config.rho)
    tokenised = data.render(held_out, renderer, config.max_length, too_long="truncate")
    eval_batches = data.finite_batches(
        tokenised, batch_size=config.batch_size, max_length=config.max_length
    )
    batches = data.batches(
        *training,
        batch_size=config.batch_size,
        max_length=config.max_length,
        weights=_weights(config, training),
        packing=config.packing,
        seed=config.seed,
    )
    before = verify(config, model, base, renderer, held_out, "before")
    state, history = train.fit(
        params,
        method.objective,
        method.optimizer,
        batches,
        steps=config.max_steps,
        key=jax.random.key(config.seed),
        gradient=method.gradient,
        extra_args=method.extra_args,
        microbatches=config.gradient_accumulation_steps,
        mesh=mesh,
        callbacks=shared.callbacks(config, supervised(forward), eval_batches, output, mesh),
        checkpoints=shared.checkpoints(config, output, best="eval/loss"),
        donate=config.adapter == "full",  # Nothing reads the base afterwards.
    )
    save(config, model, state.params, base, mesh, output)
    after = verify(config, model, read(state.params), renderer, held_out, "after")
    return report(config, history, before, after, held_out, output)


def load_data(config: Config):
    """(renderer, tokenised records of each source, held-out records)."""
    renderer = data.Renderer(
        files.load_tokenizer(config.model),
        template=config.template,
        mask=config.mask,
        train_on=config.train_on,
    )
    bad = data.BadRecords(config.max_bad)
    sources = [data.load(spec, bad=bad) for spec in config.data]
    if config.eval_data:
        held_out = data.load(config.eval_data)
    else:
        pairs = [data.split(records, config.validation) for records in sources]
        sources, held_out = [pair[0] for pair in pairs], [r for pair in pairs for r in pair[1]]
        if not held_out:
            raise data.DataError("no record is held out; raise --validation or give --eval-data.")
    known = {_question(record) for records in sources for record in records}
    held_out = shared.without_known(held_out, known, _question)
    training = [
        data.render(records, renderer, config.max_length, too_long=config.too_long, bad=bad)
        for records in sources
    ]
    if bad.summary():
        print(f"records left out or cut: {bad.summary()}")
    examples = 3 if config.preview else 1
    for part in training[0][:examples]:
        print(data.explain(part, renderer.tokenizer, color=False), end="\n\n")
    return renderer, training, held_out


def adapt_params(config: Config, base: Any, mesh: Any) -> Any:
    """The base params with what trains: adapters, or all of them."""
    if config.adapter != "intrinsic":
        return shared.adapt_params(config, base, mesh)
    if config.quantise:
        raise ValueError("--adapter intrinsic moves the kernels themselves; drop --quantise.")
    # The base lies on the mesh already.
    return shared.announce(
        intrinsic(stream(jax.random.key(config.seed), "intrinsic"), base, config.d)
    )


def verify(config, model, params, renderer, records, when: str) -> Accuracy | None:
    """The accuracy on held-out records, printed, or None if they cannot be verified."""
    verifier = verifier_for(records[0]["source"], records)
    if verifier is None or not config.accuracy:
        return None
    result = measure_accuracy(
        model, params, renderer, records, verifier, max_new_tokens=config.max_new_tokens
    )
    print(f"accuracy {when}: {result}", flush=True)
    return result


def save(
    config: Config, model: Any, params: Any, base: Any, mesh: Any, output: pathlib.Path
) -> None:
    """What trained, read again and compared: PEFT's files, jaxft's own, or the whole model."""
    if config.adapter != "intrinsic":
        return shared.save(config, model, params, base, mesh, output)
    path = output / "adapter"
    save_intrinsic(path, params)
    loaded = load_adapter(path, model.config, base)
    difference = check_same(str(path), model, jax.jit(intrinsic_apply)(params), loaded)
    print(f"adapter saved to {path}; read again: {difference}")


def report(config, history, before, after, records, output) -> dict[str, Any]:
    """Prints sample answers, writes metrics.json and the figure's data, returns the metrics."""
    losses = [row["eval/loss"] for row in history if "eval/loss" in row]
    metrics = {
        "steps": history[-1]["step"],
        "first_loss": history[0]["loss"],
        "last_loss": history[-1]["loss"],
        "eval_loss": losses[-1] if losses else None,
        "eval_perplexity": math.exp(losses[-1]) if losses else None,
    }
    if before is not None:
        for when, result in (("before", before), ("after", after)):
            metrics[f"accuracy_{when}"] = result.rate
            metrics[f"accuracy_{when}_interval"] = result.interval
            metrics[f"mentioned_{when}"] = result.mention_rate
        for i in range(min(3, len(records))):
            print(f"\n  question  {_tail(_question(records[i]))}")
            print(f"  answer    {data.as_messages(records[i])[-1]['content']}")
            print(f"  before    {_tail(before.completions[i])}")
            print(f"  after     {_tail(after.completions[i])}")
        print(
            f"\naccuracy on {len(records)} held-out records: {before.rate:.1%} -> {after.rate:.1%}"
        )
    shared.write_metrics(output, metrics)
    return metrics


def _weights(config, training):
    if config.weights and config.weights_by == "tokens":
        return data.token_weights(training, config.weights)
    return config.weights or None


def _smoke(config):
    small = dict(
        model="tiny",
        data=("rg:chain_sum?size=64&seed=1&max_terms=2",),
        eval_data="rg:chain_sum?size=8&seed=1000000&max_terms=2",
        max_steps=6,
        eval_steps=3,
        max_length=256,
        max_new_tokens=4,
        rank=2,
        alpha=4.0,
    )
    return shared.with_small(config, small)


def _question(record) -> str:
    return shared.question(record, data.as_messages(record))


def _tail(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else "..." + text[-width:]


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
