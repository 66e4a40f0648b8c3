"""The text part of hypo.py with the paper's model: DPO and HyPO on a preference data set, --preset full."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments import preference
from experiments.cli import flags
from experiments.cli import rewards as rewards_cli
from experiments.cli import training as shared
from experiments.cli.preference_data import load_data
from experiments.papers.hypo import text
from experiments.worlds import loaded
from jaxft import train
from jaxft.checkpoints import load_tokenizer
from jaxft.objectives import sequence_log_probs
from jaxft.parallel import mesh_context, to_host
from jaxft.train.batches import place_batch

METHODS = ("DPO", "HyPO")  # RLOO needs the true reward
# One epoch of UltraFeedback; β, λ, learning rate, batch and LoRA are those of the summarisation task.
PAPER = dict(
    model="meta-llama/Meta-Llama-3-8B-Instruct",
    data=("trl-lib/ultrafeedback_binarized",),
    eval_data="trl-lib/ultrafeedback_binarized?split=test",
    loss="hypo",
    adapter="lora",
    batch_size=64,
    gradient_accumulation_steps=4,
    max_length=1024,
    max_new_tokens=512,
    online_samples=2,
    schedule="constant",
    warmup_ratio=0.03,
)
SIZES = dict(steps=950, beta=0.05, text_kl_weight=1e-4, learning_rate=3e-6, held_out=256)


@contextlib.contextmanager
def opened(config: Any) -> Iterator[Callable[[int], dict[str, list]]]:
    """Reads data and model; yields run(seed) -> for each method, what was measured along training.

    Raises:
        DataError: for missing data, before the model is read; ValueError or CheckpointError for the model.
    """
    settings = loaded.everyday(
        preference.Config(), config, PAPER, max_steps=config.steps, learning_rate=config.learning_rate,
        beta=config.beta, kl_weight=config.text_kl_weight,
    )  # fmt: skip
    if config.rewards.judge or config.rewards.reward_model:
        rewards_cli.check(config.rewards, {})
    training, held_out, _ = load_data(settings)
    held_out = held_out[: config.held_out]
    mesh = shared.mesh_of(settings.mesh)
    model, base = shared.load_base(settings, mesh, keeps_start=True)
    with rewarded(config, settings, held_out) as reward:
        run = functools.partial(run_seed, config, settings, model, base, mesh, reward)
        yield lambda seed: run(training, held_out, seed)


def run_seed(config, settings, model, base, mesh, reward, training, held_out, seed):
    """{method: rows} from one start, with the same pairs in the same order."""
    settings = flags.replace(settings, seed=seed)
    params = shared.adapt_params(settings, model, base, mesh)
    sizes = settings.rows.sizes
    score = functools.partial(train.reference_log_probs, model.forward, params, mesh=mesh, **sizes)
    training, held_out = score(training), score(held_out)
    measured = measurer(settings, model, params, held_out, mesh, reward)
    start = measured(params, jax.random.key(seed)) | {"step": 0, "pairs": len(training)}
    own = text.Settings(beta=config.beta, kl_weight=config.text_kl_weight)

    def made(name):
        batches = preference.data.group_batches(training, **sizes, seed=seed)
        if name == "HyPO":
            batches = preference.with_samples(settings, model, params, training, batches, mesh)
        return text.objective(name, model.forward, own), batches

    return text.compare(
        METHODS,
        params,
        start,
        measured,
        made,
        lambda: shared.make_optimizer(settings.optimisation),
        every=max(1, config.steps // 10),
        steps=config.steps,
        seed=seed,
        callbacks=lambda: [train.progress(steps=settings.output.logging_steps)],
        microbatches=settings.optimisation.gradient_accumulation_steps,
        mesh=mesh,
    )


def measurer(settings, model, ref_params, held_out, mesh, reward):
    """Returns measure(params, key): KL on fresh answers to held-out prompts, log π of chosen ones, reward."""
    one = flags.replace(settings, online_samples=1)
    sums = jax.jit(lambda params, batch: sequence_log_probs(model.forward, params, batch).sums)
    number = -(-len(held_out) // settings.rows.batch_size)

    def measure(params, key):
        sample = preference.with_samples(
            one, model, ref_params, held_out, itertools.repeat({}), mesh
        )
        carry, ratios, rewards = sample.carry, [], []
        for i in range(number):
            batch, carry = sample(params, carry, jax.random.fold_in(key, i))
            with mesh_context(mesh):
                found = to_host(sums(params, place_batch(batch["online"], mesh)))
            ratios.append(found - batch["online"]["ref_log_probs"])
            if reward is not None:
                rewards.append(reward(batch["online"]))
        score = train.reference_log_probs(
            model.forward, params, held_out, mesh=mesh, **settings.rows.sizes
        )
        chosen = [group.columns["ref_log_probs"][0] for group in score]
        row = {"kl": float(np.mean(ratios)), "log_prob_chosen": float(np.mean(chosen))}
        return row | ({"reward": float(np.nanmean(rewards))} if rewards else {})

    return measure


@contextlib.contextmanager
def rewarded(config, settings, held_out):
    """Yields batch of groups of one -> rewards of its answers, or None without --judge or --reward-model."""
    if not (config.rewards.judge or config.rewards.reward_model):
        yield None
        return
    decode = functools.partial(load_tokenizer(settings.base.model).decode, skip_special_tokens=True)
    with rewards_cli.opened(config.rewards, settings.base, held_out) as judge:

        def reward(batch):
            tokens, answers = batch["tokens"][:, 0], batch["loss_mask"][:, 0] > 0
            asked = (batch["segment_ids"][:, 0] > 0) & ~answers
            pick = lambda mask: [
                decode(row[m]).strip() for row, m in zip(tokens, mask, strict=True)
            ]
            records = [{"prompt": prompt} for prompt in pick(asked)]
            return np.asarray(judge(pick(answers), records), float)

        yield reward
