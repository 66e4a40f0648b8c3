"""Losses of preference pairs against a reference model, one value per pair.

All take `Pairs`, so that an objective accepts any of them; add their values to combine several (if
one of them compares pairs, see `compares_pairs`). Symbols: a, b are the log-ratios log π/π_ref of
the chosen and the rejected completion, Δ = a - b, n_w and n_l their lengths in tokens.
Hyperparameters are named as in TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Pairs(NamedTuple):
    """Log-probs in nats of the two completions of each pair, each summed over its tokens."""

    chosen: jax.Array  # [B] log π(chosen | prompt)
    rejected: jax.Array  # [B]
    ref_chosen: jax.Array | None = None  # [B] under the reference model; gets no gradient
    ref_rejected: jax.Array | None = None  # [B]
    chosen_lengths: jax.Array | None = None  # [B] tokens, stop token included; at least 1
    rejected_lengths: jax.Array | None = None  # [B]
    prompt: jax.Array | None = None  # [B] log π(prompt) without its first token
    prompt_lengths: jax.Array | None = None  # [B] number of these tokens
    counted: jax.Array | None = (
        None  # [B] above 0 where a pair counts; None: all. For `compares_pairs`
    )


def log_ratios(pairs: Pairs) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(a, b): log π(y | x) - log π_ref(y | x) of the chosen and of the rejected completions.

    Raises:
        ValueError: without log-probs of the reference.
    """
    if pairs.ref_chosen is None or pairs.ref_rejected is None:
        raise ValueError(
            "this loss compares with a reference model: give ref_chosen and ref_rejected, or use one "
            "that needs none (simpo_loss, cpo_loss, orpo_loss, slic_loss)."
        )
    chex.assert_equal_shape(pairs[:4])  # [B] with [B, 1] would broadcast to [B, B].
    still = jax.lax.stop_gradient
    return pairs.chosen - still(pairs.ref_chosen), pairs.rejected - still(pairs.ref_rejected)


