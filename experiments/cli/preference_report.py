"""Reports of preference.py on held-out preferences, printed and written."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxft import data
from jaxft.metrics import length_controlled_rate, wilson_interval
from jaxft.parallel import in_turn, mesh_context, to_host
from jaxft.rewards import sequence_rewards, token_rewards
from jaxft.train.batches import place_batch


def label_report(policy: np.ndarray, start: np.ndarray, groups: list) -> dict[str, Any]:
    """Reports the gain in log-prob of completions with either label."""
    labels = np.array([group.columns["label"] for group in groups])
    gain = (policy - start)[:, 0]
    mean = lambda side: float(gain[side].mean()) if side.any() else None
    print(f"log-prob gained, in nats: desirable {mean(labels)}, undesirable {mean(~labels)}")
    return {"gain_desirable": mean(labels), "gain_undesirable": mean(~labels)}


def pair_report(policy: np.ndarray, start: np.ndarray, groups: list) -> dict[str, Any]:
    """Reports accuracy on held-out pairs before and after training, and the effect of length.

    Args:
        policy: [N, 2] log-probs of the trained model.
        start: [N, 2] log-probs of the initial model.
        groups: the pairs.
    """
    gain = policy - start
    metrics = pair_accuracy(gain, groups) | {
        "likelier_before": float((start[:, 0] > start[:, 1]).mean()),
        "likelier_after": float((policy[:, 0] > policy[:, 1]).mean()),
        "log_prob_chosen_gain": float(gain[:, 0].mean()),
        "log_prob_rejected_gain": float(gain[:, 1].mean()),
    }
    print(
        f"chosen likelier than rejected {metrics['likelier_before']:.1%} -> "
        f"{metrics['likelier_after']:.1%}\n"
        f"log-prob gained: chosen {metrics['log_prob_chosen_gain']:+.2f}, rejected "
        f"{metrics['log_prob_rejected_gain']:+.2f} nats"
    )
    return metrics


def reward_report(rewards: np.ndarray, groups: list) -> dict[str, Any]:
    """Reports a reward model's accuracy: [N, 2] rewards of chosen and rejected answers."""
    found = {"min": rewards.min(), "mean": rewards.mean(), "max": rewards.max()}
    metrics = pair_accuracy(rewards, groups)
    metrics |= {f"reward_{name}": float(value) for name, value in found.items()}
    print(
        f"margin {metrics['margin']:.3f}; rewards from {metrics['reward_min']:.2f} to "
        f"{metrics['reward_max']:.2f}, mean {metrics['reward_mean']:.2f}"
    )
    return metrics


def correctness_report(rewards: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Reports the accuracy of the sign of rewards, of answers or steps, and of a constant prediction."""
    right = (rewards > 0) == labels
    low, high = wilson_interval(int(right.sum()), len(right))
    constant = float(max(labels.mean(), 1 - labels.mean()))
    metrics = {"accuracy": float(right.mean()), "accuracy_interval": (low, high)}
    print(
        f"{len(right)} labels; accuracy {metrics['accuracy']:.1%} (95 % interval {low:.1%} to "
        f"{high:.1%}); the commoner label is right in {constant:.1%}"
    )
    return metrics | {"commoner_label": constant}


def pair_accuracy(rewards: np.ndarray, groups: list) -> dict[str, Any]:
    """Reports how often the chosen completion has the higher reward ([N, 2]), also at equal length."""
    lengths = np.array([[(p.loss_mask[1:] > 0).sum() for p in group.parts] for group in groups])
    longer = lengths[:, 0] - lengths[:, 1]
    margin = rewards[:, 0] - rewards[:, 1]
    wins, count = margin > 0, len(margin)
    share = lambda side: float(wins[side].mean()) if side.any() else None
    low, high = wilson_interval(int(wins.sum()), count)
    metrics = {
        "accuracy": float(wins.mean()),
        "accuracy_interval": (low, high),
        "margin": float(margin.mean()),
        "length_chosen": float(lengths[:, 0].mean()),
        "length_rejected": float(lengths[:, 1].mean()),
        "accuracy_chosen_longer": share(longer > 0),
        "accuracy_chosen_shorter": share(longer < 0),
        "accuracy_at_equal_length": length_controlled_rate(wins, longer),
    }
    show = lambda x: "-" if x is None else f"{x:.1%}"
    print(
        f"{count} pairs; accuracy {show(metrics['accuracy'])} (95 % interval {low:.1%} to "
        f"{high:.1%})\n"
        f"is it length? chosen {metrics['length_chosen']:.1f} tokens, rejected "
        f"{metrics['length_rejected']:.1f}; accuracy where chosen is longer "
        f"{show(metrics['accuracy_chosen_longer'])}, shorter {show(metrics['accuracy_chosen_shorter'])}, "
        f"at equal length {show(metrics['accuracy_at_equal_length'])}"
    )
    return metrics


def read_rewards(config: Any, model: Any, params: Any, groups: list, mesh: Any) -> np.ndarray:
    """Returns rewards [N, G] at the last token of each completion or, for steps, [N, S]."""

    def run(params, batch):
        if "step_ends" not in batch:
            return sequence_rewards(model.forward, params, batch)[0]
        values = token_rewards(model.forward, params, batch)[:, 0]
        return jax.numpy.take_along_axis(values, jax.numpy.maximum(batch["step_ends"], 0), axis=1)

    run, found = jax.jit(run), []
    for batch in data.finite_group_batches(groups, **config.rows.sizes):
        with mesh_context(mesh):
            found.append(in_turn(run(params, place_batch(batch, mesh))))
    return np.concatenate(to_host(found))[: len(groups)].astype(np.float32)
