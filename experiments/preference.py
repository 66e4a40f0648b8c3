"""Preference optimisation of a language model: DPO and its relatives, KTO and BCO; and reward models.

    python experiments/preference.py --data pairs.jsonl --loss dpo
    python experiments/preference.py --data labelled.jsonl --loss kto
    python experiments/preference.py --model meta-llama/Llama-3.1-8B-Instruct --fsdp -1 --bfloat16 \\
        --data trl-lib/ultrafeedback_binarized --loss simpo --learning-rate 1e-6 --adapter full
    python experiments/preference.py --data pairs.jsonl --loss hypo      DPO, held by a KL on its own answers
    python experiments/preference.py --data pairs.jsonl --loss reward    a reward model
    python experiments/preference.py --smoke        seconds, random weights

Pairs have the columns prompt, chosen and rejected; kto, bco and outcome take prompt, completion and label, or
pairs; process takes prompt, completions (steps) and labels. A reasoning-gym task (rg:TASK) gives pairs of
right answers and those of other questions. The reference is the model before training; its log-probs
are computed once. A reward model is a sequence classifier with one label: its head is `score` in the
adapter's files, or the model's. The output directory gets the adapter, metrics, a figure and checkpoints;
--resume goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments import _preference_report as reports
from experiments import _training as shared
from experiments._optimizers import sharpen
from jaxft import data, losses, objectives, rl, train
from jaxft.generation import SamplingConfig

NEEDLE = "rg:needle_haystack?min_num_statements=4&max_num_statements=8"
Loss = Literal[
    "dpo", "robust", "hinge", "ipo", "exo", "nca", "sppo", "bco_pair", "apo_zero", "apo_down", "aot",
    "aot_unpaired", "discopop", "normalised", "length_regularised", "dpop", "hybrid_dpo", "mpo", "simpo",
    "alpha_po", "cpo", "orpo", "slic", "kto", "bco", "hypo", "reward", "outcome", "process",
]  # fmt: skip
UNPAIRED = ("kto", "bco")
REWARDS = ("reward", "outcome", "process")  # of pairs, of answers, of steps
HEAD = 0x4EAD  # purpose of the key that draws a reward head
REFERENCE_FREE = ("simpo", "alpha_po", "cpo", "orpo", "slic")


@dataclasses.dataclass(frozen=True)
class Config(shared.Training):
    """What to train, on which preferences, and how."""

    data: tuple[str, ...] = (f"{NEEDLE}&size=1000&seed=1",)  # files, hub ids, rg:TASK
    eval_data: str = f"{NEEDLE}&size=100&seed=1000000"  # "": hold out a part of the data
    output_dir: str = "runs/preference"

    loss: Loss = "dpo"
    beta: float | None = None  # strength of the pull to the reference; None: the loss's own
    label_smoothing: float | None = None  # share of wrong labels: dpo, robust, exo, aot, simpo, cpo
    simpo_gamma: float = 0.5  # margin that simpo and alpha_po ask for
    alpha_length: float = 0.05  # of length_regularised: reward of a token of mere length
    ld_alpha: float = (
        1.0  # below 1: what is longer than the pair's shorter one counts less (LD-DPO)
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = (
        "reverse_kl"  # of dpo: from the reference
    )
    f_alpha: float = 0.5  # of the alpha divergence; 1 is the reverse KL
    nll_alpha: float = 0.0  # weight of the chosen completion's own likelihood (RPO; cpo: 1 more)
    use_weighting: bool = False  # weigh pairs by how likely the policy is to say them (WPO)
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0  # kto
    kl_weight: float = 0.1  # hypo: of the KL on the policy's own answers, nats of a whole answer
    online_samples: int = 2  # hypo: answers to each of --batch-size prompts a step
    max_new_tokens: int = 64  # hypo: of these
    center_rewards_coefficient: float = 0.0  # reward: holds rewards near 0 (0.01 is usual)

    learning_rate: float = 1e-4
    too_long: Literal["drop", "truncate", "truncate_left_prompt", "error"] = "drop"


def main(config: Config) -> dict[str, Any]:
    """Trains; returns the metrics that are written to metrics.json."""
    config = _smoke(config) if config.smoke else config
    shared.start(config)
    make_objective = objective_of(config)
    training, held_out = load_data(config)
    if config.preview:
        return {"records": len(training)}
    output = pathlib.Path(config.output_dir)
    shared.check_output(config, output)
    mesh = shared.mesh_of(config)
    model, base = shared.load_base(config, mesh)
    params = shared.adapt_params(config, base, mesh)
    if config.loss in REWARDS:
        key = jax.random.fold_in(jax.random.key(config.seed), HEAD)
        params = objectives.add_reward_head(key, params, model.config.hidden_size)
    objective = make_objective(model)
    method = sharpen(config.sharpness, objective, shared.make_optimizer(config), rho=config.rho)
    score = functools.partial(
        train.reference_log_probs,
        model,
        batch_size=config.batch_size,
        max_length=config.max_length,
        mesh=mesh,
        ld_alpha=config.ld_alpha,
    )
    bare_held_out = held_out
    if config.loss not in REWARDS:
        held_out = score(params, held_out)  # Free of reference or not: gains are told.
    if config.loss not in (*REWARDS, *REFERENCE_FREE):
        training = score(params, training)
    eval_batches = data.finite_group_batches(
        bare_held_out if config.loss in REFERENCE_FREE else held_out,
        batch_size=config.batch_size,
        max_length=config.max_length,
    )
    batches = data.group_batches(
        training,
        batch_size=config.batch_size,
        max_length=config.max_length,
        seed=config.seed,
    )
    if config.loss == "hypo":
        objective = objective_of(dataclasses.replace(config, kl_weight=0.0))(model)  # To evaluate.
        batches = with_samples(config, model, params, training, batches, mesh)
    state, history = train.fit(
        params,
        method.objective,
        method.optimizer,
        batches,
        steps=config.max_steps,
        key=jax.random.key(config.seed),
        gradient=method.gradient,
        microbatches=config.gradient_accumulation_steps,
        mesh=mesh,
        callbacks=shared.callbacks(config, objective, eval_batches, output, mesh),
        checkpoints=shared.checkpoints(config, output, best="eval/loss"),
    )
    shared.save(config, model, state.params, base, mesh, output)
    metrics = reports.losses_of(history)
    if config.loss in REWARDS:
        rewards = reports.read_rewards(config, model, state.params, held_out, mesh)
        metrics |= reward_report(config, rewards, held_out)
    else:
        table = lambda groups: np.stack([group.columns["ref_log_probs"] for group in groups])
        tell = reports.label_report if config.loss in UNPAIRED else reports.pair_report
        after = score(state.params, bare_held_out)
        metrics |= tell(table(after), table(held_out), held_out)
    if config.loss == "hypo":
        kls = [row["kl"] for row in history[-max(1, len(history) // 10) :] if "kl" in row]
        metrics["kl"] = float(np.mean(kls)) if kls else None
        print(f"KL from the start, on the policy's own last answers: {metrics['kl']} nats")
    shared.write_metrics(output, metrics)
    return metrics


def with_samples(config: Config, model, params, training, batches, mesh):
    """HyPO's batches: the pairs, and fresh answers of the policy to the training prompts."""
    first = [group.parts[0] for group in training]
    prompts = [part.tokens[: int(np.argmax(part.loss_mask > 0))].tolist() for part in first]
    longest = max(map(len, prompts))
    if longest + config.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with --max-new-tokens {config.max_new_tokens} that "
            f"exceeds the {model.config.max_length} positions of {config.model}."
        )
    stop = shared.files.load_tokenizer(config.model).eos_token_id
    sample = rl.samples_beside(
        model,
        prompts,
        params,
        SamplingConfig(config.max_new_tokens, stop_ids=(stop,)),
        prompts_per_step=config.batch_size,
        samples=config.online_samples,
        seed=config.seed,
        mesh=mesh,
    )
    return rl.PairsWithSamples(batches, sample)


