"""Preference optimisation of a language model: DPO and its relatives, KTO and BCO; and reward models.

    python experiments/preference.py --data pairs.jsonl --loss dpo
    python experiments/preference.py --data labelled.jsonl --loss kto
    python experiments/preference.py --model meta-llama/Llama-3.1-8B-Instruct --fsdp -1 --bfloat16 \\
        --data trl-lib/ultrafeedback_binarized --loss simpo --learning-rate 1e-6 --adapter full
    python experiments/preference.py --data pairs.jsonl --loss hypo      DPO with a KL on its own answers
    python experiments/preference.py --data pairs.jsonl --loss reward    a reward model
    python experiments/preference.py --smoke        seconds, random weights

Pairs have the columns prompt, chosen and rejected; kto, bco and outcome take prompt, completion and label, or
pairs; process takes prompt, completions (steps) and labels. A reasoning-gym task (rg:TASK) gives pairs of a
correct answer and that of another question. The reference is the model before training; its log-probs
are computed once. A reward model is a sequence classifier with one label: its head is `score` in the
adapter's files, or the model's. The output directory gets the adapter, metrics, a figure and checkpoints;
--resume continues a run.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments.cli import cards, flags
from experiments.cli import preference_report as reports
from experiments.cli import training as shared
from experiments.cli.held_out import NEEDLE
from experiments.cli.models import stop_ids
from experiments.cli.preference_data import load_data
from experiments.cli.preference_losses import LOSSES, DivergenceName, Loss, objective_of
from jaxft import data, rl, train
from jaxft.adapters import Name
from jaxft.generation import SamplingConfig
from jaxft.keys import stream
from jaxft.rewards import add_reward_head

TASK = "rg:chain_sum?max_terms=2&min_digits=1&max_digits=1"
SMALL = {"data": (f"{TASK}&size=24&seed=1",), "eval_data": f"{TASK}&size=8&seed=1000000"}
SMALL |= {"max_steps": 6, "eval_steps": 3, "max_length": 256, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, preference data, loss and training."""

    data: tuple[str, ...] = (f"{NEEDLE}&size=1000&seed=1",)  # files, hub ids, rg:TASK
    # held-out records; None: those of the default task or, with --data, a part of it; "": a part
    eval_data: str | None = None
    adapter: Name = "lora"  # the kind of adapter to train; full: all params

    # for pairs, labelled completions (kto, bco, outcome) or steps (process); reward: a reward model
    loss: Loss = "dpo"
    beta: float | None = None  # weight of the KL to the reference; None: the loss's own
    # fraction of wrong labels: dpo, robust, exo, aot, simpo, cpo
    label_smoothing: float | None = None
    simpo_gamma: float = 0.5  # target margin of simpo and alpha_po
    alpha_length: float = 0.05  # length_regularised: reward per token of length
    # below 1: tokens beyond the length of the pair's shorter completion count less (LD-DPO)
    ld_alpha: float = 1.0
    f_divergence: DivergenceName = "reverse_kl"  # divergence from the reference, of losses of Δ
    f_alpha: float = 0.5  # α of the alpha divergence; 1 is the reverse KL
    nll_alpha: float = 0.0  # weight of the chosen completion's own likelihood (RPO; cpo: 1 more)
    use_weighting: bool = False  # weight pairs by their likelihood under the policy (WPO)
    # orpo: the likelihood includes the prompt, as in the authors' code
    nll_on_prompt: bool = False
    # steps between updates of the reference towards the policy (TR-DPO: 512); None: never
    ref_model_sync_steps: int | None = None
    ref_model_mixup_alpha: float = 0.6  # weight of the policy in such an update; 1: replace
    # bco: "minilm" or another model, whose embeddings of prompts give density ratios (UDM)
    prompt_embedder: str | None = None
    min_density_ratio: float = 0.5  # bco: lower limit of the density ratios
    max_density_ratio: float = 10.0  # bco: upper limit of the density ratios
    desirable_weight: float = 1.0  # kto: weight of desirable completions
    undesirable_weight: float = 1.0  # kto: weight of undesirable completions
    kl_weight: float = 0.1  # hypo: weight of the KL on the policy's own answers, in nats per answer
    online_samples: int = 2  # hypo: answers to each of --batch-size prompts per step
    max_new_tokens: int = 64  # hypo: maximum tokens of these answers
    # reward: penalty that keeps rewards near 0 (0.01 is usual)
    center_rewards_coefficient: float = 0.0

    # what happens to records longer than --max-length
    too_long: Literal["drop", "truncate", "truncate_left_prompt", "error"] = "drop"

    base: flags.Model = flags.Model()
    kernels: flags.Kernels = flags.Kernels()
    optimisation: flags.Optimisation = flags.Optimisation(learning_rate=1e-4)
    rows: flags.Rows = flags.Rows()
    columns: flags.Columns = flags.Columns()
    mesh: flags.Mesh = flags.Mesh()
    output: flags.Output = flags.Output("runs/preference")
    hub: flags.Hub = flags.Hub()
    seed: int = 0  # for the adapter's initial values, the order of records and all other draws
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = shared.start(config, SMALL)
    make_objective, entry = objective_of(config), LOSSES[config.loss]
    training, held_out, name = load_data(config)
    if config.rows.preview:
        return {"records": len(training)}
    output, mesh = shared.place(config)
    # HyPO scores its samples with the initial model; other losses score their rows before training.
    model, base = shared.load_base(config, mesh, keeps_start=entry.online)
    params = shared.adapt_params(config, model, base, mesh)
    if entry.trains == "reward":
        key = stream(jax.random.key(config.seed), "reward head")
        params = add_reward_head(key, params, model.config.hidden_size)
    method = shared.method_of(config, make_objective, model.forward)
    score = functools.partial(
        train.reference_log_probs,
        model.forward,
        **config.rows.sizes,
        mesh=mesh,
        ld_alpha=config.ld_alpha,
    )
    bare_held_out = held_out
    if entry.trains == "policy":
        held_out = score(
            params, held_out
        )  # Gains are reported also for losses without a reference.
    if entry.trains == "policy" and entry.reference and config.ref_model_sync_steps is None:
        training = score(params, training)
    eval_batches = data.finite_group_batches(
        held_out if entry.reference else bare_held_out, **config.rows.sizes
    )
    batches = data.group_batches(training, **config.rows.sizes, seed=config.seed)
    if entry.online:
        make_objective = objective_of(dataclasses.replace(config, kl_weight=0.0))  # For evaluation.
        batches = with_samples(config, model, params, training, batches, mesh)
    evaluated, books = make_objective(model.forward), books_of(config, model)
    callbacks = shared.callbacks(config, evaluated, eval_batches, output, mesh, name)
    donate = config.adapter == "full" and not entry.online
    state, history = shared.fit(
        config, params, method, batches, callbacks, output, mesh, books=books, donate=donate
    )
    shared.save(config, model, state.params, base, mesh, output)
    metrics = shared.losses_of(history, name)
    print(f"\non {name}:")
    if entry.trains == "reward":
        rewards = reports.read_rewards(config, model, state.params, held_out, mesh)
        metrics |= reward_report(config, rewards, held_out)
    else:
        table = lambda groups: np.stack([group.columns["ref_log_probs"] for group in groups])
        tell = reports.label_report if entry.records == "labels" else reports.pair_report
        after = score(state.params, bare_held_out)
        metrics |= tell(table(after), table(held_out), held_out)
    if entry.online:
        kls = [row["kl"] for row in history[-max(1, len(history) // 10) :] if "kl" in row]
        metrics["kl"] = float(np.mean(kls)) if kls else None
        print(f"KL from the start, on the policy's own last answers: {metrics['kl']} nats")
    shared.write_metrics(output, metrics)
    return cards.publish(config, metrics, output)


def with_samples(config: Config, model, params, training, batches, mesh):
    """Returns HyPO's batches: pairs with fresh answers of the policy to the training prompts."""
    first = [group.parts[0] for group in training]
    prompts = [part.tokens[: int(np.argmax(part.loss_mask > 0))].tolist() for part in first]
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with --max-new-tokens {config.max_new_tokens} that "
            f"exceeds the {model.config.max_length} positions of {config.base.model}."
        )
    tokenizer = shared.files.load_tokenizer(config.base.model)
    ends = stop_ids(data.Renderer(tokenizer, template=config.base.template), model)
    return rl.SamplesBeside(
        batches,
        model,
        rl.Prompts(
            prompts,
            config.rows.batch_size,
            columns=data.late_columns([part.media for part in first]),
            seed=config.seed,
        ),
        params,
        SamplingConfig(config.max_new_tokens, stop_ids=ends),
        samples=config.online_samples,
        mesh=mesh,
    )


def books_of(config: Config, model) -> dict[str, train.Book]:
    """Returns the books of the loss: a moving reference and BCO's running mean of rewards."""
    books = {}
    if config.ref_model_sync_steps is not None:
        settings = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        books["reference"] = train.moving_reference(
            model.forward, *settings, ld_alpha=config.ld_alpha
        )
    if config.loss == "bco":
        books["rewards"] = train.running_mean("rewards/mean")
    return books


def reward_report(config: Config, rewards: np.ndarray, groups: list) -> dict[str, Any]:
    """Reports a reward model's accuracy on held-out preferences or labels."""
    if config.loss == "reward":
        return reports.reward_report(rewards, groups)
    if config.loss == "outcome":
        labels = np.array([group.columns["label"] for group in groups])
        return reports.correctness_report(rewards[:, 0], labels)
    there = np.stack([group.columns["step_ends"] for group in groups]) >= 0
    labels = np.stack([group.columns["step_labels"] for group in groups])
    return reports.correctness_report(rewards[there], labels[there])


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
