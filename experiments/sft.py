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
import json
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from experiments._optimizers import Optimizer, Sharpness, optimizer_rule, sharpen
from jaxft import checkpoints as files
from jaxft import data, train
from jaxft.adapters import (
    ALL_LINEAR,
    AdapterError,
    Name,
    Quantisation,
    adapter_tensors,
    apply_named,
    check_same,
    count,
    intrinsic,
    intrinsic_apply,
    load_adapter,
    rounding_loss,
    save_checked,
    save_intrinsic,
)
from jaxft.models.remat import Remat
from jaxft.objectives import decoder_logits, reparametrised, supervised
from jaxft.parallel import connect_hosts, make_mesh, shard_params
from jaxft.rl import Accuracy, measure_accuracy, verifier_for

# reasoning-gym draws entry i from seed + i: the seeds below are further apart than the sizes.
NEEDLE = "rg:needle_haystack?min_num_statements=4&max_num_statements=8"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to train, on what, and how."""

    model: str = "smollm2"  # directory, .gguf file, "smollm2", "tiny" (random), or hub id
    data: tuple[str, ...] = (f"{NEEDLE}&size=2000&seed=1",)  # files, rg:TASK, tfds:NAME, hub ids
    weights: tuple[float, ...] = ()  # share of each source; default: by size
    weights_by: Literal["records", "tokens"] = "records"  # of what they are shares
    eval_data: str = f"{NEEDLE}&size=100&seed=1000000"  # "": hold out a part of the data
    validation: float = 0.05  # the part held out, if there is no eval_data
    output_dir: str = "runs/sft"

    adapter: Name | Literal["intrinsic"] = "lora"  # what trains; full: everything
    d: int = 1000  # intrinsic: numbers that train, moving all params in a random subspace
    quantise: Quantisation | None = None  # round the frozen kernels (nf4: QLoRA, QPaCA, QDoRA)
    rank: int = 16
    alpha: float = 32.0  # over rank: LoRA's scale; for paca a factor of the learning rate
    target: str = ALL_LINEAR  # pattern of the paths of adapted kernels

    max_steps: int = 60
    batch_size: int = 2  # rows of one step, over all devices and accumulation steps
    gradient_accumulation_steps: int = 1
    max_length: int = 384  # tokens of a row
    packing: bool = True
    learning_rate: float = 1e-3
    optimizer: Optimizer = (
        "adamw"  # lion: learning rate 3 to 10 times smaller, decay as much larger
    )
    sharpness: Sharpness = (
        "none"  # sam... : flatter minima for about twice the time (look_sam: 1.2 times)
    )
    rho: float | None = None  # its radius; default: the method's own
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0

    mask: Literal["completion", "last_turn", "all", "per_message"] = "completion"  # what trains
    train_on: str | None = None  # regular expression that narrows it, such as "Answer: (.*)"
    template: str | None = (
        None  # chat template that replaces the model's: a file, or chatml, llama3, gemma...
    )
    too_long: Literal["drop", "truncate", "error"] = "drop"
    max_bad: float = 0.0  # largest share of unusable records that is skipped rather than an error

    data_axis: int = 1  # mesh: copies of the model; -1 fills
    fsdp: int = 1  # mesh: shards of the params and the batch; -1 fills
    tensor: int = 1  # mesh: shards of each projection
    distributed: bool = (
        False  # one of several hosts (Cloud TPU slices, Kubernetes); see TPU_SETUP.md
    )
    bfloat16: bool = False  # compute in bfloat16; what trains stays float32
    scan_layers: bool = False  # stack layers: compile time independent of depth
    remat: Remat = "none"  # recompute in the backward pass: lean, dots or full save memory

    eval_steps: int = 20
    save_steps: int = 100
    logging_steps: int = 5
    max_new_tokens: int = 16  # of the answers that are verified
    accuracy: bool = True  # verify answers before and after, where the data can be verified
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    profile_dir: str | None = None  # trace of a few steps
    resume: bool = False
    preview: bool = False  # print examples with what trains marked, then stop
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = _smoke(config) if config.smoke else config
    connect_hosts(config.distributed)
    train.keep_memory_warm()
    renderer, training, held_out = load_data(config)
    if config.preview:
        return {"records": len(training)}
    output = pathlib.Path(config.output_dir)
    _check_output(config, output)
    mesh = _mesh(config)
    model, base = files.load_model(config.model, mesh=mesh, scan_layers=config.scan_layers)
    model = model.clone(dtype=jnp.bfloat16 if config.bfloat16 else jnp.float32, remat=config.remat)
    _check_length(config, model)
    params = adapt_params(config, base, mesh)
    optimizer = train.make_optimizer(
        config.learning_rate,
        total_steps=config.max_steps,
        schedule=getattr(train, config.schedule),
        warmup_ratio=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        rule=optimizer_rule(config.optimizer),
    )
    read = jax.jit(intrinsic_apply) if config.adapter == "intrinsic" else lambda params: params
    objective, logits = reparametrised(supervised(model), read), decoder_logits(model)
    method = sharpen(
        config.sharpness,
        objective,
        optimizer,
        lambda params, *rest, **noise: logits(read(params), *rest, **noise),
        config.rho,
    )
    tokenised = data.render(held_out, renderer, config.max_length, too_long="truncate")
    eval_batches = data.finite_batches(
        tokenised, batch_size=config.batch_size, max_length=config.max_length
    )
    batches = data.batches(
        *training,
        batch_size=config.batch_size // jax.process_count(),
        max_length=config.max_length,
        weights=_weights(config, training),
        packing=config.packing,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
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
        callbacks=_callbacks(config, objective, eval_batches, output, mesh),
        checkpoints=train.Checkpoints(
            output / "checkpoints",
            every=config.save_steps,
            best="eval/loss",
            resume=config.resume,
        ),
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
    # A held-out question that is also trained on would measure memory.
    known = {_question(record) for records in sources for record in records}
    held_out = [record for record in held_out if _question(record) not in known]
    if not held_out:
        raise data.DataError("every held-out record is also in the training data.")
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
    if config.adapter == "intrinsic":
        if config.quantise:
            raise ValueError("--adapter intrinsic moves the kernels themselves; drop --quantise.")
        params, mesh = (
            intrinsic(jax.random.key(config.seed), base, config.d),
            None,
        )  # base lies on it
    else:
        params = apply_named(base, config.adapter, **_adapter_settings(config))
    trains, total = count(params)
    print(f"{trains:,} of {total:,} parameters train ({trains / total:.2%})")
    return params if mesh is None else shard_params(params, mesh)


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
    if config.adapter == "full":
        path = output / "model"
        difference = files.save_merged(path, model, params, tokenizer_from=config.model, mesh=mesh)
        print(f"model saved to {path}; read again: {difference}")
        return
    path, native = output / "adapter", None
    if config.adapter == "intrinsic":
        save_intrinsic(path, params)
        loaded = load_adapter(path, model.config, base)
        difference = check_same(str(path), model, jax.jit(intrinsic_apply)(params), loaded)
        print(f"adapter saved to {path}; read again: {difference}")
        return
    try:
        adapter_tensors(model.config, params)
    except AdapterError as error:
        print(f"jaxft's own format: {error}")
        native = {"name": config.adapter, **_adapter_settings(config)}
    difference = save_checked(path, model, params, base, base_model=config.model, native=native)
    print(f"adapter saved to {path}; read again: {difference}")
    if (lost := rounding_loss(params, base)) is not None:
        print(
            f"{config.quantise} took up to {lost:.1%} of a kernel, and the adapter trained with that; "
            "PEFT's files do not say so: quantise the base alike where you use it."
        )


def _adapter_settings(config):
    names = ("rank", "alpha", "target", "quantise", "seed")
    return {name: getattr(config, name) for name in names}


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
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"metrics and figure in {output}")
    return metrics


def _callbacks(config, objective, eval_batches, output, mesh):
    callbacks = [
        train.evaluation(objective, eval_batches, steps=config.eval_steps, mesh=mesh),
        train.progress(steps=config.logging_steps),
        train.jsonl_log(output / "metrics.jsonl"),
        train.run_figure(output / "training.png", title=f"{config.model}, {config.adapter}"),
    ]
    if "tensorboard" in config.report_to:
        callbacks.append(train.tensorboard_log(output / "tensorboard"))
    if "wandb" in config.report_to:
        settings = dataclasses.asdict(config)
        callbacks.append(train.wandb_log("jaxft", name=output.name, config=settings))
    if config.profile_dir:
        callbacks.append(train.profile(config.profile_dir))
    return callbacks


def _weights(config, training):
    if config.weights and config.weights_by == "tokens":
        return data.token_weights(training, config.weights)
    return config.weights or None


def _mesh(config):
    sizes = (config.data_axis, config.fsdp, config.tensor)
    if sizes == (1, 1, 1) and jax.device_count() == 1:
        return None
    if sizes == (1, 1, 1):
        return make_mesh(devices=jax.devices()[:1]) if jax.process_count() == 1 else make_mesh()
    return make_mesh(data=config.data_axis, fsdp=config.fsdp, tensor=config.tensor)


def _check_output(config, output):
    """Before the model is loaded: fit itself would find out minutes later."""
    train.writable_directory(output)
    if not config.resume and any((output / "checkpoints").glob("[0-9]*")):
        raise train.OutputError(
            f"{output} holds an earlier run; go on with --resume, or choose another --output-dir."
        )


def _check_length(config, model):
    if config.max_length > model.config.max_length:
        raise ValueError(
            f"--max-length {config.max_length} is more than the {model.config.max_length} positions "
            f"of {config.model}."
        )
    parts = config.gradient_accumulation_steps * jax.process_count()
    if parts < 1 or config.batch_size < 1 or config.batch_size % parts:
        raise ValueError(
            f"--batch-size {config.batch_size} must be a positive multiple of --gradient-accumulation-steps "
            f"({config.gradient_accumulation_steps}) times the {jax.process_count()} processes."
        )


def _smoke(config):
    chosen = {field.name for field in dataclasses.fields(Config)}
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
    default = Config()
    keep = {n for n in chosen if getattr(config, n) != getattr(default, n)}
    return dataclasses.replace(config, **{n: v for n, v in small.items() if n not in keep})


def _question(record) -> str:
    messages = data.as_messages(record)
    if messages is None:
        return record.get("prompt") or record.get("text") or str(record.get("tokens"))
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


def _tail(text: str, width: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else "..." + text[-width:]


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