def objective_of(config: Config):
    """model -> objective, for the loss of the flags; refuses flags that the loss does not have."""
    given = {name: getattr(config, name) for name in ("beta", "label_smoothing")}
    given = {name: value for name, value in given.items() if value is not None}
    if config.beta is not None and not config.beta > 0:
        raise ValueError(f"--beta must be positive, got {config.beta}.")
    smoothed = ("dpo", "robust", "exo", "aot", "aot_unpaired", "simpo", "cpo", "hypo")
    if "label_smoothing" in given and config.loss not in smoothed:
        raise ValueError(f"--label-smoothing is of {', '.join(smoothed)}; {config.loss} has none.")
    if config.center_rewards_coefficient and config.loss != "reward":
        raise ValueError(f"--center-rewards-coefficient is of reward, not of {config.loss}.")
    if config.loss in REWARDS and "beta" in given:
        raise ValueError(f"--beta is of losses with a policy; {config.loss} trains a reward model.")
    if config.loss == "hypo" and (
        config.use_weighting or min(config.online_samples, config.max_new_tokens) < 1
    ):
        raise ValueError(
            f"hypo takes no --use-weighting, and at least one --online-samples and --max-new-tokens; got "
            f"{config.online_samples} and {config.max_new_tokens}."
        )
    if config.f_divergence != "reverse_kl" and config.loss != "dpo":
        raise ValueError(f"--f-divergence is of dpo, not of {config.loss}.")
    if config.ld_alpha != 1 and config.loss in (*UNPAIRED, *REWARDS, "hypo"):
        raise ValueError(f"--ld-alpha is of pairs, not of {config.loss}.")
    if not 0 <= config.ld_alpha <= 1:
        raise ValueError(f"--ld-alpha must lie in [0, 1], got {config.ld_alpha}.")
    if config.kl_weight < 0:
        raise ValueError(f"--kl-weight must be at least 0, got {config.kl_weight}.")
    if config.loss in (*UNPAIRED, *REWARDS) and (config.use_weighting or config.nll_alpha):
        raise ValueError(f"--use-weighting and --nll-alpha are of pairs, not of {config.loss}.")
    if config.loss in REWARDS:
        centre = config.center_rewards_coefficient
        return {
            "reward": lambda model: objectives.pairwise_reward(
                model, center_rewards_coefficient=centre
            ),
            "outcome": objectives.outcome_reward,
            "process": objectives.process_reward,
        }[config.loss]
    if config.loss in UNPAIRED:
        weights = {n: getattr(config, n) for n in ("desirable_weight", "undesirable_weight")}
        if config.loss == "kto":
            return lambda model: objectives.kto(model, **given, **weights)
        return lambda model: objectives.bco(model, **given)
    own = {
        "dpo": {} if config.f_divergence == "reverse_kl" else {"h": divergence(config)},
        "simpo": {"simpo_gamma": config.simpo_gamma},
        "alpha_po": {"simpo_gamma": config.simpo_gamma},
        "length_regularised": {"alpha": config.alpha_length},
    }
    named = losses.f_dpo_loss if own.get(config.loss, {}).get("h") else pair_loss(config.loss)
    loss = functools.partial(named, **given, **own.get(config.loss, {}))
    one = jax.ShapeDtypeStruct((1,), np.float32)
    jax.eval_shape(loss, losses.Pairs(*[one] * 6))  # Bad values fail now, not after minutes.
    whole = loss
    if config.nll_alpha:
        whole = lambda pairs: loss(pairs) + config.nll_alpha * losses.nll_loss(pairs)
    beta = 0.1 if config.beta is None else config.beta
    if config.loss == "hypo":
        return lambda model: objectives.hypo(model, whole, beta=beta, kl_weight=config.kl_weight)
    return lambda model: objectives.preference(
        model, whole, beta=beta, use_weighting=config.use_weighting, ld_alpha=config.ld_alpha
    )


