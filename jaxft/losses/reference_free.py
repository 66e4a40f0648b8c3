"""Losses of preference pairs that need no reference model, one value per pair. See `Pairs`."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.losses.preference import Pairs, lengths, nll_loss, smoothed_logistic

_LARGEST = -1e-6  # log-probability of a token for which the odds are still finite in float32


def simpo_loss(
    pairs: Pairs, *, beta: float = 2.0, simpo_gamma: float = 0.5, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    """-log σ(β (log π(y_w) / n_w - log π(y_l) / n_l) - γ).

    SimPO: Meng et al., 2024, arxiv.org/abs/2405.14734, eq. 6.

    Args:
        beta: β, 2 to 10 in the paper.
        simpo_gamma: γ, the target margin; 0.3 to 0.55 times β in the paper.
        label_smoothing: see `dpo_loss`.
    """
    p_w, p_l = _averages(pairs)
    return smoothed_logistic(beta * (p_w - p_l) - simpo_gamma, label_smoothing)


def alpha_po_loss(
    pairs: Pairs, *, beta: float = 2.0, simpo_gamma: float = 0.5, alpha: float = 0.25
) -> Float[Array, " B"]:
    """SimPO with the reward (1 - p^-α) / α for log p, p being the mean likelihood of a token.

    AlphaPO: Gupta et al., 2025, arxiv.org/abs/2501.03884; α = 0 is SimPO.
    """
    if alpha == 0:
        return simpo_loss(pairs, beta=beta, simpo_gamma=simpo_gamma)
    # expm1: for small α the two terms of 1 - p^-α nearly cancel.
    r_w, r_l = (-jnp.expm1(-alpha * x) / alpha for x in _averages(pairs))
    return -jax.nn.log_sigmoid(beta * (r_w - r_l) - simpo_gamma)


def cpo_loss(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0, cpo_alpha: float = 1.0
) -> Float[Array, " B"]:
    """-log σ(β (log π(y_w) - log π(y_l))) + α (-log π(y_w) / n_w).

    CPO: Xu et al., 2024, arxiv.org/abs/2401.08417, eq. 3. The likelihood term is `nll_loss`.
    """
    chex.assert_equal_shape([pairs.chosen, pairs.rejected])
    loss = smoothed_logistic(beta * (pairs.chosen - pairs.rejected), label_smoothing)
    return loss + cpo_alpha * nll_loss(pairs) if cpo_alpha else loss


def cpo_ipo_loss(pairs: Pairs, *, beta: float = 0.1, cpo_alpha: float = 1.0) -> Float[Array, " B"]:
    """(log π(y_w) / n_w - log π(y_l) / n_l - 1 / (2 β))² + α (-log π(y_w) / n_w).

    CPO with IPO's square (Azar et al., 2023, arxiv.org/abs/2310.12036, eq. 17) for a uniform reference:
    loss_type="ipo" of TRL's CPOTrainer. Its hinge is `slic_loss` + `nll_loss`.
    """
    if beta <= 0:
        raise ValueError(f"cpo_ipo_loss: beta must be positive, got {beta}.")
    p_w, p_l = _averages(pairs)
    loss = (p_w - p_l - 1 / (2 * beta)) ** 2
    return loss + cpo_alpha * nll_loss(pairs) if cpo_alpha else loss


def tpo_loss(
    pairs: Pairs,
    gold: Float[Array, " B"],
    gold_lengths: Float[Array, " B"],
    *,
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
) -> Float[Array, " B"]:
    """-log σ(β (log π(y_w) - log π(y_l))) + α (-log π(y_gold) / n_gold): CPO that imitates a third.

    TPO: Saeidi et al., 2024, arxiv.org/abs/2405.16681. TPO-L has `simpo_loss` as the first term.

    Args:
        gold: log π of the third completion, which is imitated, summed over its tokens.
        gold_lengths: number of its tokens, at least 1.
    """
    chex.assert_equal_shape([pairs.chosen, pairs.rejected, gold, gold_lengths])
    loss = -jax.nn.log_sigmoid(beta * (pairs.chosen - pairs.rejected))
    return loss - tpo_alpha * gold / gold_lengths


def slic_loss(pairs: Pairs, *, beta: float = 1.0) -> Float[Array, " B"]:
    """max(0, 1 - β (log π(y_w) - log π(y_l))); the paper's regularizer is an `nll_loss`.

    SLiC-HF: Zhao et al., 2023, arxiv.org/abs/2305.10425, divided by its δ = 1 / β.
    """
    chex.assert_equal_shape([pairs.chosen, pairs.rejected])
    return jax.nn.relu(1 - beta * (pairs.chosen - pairs.rejected))


def orpo_loss(
    pairs: Pairs, *, beta: float = 0.1, nll_on_prompt: bool = False
) -> Float[Array, " B"]:
    """-log π(y_w) / n_w - β log σ(log odds(y_w) - log odds(y_l)), odds = p / (1 - p).

    p is the mean likelihood of a token, exp(log π(y) / n). ORPO: Hong et al., 2024,
    arxiv.org/abs/2403.07691, eq. 4, 6 and 7 (β is its λ).

    Args:
        nll_on_prompt: the first term is a mean over the prompt's tokens too, -log π(x, y_w) / (n_x + n_w), as
            in the authors' code and TRL's (whose mean is over all tokens of a batch).

    Raises:
        ValueError: if nll_on_prompt is True and the pairs have no log-probs of prompts.
    """
    # A completion that is certain has infinite odds: the clamp also stops its gradient.
    p_w, p_l = (jnp.minimum(x, _LARGEST) for x in _averages(pairs))
    log_odds = lambda log_p: log_p - jax.nn.log1mexp(-log_p)
    nll = _whole_nll(pairs) if nll_on_prompt else nll_loss(pairs)
    return nll - beta * jax.nn.log_sigmoid(log_odds(p_w) - log_odds(p_l))


def _whole_nll(pairs):
    if pairs.prompt is None or pairs.prompt_lengths is None:
        raise ValueError("orpo_loss: nll_on_prompt needs prompt and prompt_lengths in the pairs.")
    chex.assert_equal_shape([pairs.chosen, pairs.prompt, pairs.prompt_lengths])
    return -(pairs.chosen + pairs.prompt) / (lengths(pairs)[0] + pairs.prompt_lengths)


def _averages(pairs):
    n_w, n_l = lengths(pairs)
    return pairs.chosen / n_w, pairs.rejected / n_l
