"""The exact part of cxr_preference.py: five responses, and a judge whose labels favour long ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from experiments.lab.claims import Claim, Number
from jaxft import losses

LENGTHS = np.arange(2.0, 12.0, 2.0)  # tokens of the five responses of the exact part
REWARDS, BETA, BIAS = np.array([1.0, 0.5, 0.0, 0.5, 1.0]), 0.5, 0.1


def measure() -> dict[str, Any]:
    """Optima of DPO and R-DPO for labels that favour length, and their closed forms."""
    closed = lambda c: np.exp(REWARDS / BETA + c * LENGTHS / BETA)
    normalised = lambda weights: weights / weights.sum()
    regularised = lambda alpha: functools.partial(losses.length_regularised_dpo_loss, alpha=alpha)
    # The loss adds α (n_w - n_l) inside σ, so the reward that is left is r + (c - α) n.
    cases = {
        "DPO": (losses.dpo_loss, BIAS),
        "R-DPO": (regularised(BIAS), 0.0),
        "R-DPO, wrong sign": (regularised(-BIAS), 2 * BIAS),
    }
    rows = {}
    for name, (loss, left) in cases.items():
        found, best = optimum(loss), normalised(closed(left))
        rows[name] = {
            "policy": found.tolist(),
            "length": float(found @ LENGTHS),
            "error": float(np.abs(found - best).max()),
        }
    return rows


def optimum(loss: Callable[..., jax.Array]) -> np.ndarray:
    """The policy over five responses that minimises the expected loss of all pairs with biased labels."""
    i, j = np.nonzero(~np.eye(len(LENGTHS), dtype=bool))
    bias = BIAS * (LENGTHS[i] - LENGTHS[j])
    label = 1 / (1 + np.exp(-(REWARDS[i] - REWARDS[j] + bias)))
    ref, lengths = np.full(5, -np.log(5.0), np.float32), LENGTHS.astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def total(logits):
        log_p = jax.nn.log_softmax(logits)
        pairs = losses.Pairs(
            log_p[i], log_p[j], *map(jnp.asarray, (ref[i], ref[j], lengths[i], lengths[j]))
        )
        return jnp.sum(jnp.asarray(label, jnp.float32) * loss(pairs, beta=BETA))

    run = lambda x: [np.asarray(v, np.float64) for v in total(jnp.asarray(x, jnp.float32))]
    found = scipy.optimize.minimize(run, np.zeros(5), jac=True, method="BFGS", tol=1e-5)
    return np.asarray(jax.nn.softmax(jnp.asarray(found.x)))


def judge(exact: dict[str, Any]) -> list[Claim]:
    """Returns the claims about these optima, with their measured numbers."""
    row, right, wrong = (exact[name] for name in ("DPO", "R-DPO", "R-DPO, wrong sign"))
    off = lambda row, length: abs(row["length"] - length)
    distance = functools.partial(Number, direction="below", bound=5e-3, style=".1e", unit="tokens")
    error = functools.partial(Number, direction="below", bound=1e-3, style=".1e")
    return [
        Claim(
            "exact: labels that favour length lengthen DPO's optimum",
            "8.138 tokens, closed form (unbiased: 6)",
            [
                distance(off(row, 8.138), label="length off by"),
                error(row["error"], label="largest error of a probability"),
            ],
            f"{row['length']:.3f} tokens",
        ),
        Claim(
            "exact: R-DPO with α the bias gives the unbiased optimum, with the wrong sign a longer one",
            "6.000 and 9.237 tokens, closed form",
            [
                distance(off(wrong, 9.237), label="longer one off by"),
                error(max(right["error"], wrong["error"]), label="largest error of a probability"),
            ],
            f"{right['length']:.3f} and {wrong['length']:.3f} tokens",
        ),
    ]
