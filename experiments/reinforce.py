"""Reinforcement learning of a language model from verified answers, with its accuracy before and after.

    python experiments/reinforce.py --start runs/sft/adapter       GRPO on a reasoning-gym task
    python experiments/reinforce.py --data questions.jsonl --eval-data held_out.jsonl --algorithm rloo
    python experiments/reinforce.py --turns 2                      a wrong answer may be corrected
    python experiments/reinforce.py --algorithm online_dpo --group-size 2 --reward-model runs/reward/adapter
    python experiments/reinforce.py --sampler-url http://host:8000/v1 --push-dir /nfs/push --correction tokens
    python experiments/reinforce.py --max-staleness 1 --correction tokens       samples while it trains
    python experiments/reinforce.py --smoke                        seconds, random weights

Data: reasoning-gym tasks, or records with a question and an `answer`; with --judge or --reward-model, which
replace the verifier, any records with a question. Start from a model that answers some questions correctly
(10 to 60 % of samples): from only wrong answers it cannot learn. A server samples from the newest
weights that were pushed to it through --push-dir, which it must see under the same path: LoRA as an
adapter (vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-lora-rank 64),
others as a whole model (vLLM: VLLM_SERVER_DEV_MODE=1). The output directory gets the
adapter (or the whole model), metrics.jsonl, metrics.json, a figure and checkpoints; --resume continues.
"""

from __future__ import annotations

import experiments.cli.interrupts  # noqa: F401  isort: skip  (before what takes seconds)

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import tyro

from experiments.cli import cards, engine, flags, held_out, servers, teachers
from experiments.cli import reinforce_checks as checks
from experiments.cli import rewards as rewards_cli
from experiments.cli import training as shared
from experiments.cli.algorithms import ALGORITHMS, Choice, Correction, algorithm
from experiments.cli.models import renderer_of, stop_ids
from experiments.cli.servers import PushApiName
from jaxft import data, rl, train
from jaxft.adapters import Name, load_adapter, merge
from jaxft.generation import (
    SamplingConfig,
    generate,
    generate_continuously,
    split_prompts,
    with_rules,
)
from jaxft.losses import overlong_penalty
from jaxft.objectives import with_value_head, without_value_head
from jaxft.parallel import mesh_context
from jaxft.rewards import Failures, measure_accuracy, verifier_for

