"""Supervised fine-tuning of a language model, with its accuracy before and after.

    python experiments/sft.py                       SmolLM2-135M learns a reasoning-gym task (5 min)
    python experiments/sft.py --data chats.jsonl --max-steps 500
    python experiments/sft.py --model meta-llama/Llama-3.1-8B-Instruct --data chats.jsonl --fsdp -1 \\
        --scan-layers --bfloat16 --remat dots --max-length 4096
    python experiments/sft.py --smoke               seconds, random weights

The output directory gets the adapter in PEFT's format (or the whole model), metrics.jsonl, metrics.json,
a figure, TensorBoard events and checkpoints; --resume continues after an interruption.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

import jax
import tyro

from experiments.cli import cards, choices, flags, held_out, teachers, tower_cache
from experiments.cli import training as shared
from experiments.cli.models import supervised_renderer
from jaxft import data, train
from jaxft.adapters import (
    Name,
    adapt,
    check_same,
    intrinsic,
    intrinsic_apply,
    load_adapter,
    quantised,
    save_intrinsic,
)
from jaxft.keys import stream
from jaxft.models import family_of
from jaxft.objectives import reparametrised, supervised
from jaxft.rewards import Accuracy, measure_accuracy, verifier_for

SMALL = dict(
    data=("rg:chain_sum?size=64&seed=1&max_terms=2",),
    eval_data="rg:chain_sum?size=8&seed=1000000&max_terms=2",
    max_steps=6,
    eval_steps=3,
    max_length=256,
    max_new_tokens=4,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, data and training."""

    # files, rg:TASK, tfds:NAME, hub ids
    data: tuple[str, ...] = (f"{held_out.NEEDLE}&size=2000&seed=1",)
    weights: tuple[float, ...] = ()  # fraction of each source; default: by size
    weights_by: Literal["records", "tokens"] = "records"  # unit of --weights
    # held-out records; None: those of the default task or, with --data, a part of it; "": a part
    eval_data: str | None = None

    adapter: Name | Literal["intrinsic"] = "lora"  # the kind of adapter to train; full: all params
    d: int = 1000  # intrinsic: dimension of the random subspace of the params that trains

    # share of each target's weight that all tokens get alike; evaluation has none
    label_smoothing: float = 0.0
    # weights of the routers' losses in a mixture of experts (docs/models.md); 0: they are only logged
    router_balance: float = 0.0
    router_z: float = 0.0
    # pack several short records into one row; none attends to another; clips have separate rows
    packing: bool = True
    # compute the outputs of a frozen part for images or sounds once for each, and keep them in "memory" or
    # in a directory
    cache_tower: str | None = None
    mask: Literal["completion", "last_turn", "all", "per_message"] = "completion"  # trained tokens
    train_on: str | None = None  # regular expression that restricts --mask, such as "Answer: (.*)"
    # encoder-decoders learn to restore plain texts: T5's spans, or BART's infilling
    denoise: Literal["span", "infill"] | None = None
    # what happens to records longer than --max-length
    too_long: Literal["drop", "truncate", "error"] = "drop"

    max_new_tokens: int = 16  # maximum tokens of the answers to verify
    accuracy: bool = True  # verify answers before and after training, if the data allow it

    distil: teachers.Teacher = teachers.Teacher()
    base: flags.Model = flags.Model()
    kernels: flags.Kernels = flags.Kernels()
    optimisation: flags.Optimisation = flags.Optimisation()
    rows: flags.Rows = flags.Rows()
    columns: flags.Columns = flags.Columns()
    sound: flags.Sound = flags.Sound()
    mesh: flags.Mesh = flags.Mesh()
    output: flags.Output = flags.Output("runs/sft")
    hub: flags.Hub = flags.Hub()
    seed: int = 0  # for the adapter's initial values, the order of records and all other draws
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    if not config.accuracy:
        choices.check_excluded(config, ["max_new_tokens"], "--no-accuracy")
    config = shared.start(config, SMALL)
    choices.check_companions(config, {"weights_by": "weights"})
    tower_cache.check(config)
    teachers.check(config, ("label_smoothing", "router_balance", "router_z"))
    renderer, training, kept, name = load_data(config)
    if config.rows.preview:
        return {"records": sum(map(len, training))}
    output, mesh = shared.place(config)
    teacher = teachers.load(config, renderer, mesh, config.rows.max_length)
    model, base = shared.load_base(config, mesh)
    params = teachers.beside(teacher, adapt_params(config, model, base, mesh))
    read = jax.jit(intrinsic_apply) if config.adapter == "intrinsic" else lambda params: params
    forward = reparametrised(model.forward, read)
    router = shared.router_terms(config, model)
    objective = functools.partial(supervised, router=router, label_smoothing=config.label_smoothing)
    method = shared.method_of(config, teachers.distilled(config, teacher, objective), forward)
    length = config.rows.max_length
    bad = data.BadRecords()
    tokenised = data.render(kept, renderer, length, too_long="truncate", bad=bad)
    held_out.tell_of(bad, len(tokenised), len(kept), "held-out")
    *training, tokenised = tower_cache.cached(config, model, params, [*training, tokenised])
    eval_batches = data.finite_batches(tokenised, **config.rows.sizes)
    batches = data.batches(
        *training,
        **config.rows.sizes,
        weights=_weights(config, training),
        packing=config.packing and not isinstance(renderer, data.SpeechRenderer),
        seed=config.seed,
    )
    before = verify(config, model, base, renderer, kept, f"before on {name}")
    callbacks = shared.callbacks(config, supervised(forward), eval_batches, output, mesh, name)
    donate = config.adapter == "full"  # Nothing reads the base afterwards.
    batches = teachers.scored(config, teacher, batches)
    state, history = shared.fit(
        config, params, method, batches, callbacks, output, mesh, donate=donate
    )
    params = teachers.bare(teacher, state.params)
    save(config, model, params, base, mesh, output)
    after = verify(config, model, read(params), renderer, kept, f"after on {name}")
    return cards.publish(config, report(history, before, after, kept, name, output), output)