def lengths(pairs: Pairs) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(n_w, n_l) in float32.

    Raises:
        ValueError: if the pairs have none.
    """
    if pairs.chosen_lengths is None or pairs.rejected_lengths is None:
        raise ValueError("this loss divides by lengths: give chosen_lengths and rejected_lengths.")
    chex.assert_equal_shape([pairs.chosen, pairs.chosen_lengths, pairs.rejected_lengths])
    return pairs.chosen_lengths.astype(jnp.float32), pairs.rejected_lengths.astype(jnp.float32)


def dpo_loss(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    """-(1 - ε) log σ(β Δ) - ε log σ(-β Δ): prefers the chosen one more than the reference does.

    Direct preference optimization: Rafailov et al., 2023, arxiv.org/abs/2305.18290, eq. 7; with ε its
    conservative form (Mitchell, 2023, "A note on DPO with noisy preferences").

    Args:
        beta: β, weight of the implicit KL penalty, positive.
        label_smoothing: ε, the assumed rate of wrong labels, in [0, 0.5).
    """
    a, b = log_ratios(pairs)
    return smoothed_logistic(_positive(beta) * (a - b), label_smoothing)


def robust_dpo_loss(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Array, " B"]:
    """[-(1 - ε) log σ(β Δ) + ε log σ(-β Δ)] / (1 - 2 ε): unbiased where a share ε of labels is flipped.

    Robust DPO: Chowdhury et al., 2024, arxiv.org/abs/2403.00409.
    """
    a, b = log_ratios(pairs)
    z, epsilon = _positive(beta) * (a - b), _smoothing(label_smoothing)
    clean, flipped = -jax.nn.log_sigmoid(z), -jax.nn.log_sigmoid(-z)
    return ((1 - epsilon) * clean - epsilon * flipped) / (1 - 2 * epsilon)


def hinge_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """max(0, 1 - β Δ).

    The normalised SLiC loss of RSO: Liu et al., 2023, arxiv.org/abs/2309.06657.
    """
    a, b = log_ratios(pairs)
    return jax.nn.relu(1 - _positive(beta) * (a - b))


def ipo_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """(a / n_w - b / n_l - 1 / (2 β))².

    IPO: Azar et al., 2023, arxiv.org/abs/2310.12036, eq. 17 (β is its τ). Per-token means instead
    of the sums in the paper's formula: its results use means, as the authors told TRL's
    maintainers.
    """
    (a, b), (n_w, n_l) = log_ratios(pairs), lengths(pairs)
    return (a / n_w - b / n_l - 1 / (2 * _positive(beta))) ** 2


def exo_loss(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3
) -> Float[Array, " B"]:
    """KL((q, 1 - q) || (1 - ε, ε)) with q = σ(β Δ): the reverse of DPO's KL.

    EXO: Ji et al., 2024, arxiv.org/abs/2402.00856, eq. 16, for two completions.

    Args:
        label_smoothing: ε, in (0, 0.5): with 0 the divergence would be infinite.
    """
    if label_smoothing == 0:
        raise ValueError("exo_loss: label_smoothing must be above 0, got 0.0; 1e-3 is usual.")
    a, b = log_ratios(pairs)
    z, epsilon = _positive(beta) * (a - b), _smoothing(label_smoothing)
    q, log_q, log_rest = jax.nn.sigmoid(z), jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z)
    return q * (log_q - jnp.log1p(-epsilon)) + (1 - q) * (log_rest - jnp.log(epsilon))


def nca_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """-log σ(β a) - ½ log σ(-β a) - ½ log σ(-β b): keeps the chosen one's likelihood from falling.

    NCA: Chen et al., 2024, arxiv.org/abs/2402.05369, for two completions.
    """
    r_w, r_l = (_positive(beta) * x for x in log_ratios(pairs))
    log_sigmoid = jax.nn.log_sigmoid
    return -log_sigmoid(r_w) - 0.5 * log_sigmoid(-r_w) - 0.5 * log_sigmoid(-r_l)


def sppo_loss(
    pairs: Pairs, *, beta: float = 1e-3, win_rate: float | Float[Array, " B"] = 1.0
) -> Float[Array, " B"]:
    """(a - (P - ½) / β)² + (b + (P - ½) / β)².

    SPPO: Wu et al., 2024, arxiv.org/abs/2405.00675, eq. 4.7 (β is 1/η).

    Args:
        win_rate: P, how often the chosen completion wins against the policy's others, and the rejected one
            loses; 1 is TRL's "sppo_hard".
    """
    a, b = log_ratios(pairs)
    edge = (win_rate - 0.5) / _positive(beta)
    return (a - edge) ** 2 + (b + edge) ** 2


def bco_pair_loss(pairs: Pairs, *, beta: float = 0.1, delta: float = 0.0) -> Float[Array, " B"]:
    """-log σ(β a - δ) - log σ(-(β b - δ)): a binary classifier of single completions.

    BCO: Jung et al., 2024, arxiv.org/abs/2404.04656, here with both completions of a pair.
    """
    a, b = log_ratios(pairs)
    good, bad = _positive(beta) * a - delta, beta * b - delta
    return -jax.nn.log_sigmoid(good) - jax.nn.log_sigmoid(-bad)


def apo_zero_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """1 - σ(β a) + σ(β b): for chosen completions that are better than the model's own.

    APO: D'Oosterlinck et al., 2024, arxiv.org/abs/2408.06266, eq. 7.
    """
    a, b = log_ratios(pairs)
    return 1 - jax.nn.sigmoid(_positive(beta) * a) + jax.nn.sigmoid(beta * b)


def apo_down_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """σ(β a) + 1 - σ(β Δ): for chosen completions that are worse than the model's own.

    APO: D'Oosterlinck et al., 2024, arxiv.org/abs/2408.06266, eq. 8.
    """
    a, b = log_ratios(pairs)
    return jax.nn.sigmoid(_positive(beta) * a) + 1 - jax.nn.sigmoid(beta * (a - b))


def aot_loss(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    """DPO's loss of sorted margins: the policy's distribution of margins should dominate the reference's.

    AOT: Melnyk et al., 2024, arxiv.org/abs/2406.05882. The k-th smallest margin is compared with the k-th
    smallest margin of the reference, among the pairs that count; the value belongs to the pair of
    the policy's margin. It compares pairs (`compares_pairs`), so `preference` refuses microbatches
    with it.
    """
    log_ratios(pairs)  # Checks.
    margins = pairs.chosen - pairs.rejected
    ref_margins = jax.lax.stop_gradient(pairs.ref_chosen - pairs.ref_rejected)
    z = _positive(beta) * (margins - _of_equal_rank(margins, ref_margins, pairs.counted))
    return smoothed_logistic(z, label_smoothing)


aot_loss.compares_pairs = True


def aot_unpaired_loss(
    pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Array, " B"]:
    """DPO's loss of the sorted a against the sorted b: the pairing does not matter.

    AOT: Melnyk et al., 2024, arxiv.org/abs/2406.05882, unpaired. The value belongs to the pair of
    a; see `aot_loss` on batches.
    """
    a, b = log_ratios(pairs)
    z = _positive(beta) * (a - _of_equal_rank(a, b, pairs.counted))
    return smoothed_logistic(z, label_smoothing)


aot_unpaired_loss.compares_pairs = True


def discopop_loss(
    pairs: Pairs, *, beta: float = 0.1, discopop_tau: float = 0.05
) -> Float[Array, " B"]:
    """(1 - g) (-log σ(β Δ)) + g exp(-β Δ) with g = σ(β Δ / τ).

    DiscoPOP: Lu et al., 2024, arxiv.org/abs/2406.08414, eq. 5.
    """
    a, b = log_ratios(pairs)
    z = _positive(beta) * (a - b)
    gate = jax.nn.sigmoid(z / _positive(discopop_tau, "discopop_tau"))
    return (1 - gate) * -jax.nn.log_sigmoid(z) + gate * jnp.exp(-z)


def normalised_dpo_loss(pairs: Pairs, *, beta: float = 5.0) -> Float[Array, " B"]:
    """-log σ(β (a / n_w - b / n_l)): DPO with per-token means and therefore a larger β.

    Tülu 3: Lambert et al., 2024, arxiv.org/abs/2411.15124. TRL's "sigmoid_norm".
    """
    (a, b), (n_w, n_l) = log_ratios(pairs), lengths(pairs)
    return -jax.nn.log_sigmoid(_positive(beta) * (a / n_w - b / n_l))


def length_regularised_dpo_loss(
    pairs: Pairs, *, beta: float = 0.1, alpha: float = 0.05
) -> Float[Array, " B"]:
    """-log σ(β Δ + α (n_w - n_l)): DPO for a reward with a length bias of α per token.

    R-DPO: Park et al., 2024, arxiv.org/abs/2403.19159, with the sign that penalises length (see
    tests for the closed form: labels biased by α a token give the unbiased optimum).
    """
    (a, b), (n_w, n_l) = log_ratios(pairs), lengths(pairs)
    return -jax.nn.log_sigmoid(_positive(beta) * (a - b) + alpha * (n_w - n_l))


def dpop_loss(pairs: Pairs, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> Float[Array, " B"]:
    """-log σ(β (Δ - λ max(0, -a))): DPO that penalises a falling likelihood of the chosen completion.

    DPO-Positive: Pal et al., 2024, arxiv.org/abs/2402.13228.
    """
    a, b = log_ratios(pairs)
    return -jax.nn.log_sigmoid(_positive(beta) * (a - b - dpop_lambda * jax.nn.relu(-a)))


def hybrid_dpo_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """-log σ(β ((log π(y_w) - log π(y_l)) - max(0, log π_ref(y_w) - log π_ref(y_l)))).

    Hybrid-DPO, which its authors call HyPO: arxiv.org/abs/2602.11902 (from its abstract). A
    reference that ranks the pair wrongly no longer restrains the policy. This is not
    `objectives.hypo`.
    """
    log_ratios(pairs)  # Checks.
    ref_margin = jax.nn.relu(jax.lax.stop_gradient(pairs.ref_chosen - pairs.ref_rejected))
    return -jax.nn.log_sigmoid(_positive(beta) * (pairs.chosen - pairs.rejected - ref_margin))


def mpo_loss(pairs: Pairs, *, beta: float = 0.1) -> Float[Array, " B"]:
    """0.8 `dpo_loss` + 0.2 `bco_pair_loss` + `nll_loss`: any losses of pairs may be added like this.

    MPO: Wang et al., 2024, arxiv.org/abs/2411.10442; the likelihood is a mean over tokens here.
    """
    return (
        0.8 * dpo_loss(pairs, beta=beta) + 0.2 * bco_pair_loss(pairs, beta=beta) + nll_loss(pairs)
    )


def diverged(
    loss: Callable[..., jax.Array], h: Callable[[jax.Array], jax.Array]
) -> Callable[..., jax.Array]:
    """Returns the loss of h(a) and h(b) instead of a and b: another divergence than the reverse KL.

    f-DPO: Wang et al., 2023, arxiv.org/abs/2309.16240, for `dpo_loss`, and TRL's f_divergence_type for
    others; h(log t) = f'(t), with h(0) = 0. `forward_kl`, `jensen_shannon` and `alpha_divergence` are such
    h; the identity changes nothing. The loss must depend on the log-probs only by a and b: not
    `aot_loss`, `dpop_loss`, `hybrid_dpo_loss` or `mpo_loss`.
    """

    def diverged_loss(pairs, **settings):
        a, b = log_ratios(pairs)
        none = jnp.zeros_like(a)
        scores = {"chosen": h(a), "rejected": h(b), "ref_chosen": none, "ref_rejected": none}
        return loss(pairs._replace(**scores), **settings)

    return diverged_loss


def forward_kl(log_ratio: jax.Array) -> jax.Array:
    """h(u) = 1 - exp(-u) for `diverged`; the exponent is capped at 80, to fit float32, also below."""
    return -jnp.expm1(jnp.minimum(-log_ratio, 80.0))


def jensen_shannon(log_ratio: jax.Array) -> jax.Array:
    """h(u) = log 2 + log σ(u) for `diverged`."""
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)


def alpha_divergence(alpha: float) -> Callable[[jax.Array], jax.Array]:
    """h(u) = (exp((α - 1) u) - 1) / (α - 1) for `diverged`."""
    if alpha == 1:
        return lambda log_ratio: log_ratio
    return lambda log_ratio: jnp.expm1(jnp.minimum((alpha - 1) * log_ratio, 80.0)) / (alpha - 1)


def nll_loss(pairs: Pairs) -> Float[Array, " B"]:
    """-log π(chosen | x) / n_w in nats per token; add it to a loss of margins.

    Used in iterative RPO: Pang et al., 2024, arxiv.org/abs/2404.19733. The mean is over the tokens
    of each completion, so that it does not depend on the rest of the batch (TRL's is over all
    tokens).
    """
    return -pairs.chosen / lengths(pairs)[0]


def length_desensitised(
    log_probs: Float[Array, "*batch T"],
    mask: Float[Array, "*batch T"],
    public_lengths: Float[Array, "*batch"],
    alpha: float,
) -> Float[Array, "*batch"]:
    """Σ_t log π(y_t) over a completion's first tokens, plus α times the sum over later ones.

    LD-DPO: Liu et al., 2024, arxiv.org/abs/2409.06411: tokens beyond the length of the shorter
    completion count less. Use these sums instead of plain ones in any loss of `Pairs`, for policy
    and reference alike; α = 1 gives the plain sum.

    Args:
        mask: above 0 on the completion's tokens.
        public_lengths: tokens of the shorter completion of the pair.
        alpha: in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"length_desensitised: alpha must lie in [0, 1], got {alpha}.")
    counted = mask > 0
    place = jnp.cumsum(counted, axis=-1)
    weight = jnp.where(place <= public_lengths[..., None], 1.0, alpha)
    return jnp.sum(jnp.where(counted, weight * log_probs, 0.0), axis=-1)