def divergence(config: Config):
    """h of `f_dpo_loss`."""
    if config.label_smoothing is not None:
        raise ValueError(f"--label-smoothing is of the reverse KL, not of {config.f_divergence}.")
    if config.f_divergence == "alpha":
        return losses.alpha_divergence(config.f_alpha)
    return getattr(losses, config.f_divergence)


def pair_loss(name: str):
    """The function of `Pairs` of a name."""
    named = {
        "hypo": losses.dpo_loss,
        "robust": losses.robust_dpo_loss,
        "normalised": losses.normalised_dpo_loss,
        "length_regularised": losses.length_regularised_dpo_loss,
    }
    return named.get(name) or getattr(losses, f"{name}_loss")


def load_data(config: Config):
    """(training groups, held-out groups)."""
    bad = data.BadRecords(config.max_bad)
    sources = [load_records(config, spec, bad) for spec in config.data]
    if config.eval_data:
        held_out = load_records(config, config.eval_data, data.BadRecords())
    else:
        parts = [data.split(records, config.validation) for records in sources]
        sources, held_out = [part[0] for part in parts], [r for part in parts for r in part[1]]
        if not held_out:
            raise data.DataError("no record is held out; raise --validation or give --eval-data.")
    records = [record for source in sources for record in source]
    held_out = shared.without_known(held_out, {_question(r) for r in records}, _question)
    renderer = data.Renderer(shared.files.load_tokenizer(config.model), template=config.template)
    too_long = {} if config.loss == "process" else {"too_long": config.too_long}
    if config.loss in (*UNPAIRED, "outcome"):
        other = config.loss in UNPAIRED
        render = functools.partial(data.render_unpaired, seed=config.seed, mismatched=other)
        records, held_out = _labelled(records), _labelled(held_out)
    else:
        render = data.render_steps if config.loss == "process" else data.render_pairs
    training = render(records, renderer, config.max_length, bad=bad, **too_long)
    left = render(held_out, renderer, config.max_length, **too_long)
    if bad.summary():
        print(f"records left out or cut: {bad.summary()}")
    for group in training[: 3 if config.preview else 1]:
        for part in group.parts:
            print(data.explain(part, renderer.tokenizer, color=False), end="\n\n")
    return training, left