def load_data(config: Config):
    """Returns (renderer, tokenised records of each source, held-out records, their name)."""
    renderer = supervised_renderer(config)
    bad, length = data.BadRecords(config.rows.max_bad), config.rows.max_length
    load = lambda spec, **how: data.load(spec, fields=config.columns.of(spec), **how)
    sources = [load(spec, bad=bad) for spec in config.data]
    parts = held_out.with_held_out(config, sources, load, data.whole_prompt)
    held_out.tell_of_columns(config, sources)
    render = functools.partial(data.render, too_long=config.too_long, bad=bad)
    training = [render(records, renderer, length) for records in parts.training]
    held_out.tell_of(bad, sum(map(len, training)), sum(map(len, parts.training)))
    for part in training[0][: 3 if config.rows.preview else 1]:
        print(data.explain(part, renderer.tokenizer, color=False), end="\n\n")
    return renderer, training, parts.held_out, parts.name


def adapt_params(config: Config, model: Any, base: Any, mesh: Any) -> Any:
    """Returns the base params with trainable params: adapters, or all of them."""
    if config.adapter != "intrinsic":
        return shared.adapt_params(config, model, base, mesh)
    # The base is already on the mesh.
    key, layers = stream(jax.random.key(config.seed), "intrinsic"), family_of(model.config).layers
    return shared.announce(intrinsic(key, rounded(config, model, base), config.d, layers=layers))


def rounded(config: Config, model: Any, base: Any) -> Any:
    """Returns the base params of a subspace, quantised if --quantise is set."""
    settings, family = config.kernels, family_of(model.config)
    if settings.quantise is None:
        return base
    rules = {family.targets.pattern(settings.target): quantised(settings.quantise)}
    return adapt(jax.random.key(config.seed), base, rules, stacked=family.stacked_axes)


def verify(config, model, params, renderer, records, when: str) -> Accuracy | None:
    """Prints and returns the accuracy on held-out records; None if they cannot be verified."""
    if not config.accuracy:
        return None
    verifier = verifier_for(records[0]["_source"], records)
    if verifier is None:
        if when.startswith("before"):
            print(
                "accuracy is not measured: there is no verifier for the held-out answers",
                flush=True,
            )
        return None
    length = config.max_new_tokens
    result = measure_accuracy(model, params, renderer, records, verifier, max_new_tokens=length)
    print(f"accuracy {when}: {result}", flush=True)
    return result


def save(
    config: Config, model: Any, params: Any, base: Any, mesh: Any, output: pathlib.Path
) -> None:
    """Saves the trained params in PEFT's or jaxft's format, or the whole model; rereads and compares."""
    if config.adapter != "intrinsic":
        return shared.save(config, model, params, base, mesh, output)
    path = output / "adapter"
    save_intrinsic(path, params)
    loaded = load_adapter(path, model.config, rounded(config, model, base))
    difference = check_same(str(path), model, jax.jit(intrinsic_apply)(params), loaded)
    print(f"adapter saved to {path}; read again: {difference}")


def report(history, before, after, records, name, output) -> dict[str, Any]:
    """Prints sample answers, writes metrics.json and the figure's data, returns the metrics."""
    metrics = shared.losses_of(history, name)
    loss = metrics["eval_loss"]
    metrics["eval_perplexity"] = None if loss is None else math.exp(loss)
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
        print(f"\naccuracy on {name}: {before.rate:.1%} -> {after.rate:.1%}")
    shared.write_metrics(output, metrics)
    return metrics


def _weights(config, training):
    if config.weights and config.weights_by == "tokens":
        return data.token_weights(training, config.weights)
    return config.weights or None


def _question(record) -> str:
    return held_out.question(record, data.as_messages(record))


def _tail(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else "..." + text[-width:]


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