SHOWN = ("reward", "length", "kl", "entropy", "gap")
SMALL = dict(
    data="rg:chain_sum?size=64&seed=1&max_terms=2",
    eval_data="rg:chain_sum?size=8&seed=1000000&max_terms=2",
    max_steps=4,
    prompts_per_step=2,
    group_size=2,
    max_new_tokens=4,
    workers=1,
    save_steps=4,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Model, data, algorithm and training."""

    start: str | None = None  # adapter to merge into the model before training; None: none
    # rg:TASK, or a file, tfds: or hub id with answers
    data: str = f"{held_out.NEEDLE}&size=2000&seed=1"
    # held-out questions; None: those of the default task or, with --data, a part of it; "": a part
    eval_data: str | None = None
    # fraction of --data to hold out if there is no --eval-data; None: 0.1, at most 200 questions
    validation: float | None = None
    adapter: Name = "lora"  # the kind of adapter to train; full: all params

    algorithm: Choice = "grpo"  # credit of the rewards, and objective of a step
    prompts_per_step: int = 4  # questions per rollout
    group_size: int = 8  # answers to each question
    updates: int = 1  # optimizer steps on parts of one rollout
    epochs: int = 1  # passes over a rollout, of --updates steps each
    max_new_tokens: int = 16  # maximum tokens of an answer
    temperature: float = 1.0  # of the policy, in sampling and training
    stop: tuple[str, ...] = ()  # text that ends an answer, besides the stop token
    turns: int = 1  # maximum answers to a question; a wrong answer gets feedback
    feedback: str = "That is not right. Try again."  # the reply to a wrong answer

    kl_weight: float = 0.0  # weight in the loss of the KL (k3) to the initial model
    reward_kl: float = 0.0  # weight in the reward of the KL (k1): rloo, reinforce_plus_plus, ppo
    # adapt --reward-kl to this KL, in nats per answer; None: constant
    kl_target: float | None = None
    kl_horizon: float = 10000.0  # answers in which --reward-kl changes by at most 20 %
    entropy_weight: float = 0.0  # weight of the entropy bonus
    beta: float = 0.1  # online_dpo, xpo: β of DPO, on the best and the worst answer of each group
    xpo_alpha: float = 1e-5  # xpo: weight of the term against the initial model's answers
    gamma: float = 1.0  # ppo: discount per token
    lam: float = 0.95  # ppo: λ of GAE; 1 for long reasoning
    value_weight: float = 0.1  # ppo: weight of the critic's loss
    value_clip: float = 0.2  # ppo: maximum change of a value within a rollout
    correction: Correction = "none"  # importance weights from sampler to trainer
    # answers sampled at a time: each that ends gives its place to the next one; None: all at once
    places: int | None = None
    # OpenAI-compatible server that samples (http://host:8000/v1); None: no
    sampler_url: str | None = None
    sampler_model: str | None = None  # the model's name there; None: that of --model
    push_dir: str | None = None  # where the server reads new weights; None: it keeps its own
    push_api: PushApiName = "vllm"  # the server's requests for loading weights
    push_every: int = 1  # rollouts between two pushes of weights
    # rollouts by which the policy that samples, in a thread beside training, may be older; 0: no thread
    max_staleness: int = 0
    max_tries: int = 1  # maximum draws for groups whose rewards differ (DAPO: 10)
    overlong: int = 0  # last tokens of the limit, over which a penalty rises to 1 (DAPO)
    mask_truncated: bool = False  # exclude answers that reach the limit from the loss
    # compute the prompt of a group once per update, with the same result; auto: where the model can
    share_prompts: engine.Switch = "auto"
    # leave answers with advantage 0 out of the update, with the same loss; auto: where the loss allows it
    drop_idle: engine.Switch = "auto"

    # form of --teacher: divergence over the vocabulary in the loss, or log-ratio of each sampled token
    # as its advantage
    distil_as: Literal["divergence", "credit"] = "divergence"

    distil: teachers.Teacher = teachers.Teacher(distil_weight=1.0)
    policy: flags.PolicyLoss = flags.PolicyLoss()
    rewards: flags.Rewards = flags.Rewards()
    more: flags.MoreRewards = flags.MoreRewards()
    columns: flags.Columns = flags.Columns()
    base: flags.Model = flags.Model()
    kernels: flags.Kernels = flags.Kernels()
    optimisation: flags.Optimisation = flags.Optimisation(
        max_steps=50, learning_rate=1e-4, schedule="constant", warmup_ratio=0.0
    )
    mesh: flags.Mesh = flags.Mesh()
    output: flags.Output = flags.Output("runs/reinforce", save_steps=50, logging_steps=1)
    hub: flags.Hub = flags.Hub()
    seed: int = 0  # for the adapter's initial values, the order of questions and all other draws
    smoke: bool = False  # a random tiny model for a few steps
    debug: bool = False  # full tracebacks


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = shared.start(config, rewards_cli.small(config.rewards, SMALL))
    checks.settings(config)
    renderer, records, kept, name = load_data(config)
    output, mesh = shared.place(config)
    checks.mesh(config, mesh)
    ids = data.render_prompts(records, renderer)
    longest = max(map(len, ids)) + config.max_new_tokens
    teacher = teachers.load(config, renderer, mesh, longest)
    columns = data.prompt_columns(renderer, records)
    if isinstance(renderer, data.SourceRenderer):  # The encoder reads the prompts.
        ids, columns = split_prompts(renderer.config, ids)
    prompts = rl.Prompts(ids, config.prompts_per_step, records, columns=columns, seed=config.seed)
    check = functools.partial(checks.length, prompts=ids)
    model, base = shared.load_base(config, mesh, check, keeps_start=True)
    if config.start:
        base = merge(load_adapter(config.start, model.config, base))
    params = shared.adapt_params(config, model, base, mesh)
    if ALGORITHMS[config.algorithm].values:
        params = with_value_head(model, params)
    credit = credit_of(config, model.forward)
    build = lambda forward: algorithm(config, forward).objective
    if config.distil_as == "divergence":
        params = teachers.beside(teacher, params)
        build = teachers.distilled(config, teacher, build)
    method = shared.method_of(config, build, model.forward)
    with rewards_cli.opened_several(config.rewards, config.more, config.base, records) as rewards:
        accuracy = functools.partial(
            measure,
            config,
            model,
            renderer,
            kept,
            name,
            mesh,
            rewards if config.rewards.numbers else None,
        )
        before = accuracy(base, "before")
        saved = engine.saved(config, model, params, mesh)
        scores = teachers.transforms(config, teacher)
        collect = experience(
            config, model, prompts, renderer, rewards, credit, base, mesh, saved, scores
        )
        collect = teachers.of_students(teacher, collect)
        callbacks, books = _callbacks(config, output), books_of(config)
        state, history = shared.fit(
            config, params, method, collect, callbacks, output, mesh, best=None, books=books
        )
        trained = without_value_head(teachers.bare(teacher, state.params))
        # With --start, the adapter's base would be a model that is not on disk.
        shared.save(config, model, trained, base, mesh, output, whole=bool(config.start))
        after = accuracy(trained, "after")
        failures = getattr(rewards, "failures", Failures())
    metrics = report(config, history, failures, before, after, name, output)
    return cards.publish(config, metrics, output)


def load_data(config: Config):
    """Returns (renderer, training records, held-out records, their name); all can be rewarded."""
    renderer = renderer_of(config.base)
    if isinstance(renderer, data.SourceRenderer):
        checks.source(config)
    load = lambda spec: data.load(
        spec, fields=config.columns.of(spec), form=data.normalise_question
    )
    records = load(config.data)
    rewards_cli.check(config.rewards, {config.data: records})
    parts = held_out.with_held_out(config, [records], load, data.whole_prompt)
    rewards_cli.check(config.rewards, {config.eval_data or config.data: parts.held_out})
    return renderer, parts.training[0], parts.held_out, parts.name


def experience(
    config, model, prompts, renderer, rewards, credit, base, mesh, saved, scores=()
) -> rl.Collector:
    """Returns the batches of `fit`: rollouts of the current policy; `scores`: transforms of a teacher."""
    sample = sampling(config, model, renderer, rewards, base)
    if config.max_tries != 1:
        sample = rl.until_contrast(sample, config.max_tries)
    return rl.collect(
        prompts,
        sample,
        credit,
        *transforms(config, model, base, saved.share_prompts),
        *scores,
        updates=config.updates,
        epochs=config.epochs,
        kl_control=kl_control(config),
        mesh=mesh,
        **saved._asdict(),
        max_staleness=config.max_staleness,
        rollouts=-(-config.optimisation.max_steps // (config.updates * config.epochs)),
    )


def transforms(config, model, base, share: int | None = None) -> list[rl.Transform]:
    """Returns the transforms of a rollout before its rewards become credit."""
    found = []
    if config.overlong:
        budget = config.max_new_tokens * config.turns
        found += [
            rl.add_penalty(lambda lengths: overlong_penalty(lengths, budget, config.overlong))
        ]
    if config.mask_truncated:
        found += [rl.mask_truncated]
    if config.updates * config.epochs > 1:
        found += [rl.add_old_policy(model.forward, config.temperature, share)]
    elif ALGORITHMS[config.algorithm].values:
        found += [rl.add_values(model.forward, share)]
    # Always add the reference: the KL is shown even if it has no weight.
    return [*found, rl.add_reference(model.forward, base, config.temperature, share)]


def credit_of(config, forward) -> rl.Credit:
    """Returns the credit of the algorithm, of rewards that are normalised one by one, and of a teacher."""
    credit = algorithm(config, forward).credit
    if config.more.reward_combination == "normalize_then_sum":
        credit = rl.normalised_sums(config.more.weights, config.group_size)
    if config.distil_as == "credit":
        credit = rl.reverse_kl_credit(credit, config.distil.distil_weight)
    return credit


def books_of(config) -> dict[str, train.Book]:
    """Returns the book that adapts the weight of the entropy bonus; none without --entropy-target."""
    policy = config.policy
    if policy.entropy_target is None:
        return {}
    settings = dict(delta=policy.entropy_weight_delta, highest=policy.entropy_weight_max)
    book = train.adaptive_entropy(policy.entropy_target, weight=config.entropy_weight, **settings)
    return {"entropy": book}


def kl_control(config) -> rl.KlControl | None:
    """Returns the controller of the KL's weight in the reward; None without --kl-target."""
    if config.kl_target is None:
        return None
    return rl.KlControl(config.reward_kl, config.kl_target, config.kl_horizon)


def sampling(config, model, renderer, rewards, base=None) -> rl.Sample:
    """Returns the sampler of answers or, with --turns, episodes; for xpo half come from the base."""
    tokenizer = renderer.tokenizer
    settings = SamplingConfig(
        config.max_new_tokens,
        config.temperature,
        stop_ids=stop_ids(renderer, model),
        stop_strings=config.stop,
    )
    if isinstance(renderer, data.SourceRenderer):
        settings = with_rules(renderer.config, settings)
    sampler = servers.sampler(config, model, base) if config.sampler_url else generate
    if config.places is not None:
        sampler = functools.partial(generate_continuously, places=config.places)
    if ALGORITHMS[config.algorithm].halves:
        half = rl.answers(model, tokenizer, rewards, settings, config.group_size // 2)
        return rl.answers_of_both(half, model, base, config.temperature)
    if config.turns == 1:
        return rl.answers(model, tokenizer, rewards, settings, config.group_size, sampler=sampler)
    return rl.episodes(
        model,
        tokenizer,
        rl.try_again(rewards, config.feedback, config.turns),
        settings,
        config.group_size,
        next_turn=renderer.next_turn,
        sampler=sampler if config.sampler_url else None,
    )


def measure(config, model, renderer, records, name, mesh, rewards, params, when: str):
    """Measures and prints accuracy or, with `rewards`, mean reward of greedy held-out answers.

    `name` describes the records.
    """
    verifier = lambda completion, record: False  # A judge's records need no answers.
    if rewards is None:
        verifier = verifier_for(records[0]["_source"], records) or verifier
    with mesh_context(mesh):
        result = measure_accuracy(
            model,
            params,
            renderer,
            records,
            verifier,
            max_new_tokens=config.max_new_tokens,
            stop_strings=config.stop,
        )
    if rewards is None:
        print(f"accuracy {when} on {name}: {result}", flush=True)
        return {"accuracy": result.rate, "accuracy_interval": result.interval}
    values = np.asarray(rewards(result.completions, records), float)
    told = values[~np.isnan(values)]
    mean = float(told.mean()) if len(told) else None
    judged = f"{len(told)} of {len(values)} were judged"
    print(f"mean reward {when} on {name}: {mean} ({judged})", flush=True)
    return {"held_out_reward": mean, "judged": len(told)}


def report(config, history, failures, before, after, name, output) -> dict[str, Any]:
    """Prints the changes, writes metrics.json and returns the metrics."""
    few = max(1, len(history) // 10)
    mean = lambda rows: sum(row["reward"] for row in rows) / len(rows)
    metrics = {
        "algorithm": config.algorithm,
        "steps": history[-1]["step"],
        "reward_first": mean(history[:few]),
        "reward_last": mean(history[-few:]),
        "gap": max(row["gap"] for row in history),
        "failed_verdicts": failures._asdict(),
        "evaluated_on": name,
    }
    for when, result in (("before", before), ("after", after)):
        for key, value in result.items():
            kind, interval, _ = key.partition("_interval")
            metrics[f"{kind}_{when}{interval}"] = value
    print(
        f"reward in training, mean of {few} steps: {metrics['reward_first']:.3f} -> "
        f"{metrics['reward_last']:.3f}"
    )
    if any(failures):
        print(f"verdicts that failed: {failures}")
    grouped = ALGORITHMS[config.algorithm].least_group > 1
    if grouped and all(row["no_contrast"] == 1 for row in history):
        print(
            "Rewards did not differ in any group, so nothing was learned: start from a model that answers "
            "some questions correctly (--start), or raise --group-size."
        )
    if config.rewards.numbers:
        rewards = before["held_out_reward"], after["held_out_reward"]
        print(f"mean reward on {name}: {rewards[0]} -> {rewards[1]}")
    else:
        print(f"accuracy on {name}: {before['accuracy']:.1%} -> {after['accuracy']:.1%}")
    shared.write_metrics(output, metrics)
    return metrics


def _callbacks(config, output):
    below = ("length", "entropy", "kl", "gap", "no_contrast")
    title = f"{config.algorithm}, {config.base.model}, {config.adapter}"
    return [
        train.progress(steps=config.output.logging_steps, show=SHOWN),
        train.run_figure(output / "training.png", title=title, main="reward", below=below),
    ]


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