def load_records(config: Config, spec: str, bad: data.BadRecords) -> list[data.preference.Record]:
    """Pairs, or completions or steps with labels, of a source."""
    if config.loss == "process":
        return data.load(spec, form=data.normalise_steps, bad=bad)
    if spec.startswith("rg:"):
        return answers_of_others(data.load(spec, bad=bad))
    if config.loss not in (*UNPAIRED, "outcome"):
        return data.load(spec, form=data.normalise_pair, bad=bad)
    either = lambda row, fields: (
        data.normalise_unpaired(row, fields) if "label" in row else data.normalise_pair(row, fields)
    )
    return data.load(spec, form=either, bad=bad)


def reward_report(config: Config, rewards: np.ndarray, groups: list) -> dict[str, Any]:
    """What held-out preferences, or labels, say of a reward model."""
    if config.loss == "reward":
        return reports.reward_report(rewards, groups)
    if config.loss == "outcome":
        labels = np.array([group.columns["label"] for group in groups])
        return reports.correctness_report(rewards[:, 0], labels)
    there = np.stack([group.columns["step_ends"] for group in groups]) >= 0
    labels = np.stack([group.columns["step_labels"] for group in groups])
    return reports.correctness_report(rewards[there], labels[there])


def answers_of_others(records: list) -> list:
    """Pairs of each record's answer and the next record's that differs, so right and wrong of one kind."""
    pairs = []
    for i, record in enumerate(records):
        others = (records[(i + step) % len(records)] for step in range(1, len(records)))
        wrong = next((o for o in others if o["completion"] != record["completion"]), None)
        if wrong is None:
            raise data.DataError(f"{record['source']}: all answers are the same.")
        answers = {"chosen": record["completion"], "rejected": wrong["completion"]}
        pairs.append({k: v for k, v in record.items() if k != "completion"} | answers)
    return pairs


def _labelled(records):
    """Records with labels: pairs become two each."""
    pairs = [record for record in records if "chosen" in record]
    return [record for record in records if "chosen" not in record] + data.unpair(pairs)


def _question(record) -> str:
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else shared.question(record, prompt)


def _smoke(config):
    task = "rg:chain_sum?max_terms=2&min_digits=1&max_digits=1"
    small = dict(
        model="tiny",
        data=(f"{task}&size=24&seed=1",),
        eval_data=f"{task}&size=8&seed=1000000",
        max_steps=6,
        eval_steps=3,
        max_length=256,
        learning_rate=1e-3,
        rank=2,
        alpha=4.0,
    )
    return shared.with_small(config, small)


if __name__ == "__main__":
    train.run_main(main, tyro.cli(Config, description=__doc__))
