"""Log-linear bandits for hypo.py: DPO and HyPO with exact gradients, no samples."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.losses import Pairs, dpo_loss, kl_estimates, reverse_kl_surrogate


class Bandit(NamedTuple):
    """K responses to one prompt; the policy is proportional to π_ref exp(features · θ)."""

    features: jax.Array  # [K, F]
    ref_log_probs: jax.Array  # [K]
    rewards: jax.Array  # [K]
    pairs: jax.Array  # [P, 2] which responses the data compare, with exact Bradley-Terry labels


def three_responses() -> Bandit:
    """One feature that ranks A above B, as it should, and C above both, which no pair contains."""
    return Bandit(
        features=jnp.array([[1.0], [0.0], [2.0]]),
        ref_log_probs=jnp.log(jnp.array([0.45, 0.45, 0.1])),
        rewards=jnp.array([1.0, 0.0, -1.0]),
        pairs=jnp.array([[0, 1]]),
    )


def random_bandits(
    key: jax.Array, draws: int, responses: int = 10, covered: int = 4, width: int = 3
) -> Bandit:
    """Bandits stacked on a leading axis: normal features and rewards, uniform π_ref.

    All pairs of the first `covered` responses are compared, the others never.
    """
    features, rewards = jax.random.split(key)
    pairs = np.array([(i, j) for i in range(covered) for j in range(i + 1, covered)])
    return Bandit(
        features=jax.random.normal(features, (draws, responses, width)),
        ref_log_probs=jnp.full((draws, responses), -jnp.log(responses)),
        rewards=jax.random.normal(rewards, (draws, responses)),
        pairs=jnp.broadcast_to(pairs, (draws, *pairs.shape)),
    )


def log_policy(theta: jax.Array, bandit: Bandit) -> jax.Array:
    """log π_θ [K]."""
    return jax.nn.log_softmax(bandit.ref_log_probs + bandit.features @ theta)


def objective(theta: jax.Array, bandit: Bandit, beta: float, kl_weight: jax.Array) -> jax.Array:
    """DPO's expected loss + λ E_{y ~ π}[surrogate]: the value is not a loss, its gradient is HyPO's."""
    log_p, ref = log_policy(theta, bandit), bandit.ref_log_probs
    first, second = bandit.pairs[:, 0], bandit.pairs[:, 1]
    loss = lambda a, b: dpo_loss(Pairs(log_p[a], log_p[b], ref[a], ref[b]), beta=beta)
    wins = jax.nn.sigmoid(bandit.rewards[first] - bandit.rewards[second])
    offline = jnp.mean(wins * loss(first, second) + (1 - wins) * loss(second, first))
    samples = jax.lax.stop_gradient(jnp.exp(log_p))
    return offline + kl_weight * jnp.sum(samples * reverse_kl_surrogate(log_p, ref))


def solve(
    bandit: Bandit, kl_weight: float, *, beta: float = 0.1, steps: int = 6000
) -> dict[str, jax.Array]:
    """`measure` of the optimum by Adam with a rate that falls to 0; 6000 steps reach it to 3 digits."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    slope = jax.grad(functools.partial(objective, bandit=bandit, beta=beta, kl_weight=kl_weight))

    def step(carry, _):
        theta, state = carry
        updates, state = optimizer.update(slope(theta), state)
        return (optax.apply_updates(theta, updates), state), None

    theta = jnp.zeros(bandit.features.shape[-1])
    (theta, _), _ = jax.lax.scan(step, (theta, optimizer.init(theta)), length=steps)
    return measure(theta, bandit, beta)


def measure(theta: jax.Array, bandit: Bandit, beta: float) -> dict[str, jax.Array]:
    """Measures the reward of the policy and its KL from the reference."""
    log_p = log_policy(theta, bandit)
    p = jnp.exp(log_p)
    seen = jnp.zeros(p.shape, bool).at[bandit.pairs.reshape(-1)].set(True)
    kl = jnp.sum(p * kl_estimates(log_p, bandit.ref_log_probs).k1)
    reward = jnp.sum(p * bandit.rewards)
    return {
        "policy": p,
        "reward": reward,
        "kl": kl,
        "regularised": reward - beta * kl,
        "uncovered": jnp.sum(jnp.where(seen, 0.0, p)),
        "ratio": jnp.max(jnp.exp(log_p - bandit.ref_log_probs)),
    }


def run(draws: int, seed: int, kl_weights: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Both parts for each λ: {"three": {λ: measures}, "random": {λ: measures with [draws] values}}."""
    one = jax.jit(solve)
    every = jax.jit(jax.vmap(solve, (0, None)))
    three, many = three_responses(), random_bandits(jax.random.key(seed), draws)
    plain = lambda tree: jax.tree.map(lambda x: np.asarray(x).tolist(), tree)
    return {
        "three": {f"{w:g}": plain(one(three, w)) for w in kl_weights["three"]},
        "random": {f"{w:g}": plain(every(many, w)) for w in kl_weights["random"]},
    }