def wpo_weights(
    log_probs: Float[Array, "*batch T"],
    log_collision_probs: Float[Array, "*batch T"],
    mask: Float[Array, "*batch T"],
) -> Float[Array, "*batch"]:
    """exp(mean_t [log π(y_t) - log Σ_v π(v)²]), without gradient: the policy's own likelihood of it.

    WPO: Zhou et al., 2024, arxiv.org/abs/2406.11827, eq. 2. A pair's loss is multiplied by
    the weights of both completions.

    Args:
        log_probs: of the completion's tokens.
        log_collision_probs: log Σ_v π(v)² at each of them: the expected likelihood of a sample.
        mask: 1 on the completion's tokens.
    """
    aligned = jnp.sum(mask * (log_probs - log_collision_probs), axis=-1)
    return jax.lax.stop_gradient(jnp.exp(aligned / jnp.maximum(jnp.sum(mask, axis=-1), 1.0)))


def smoothed_logistic(z: Float[Array, " B"], label_smoothing: float) -> Float[Array, " B"]:
    """-(1 - ε) log σ(z) - ε log σ(-z)."""
    epsilon = _smoothing(label_smoothing)
    return -(1 - epsilon) * jax.nn.log_sigmoid(z) - epsilon * jax.nn.log_sigmoid(-z)


def _of_equal_rank(x, y, counted):
    """For each counted x the counted y of the same rank; where nothing counts, some y."""
    out = jnp.zeros(x.shape, bool) if counted is None else ~(counted > 0)
    order, other = jnp.lexsort((x, out)), jnp.lexsort((y, out))  # uncounted ones last
    return y[other[jnp.argsort(order)]]


def _positive(value, name="beta"):
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"preference loss: {name} must be positive, got {value}.")
    return value


def _smoothing(value):
    if not 0 <= value < 0.5:
        raise ValueError(f"preference loss: label_smoothing must lie in [0, 0.5), got {value}.")
    return value
