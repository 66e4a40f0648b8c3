"""Density ratios between prompts of good and of bad completions: BCO's underlying distribution matching."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

_STEPS = 100


def density_ratios(
    embeddings: Float[np.ndarray, "N D"],
    labels: Bool[np.ndarray, " N"],
    *,
    minimum: float = 0.5,
    maximum: float = 10.0,
    fitted: int = 1024,
    seed: int = 0,
) -> Float[np.ndarray, " N"]:
    """p(ψ | good) / p(ψ | bad) of each prompt's embedding ψ, clipped: weights of bad completions.

    BCO: Jung et al., 2024, arxiv.org/abs/2404.04656, section 3.3: if good and bad completions
    answer different prompts, bad ones whose prompts resemble those of good ones get more weight.
    The ratio is the odds of a logistic regression with both classes of equal weight; the defaults
    are TRL's.

    Args:
        embeddings: of prompts, such as `mean_pool` of an encoder's hidden states.
        labels: whether the completion is good.
        minimum, maximum: limits to which ratios are clipped.
        fitted: number of completions of each class, drawn at random, for the regression.
        seed: of that draw.

    Raises:
        ValueError: if one of the classes is empty, or unless 0 <= minimum <= maximum.
    """
    if not 0 <= minimum <= maximum:
        raise ValueError(
            f"density_ratios: minimum {minimum} and maximum {maximum} must be 0 or more, in order."
        )
    x, labels = np.asarray(embeddings, np.float64), np.asarray(labels, bool)
    rng = np.random.default_rng(seed)
    draw = lambda rows: rng.permutation(rows)[:fitted]
    rows = np.concatenate([draw(np.flatnonzero(labels)), draw(np.flatnonzero(~labels))])
    weights, bias = logistic_regression(x[rows], labels[rows])
    with np.errstate(over="ignore"):  # An infinite ratio is clipped.
        return np.clip(np.exp(x @ weights + bias), minimum, maximum).astype(np.float32)


def logistic_regression(
    x: Float[np.ndarray, "N D"], labels: Bool[np.ndarray, " N"], strength: float = 1.0
) -> tuple[Float[np.ndarray, " D"], float]:
    """(w, b) of log odds w x + b, classes of equal weight: ½ |w|² + C Σ_i s_i log(1 + exp(-y_i (w x_i + b))).

    Uses Newton's method; each step is halved until the value does not rise. s_i = N / (2 N of i's
    class).

    Args:
        strength: C, weight of the data against the penalty.

    Raises:
        ValueError: without examples of both classes.
    """
    count = np.array([np.sum(~labels), np.sum(labels)])
    if not count.all():
        raise ValueError(
            f"density ratios need prompts of both labels; got {count[1]} good and {count[0]} bad ones."
        )
    scale = strength * (len(labels) / (2 * count))[labels.astype(int)]
    sign, inputs = np.where(labels, 1.0, -1.0), np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    penalty = np.ones(inputs.shape[1])
    penalty[-1] = 0.0
    # A floor keeps the bias row solvable if the classes are separated perfectly.
    floor = np.diag(np.where(penalty > 0, 0.0, 1e-9))

    def value(theta):
        return 0.5 * np.sum(penalty * theta**2) + np.sum(
            scale * np.logaddexp(0, -sign * (inputs @ theta))
        )

    theta = np.zeros(inputs.shape[1])
    for _ in range(_STEPS):
        p = 0.5 * (1 - np.tanh(0.5 * sign * (inputs @ theta)))  # of the wrong class
        gradient = penalty * theta - inputs.T @ (scale * sign * p)
        curvature = (inputs.T * (scale * p * (1 - p))) @ inputs + np.diag(penalty) + floor
        step, now = np.linalg.solve(curvature, gradient), value(theta)
        while value(theta - step) > now and np.abs(step).max() > 1e-12:
            step = step / 2
        theta = theta - step
        if np.abs(step).max() < 1e-9:
            break
    return theta[:-1], float(theta[-1])
