"""Preference losses against TRL's own numbers (trl_losses.json), worked examples, limits and optima."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

from jaxft import losses
from jaxft.losses import Pairs

TRL = json.loads(pathlib.Path(__file__).with_name("trl_losses.json").read_text())
DATA = {name: jnp.asarray(value) for name, value in TRL["inputs"].items()}
LENGTHS = DATA["mask"].sum(1)
f_dpo = lambda h: losses.diverged(losses.dpo_loss, h)
ALPHA_HALF = losses.alpha_divergence(0.5)
without_nll = lambda pairs, beta: losses.orpo_loss(pairs, beta=beta) - losses.nll_loss(pairs)
SAME_AS_TRL = {
    "dpo": losses.dpo_loss,
    "hinge": losses.hinge_loss,
    "ipo": losses.ipo_loss,
    "exo": losses.exo_loss,
    "nca": losses.nca_loss,
    "robust": losses.robust_dpo_loss,
    "bco_pair": losses.bco_pair_loss,
    "sppo": losses.sppo_loss,
    "aot": losses.aot_loss,
    "aot_unpaired": losses.aot_unpaired_loss,
    "apo_zero": losses.apo_zero_loss,
    "apo_down": losses.apo_down_loss,
    "discopop": losses.discopop_loss,
    "normalised": losses.normalised_dpo_loss,
    "forward_kl": f_dpo(losses.forward_kl),
    "jensen_shannon": f_dpo(losses.jensen_shannon),
    "alpha_divergence": f_dpo(ALPHA_HALF),
    "hinge, forward_kl": losses.diverged(losses.hinge_loss, losses.forward_kl),
    "ipo, jensen_shannon": losses.diverged(losses.ipo_loss, losses.jensen_shannon),
    "exo, jensen_shannon": losses.diverged(losses.exo_loss, losses.jensen_shannon),
    "robust, alpha_divergence": losses.diverged(losses.robust_dpo_loss, ALPHA_HALF),
    "discopop, jensen_shannon": losses.diverged(losses.discopop_loss, losses.jensen_shannon),
    "normalised, alpha_divergence": losses.diverged(losses.normalised_dpo_loss, ALPHA_HALF),
    "cpo_ipo": functools.partial(losses.cpo_ipo_loss, cpo_alpha=0.0),
    "cpo": functools.partial(losses.cpo_loss, cpo_alpha=0.0),
    "slic": losses.slic_loss,
    "simpo": losses.simpo_loss,
    "alpha_po": losses.alpha_po_loss,
    "orpo": without_nll,
}
NOT_OURS = {
    "losses", "mean", "gradient", "loss_type", "loss_types", "f_divergence_type", "use_weighting",
}  # fmt: skip


def pairs_of(sums, ref=DATA["ref"], lengths=LENGTHS):
    half = lambda x: (x[: len(x) // 2], x[len(x) // 2 :])
    return Pairs(*half(sums), *half(ref), *half(lengths))


def close(ours, theirs):
    chex.assert_trees_all_close(ours, jnp.asarray(theirs, jnp.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_values_and_gradients_are_trls(name):
    expected = TRL["expected"][name]
    options = {k: v for k, v in expected.items() if k not in NOT_OURS}
    loss = functools.partial(SAME_AS_TRL[name], **options)
    sums = DATA["log_probs"].sum(1)
    mean = lambda sums: jnp.mean(loss(pairs_of(sums)))
    value, gradient = jax.jit(jax.value_and_grad(mean))(sums)
    if "aot" not in name:  # which sorts the batch, and TRL's single values are of batches of one
        close(loss(pairs_of(sums)), expected["losses"])
    close(value, expected["mean"])
    close(gradient, expected["gradient"])


@pytest.mark.parametrize("loss", [losses.aot_loss, losses.aot_unpaired_loss])
def test_aot_is_that_of_sorted_numbers_of_the_pairs_that_count(loss):
    """A plain loop over NumPy's sorted lists; each value stands at its own pair."""
    rng = np.random.default_rng(0)
    w, lost, ref_w, ref_lost = rng.normal(0, 3, (4, 7)).astype(np.float32)
    w[2], ref_w[4] = 50, -50  # of pairs that do not count: at either end
    counted = np.array([1, 1, 0, 1, 0, 1, 1], np.float32)
    paired = loss is losses.aot_loss
    own, other = (w - lost, ref_w - ref_lost) if paired else (w - ref_w, lost - ref_lost)
    found = loss(Pairs(*map(jnp.asarray, (w, lost, ref_w, ref_lost)), counted=counted), beta=0.3)
    rows = np.flatnonzero(counted)
    for row, partner in zip(rows[np.argsort(own[rows])], np.sort(other[rows]), strict=True):
        close(found[row], np.log1p(np.exp(-0.3 * (own[row] - partner))))
    assert np.all(np.isfinite(found))
    assert losses.compares_pairs(functools.partial(loss, beta=0.3))
    assert not losses.compares_pairs(functools.partial(losses.dpo_loss, beta=0.3))


def test_whether_a_function_of_ones_own_compares_pairs_is_seen():
    """Losses by whether a batch's statistics, ranks or count change another pair's value."""
    dpo, margins = losses.dpo_loss, lambda pairs: pairs.chosen - pairs.rejected
    comparing = [
        lambda pairs: losses.aot_loss(pairs, beta=0.3) + losses.nll_loss(pairs),
        lambda pairs: dpo(pairs) * pairs.counted.sum(),
        lambda pairs: dpo(pairs) * (margins(pairs) > jnp.median(margins(pairs))),
        lambda pairs: dpo(pairs) * jnp.ones(7),  # cannot be tried
    ]
    alone = [
        lambda pairs: dpo(pairs, beta=0.3) + losses.simpo_loss(pairs) * pairs.prompt_lengths,
        functools.partial(lambda pairs, scale: scale * dpo(pairs), scale=2.0),
    ]
    assert all(map(losses.compares_pairs, comparing))
    assert not any(map(losses.compares_pairs, alone))
    comparing[-1].compares_pairs = False  # said
    assert not losses.compares_pairs(comparing[-1])


def test_wpo_weights_are_trls():
    weights = losses.wpo_weights(DATA["log_probs"], DATA["collision"], DATA["mask"])
    plain = losses.dpo_loss(pairs_of(DATA["log_probs"].sum(1)), beta=0.3)
    close(plain * weights[:5] * weights[5:], TRL["expected"]["wpo"]["losses"])


@pytest.mark.parametrize("name, rows", [("kto", 10), ("kto_good", 5)])
def test_kto_is_trls(name, rows):
    expected = TRL["expected"][name]
    weights = {k: expected[k] for k in ("beta", "desirable_weight", "undesirable_weight")}
    kl = losses.kto_kl((DATA["kl"] - DATA["log_probs"].sum(1))[:rows])
    labels = jnp.arange(rows) < 5

    def mean(sums):
        return jnp.mean(losses.kto_loss(sums - DATA["ref"][:rows], labels, kl, **weights))

    value, gradient = jax.value_and_grad(mean)(DATA["log_probs"].sum(1)[:rows])
    close(value, expected["mean"])
    close(gradient, expected["gradient"])


def test_bradley_terry_is_trls():
    expected = TRL["expected"]["reward"]
    margin = 0.1 * jnp.arange(5.0)
    mean = lambda r: jnp.mean(
        losses.bradley_terry_loss(
            r[:5], r[5:], margin, center_rewards_coefficient=expected["coefficient"]
        )
    )
    value, gradient = jax.value_and_grad(mean)(DATA["ref"])
    close(value, expected["mean"])
    close(gradient, expected["gradient"])


# Worked by hand: Δ = (2, -1.5).
TINY = Pairs(
    jnp.array([-10.0, -12.0]), jnp.array([-14.0, -11.0]),
    jnp.array([-11.0, -11.5]), jnp.array([-13.0, -12.0]),
    jnp.array([5.0, 6.0]), jnp.array([8.0, 4.0]),
)  # fmt: skip


summed = lambda pairs: pairs._replace(chosen_lengths=jnp.ones(2), rejected_lengths=jnp.ones(2))


@pytest.mark.parametrize(
    "loss, expected",
    [
        (losses.dpo_loss, (0.598139, 0.770957)),
        (functools.partial(losses.dpo_loss, label_smoothing=0.1), (0.618139, 0.755957)),
        (losses.length_regularised_dpo_loss, (0.668460, 0.718460)),
        (losses.dpop_loss, (0.598139, 2.718267)),
        (functools.partial(losses.normalised_dpo_loss, beta=0.1), (0.677029, 0.709953)),
        (functools.partial(losses.simpo_loss, simpo_gamma=1.0), (1.701413, 0.474077)),
        (functools.partial(losses.cpo_loss, cpo_alpha=0.0), (0.513015, 0.744397)),
        (losses.cpo_loss, (0.513015 + 10 / 5, 0.744397 + 12 / 6)),
        (losses.orpo_loss, (2 + 0.0851757, 2 + 0.0362093)),
        (losses.robust_dpo_loss, (0.573139, 0.789707)),
        (losses.hinge_loss, (0.8, 1.15)),
        (losses.ipo_loss, (21.855625, 28.444444)),
        (lambda pairs: losses.ipo_loss(summed(pairs)), (9, 42.25)),
        (losses.exo_loss, (2.422015, 3.022554)),
        (losses.nca_loss, (1.338793, 1.424888)),
        (losses.bco_pair_loss, (1.288793, 1.462856)),
        (functools.partial(losses.sppo_loss, beta=0.1), (32, 66.25)),
        (losses.aot_loss, (0.598139, 0.770957)),
        (losses.aot_unpaired_loss, (0.693147, 0.668460)),
        (losses.apo_zero_loss, (0.950042, 1.037477)),
        (losses.apo_down_loss, (0.975145, 1.024932)),
        (losses.discopop_loss, (0.814763, 0.789495)),
        (f_dpo(losses.forward_kl), (0.582517, 0.759239)),
        (f_dpo(losses.jensen_shannon), (0.644397, 0.726734)),
        (f_dpo(ALPHA_HALF), (0.594349, 0.763190)),
        # The first reference prefers the chosen one by 2, the second by 0.5: both as in DPO here.
        (losses.hybrid_dpo_loss, (0.598139, 0.770957)),
        # 0.8 DPO + 0.2 BCO-pair + NLL of 10 / 5 and 12 / 6 nats per token.
        (
            losses.mpo_loss,
            (0.8 * 0.598139 + 0.2 * 1.288793 + 2, 0.8 * 0.770957 + 0.2 * 1.462856 + 2),
        ),
        (
            lambda pairs: losses.tpo_loss(
                pairs, jnp.array([-6.0, -3.0]), jnp.array([3.0, 2.0]), beta=0.1
            ),
            (0.513015 + 2, 0.744397 + 1.5),
        ),
    ],
)
def test_worked_examples(loss, expected):
    chex.assert_trees_all_close(loss(TINY), jnp.asarray(expected), rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        losses.length_regularised_dpo_loss,
        functools.partial(losses.dpop_loss, dpop_lambda=5.0),
        functools.partial(losses.alpha_po_loss, alpha=1e-3),
        losses.orpo_loss,
        losses.cpo_loss,
    ],
)
def test_gradients_are_finite_differences(loss):
    run = lambda *sums: loss(
        TINY._replace(chosen=jnp.asarray(sums[0]), rejected=jnp.asarray(sums[1]))
    )
    check_grads(run, (TINY.chosen, TINY.rejected), order=1, modes="rev", atol=1e-2, rtol=1e-2)


def test_a_policy_that_is_its_reference():
    same = TINY._replace(ref_chosen=TINY.chosen, ref_rejected=TINY.rejected)
    for beta in (0.05, 0.1, 2.0):
        value, gradient = jax.value_and_grad(
            lambda w, beta=beta: losses.dpo_loss(same._replace(chosen=w), beta=beta).sum()
        )(same.chosen)
        close(value, 2 * np.log(2))
        close(gradient, [-beta / 2] * 2)
        close(losses.ipo_loss(same, beta=beta), [1 / (4 * beta**2)] * 2)
        close(losses.apo_zero_loss(same, beta=beta), [1.0, 1.0])


def test_worked_examples_of_single_completions_and_rewards():
    a, b = TINY.chosen - TINY.ref_chosen, TINY.rejected - TINY.ref_rejected
    kto = functools.partial(losses.kto_loss, kl=jnp.float32(0.3))
    close(kto(a, jnp.array([True, True])), [0.482507, 0.519989])
    close(kto(b, jnp.array([False, False])), [0.467546, 0.517493])
    good, bad = jnp.array([1.2, 0.1]), jnp.array([0.3, 0.4])
    close(losses.bradley_terry_loss(good, bad), [0.341154, 0.854355])
    close(losses.bradley_terry_loss(good, bad, jnp.full(2, 0.5)), [0.513015, 1.171101])


def test_bco_is_a_loop_and_ratios_weigh_what_is_bad_alone():
    ratios, delta = jnp.array([1.0, -2.0, 0.5, 3.0]), 0.2
    labels, weights = jnp.array([True, False, True, False]), jnp.array([9.0, 2.0, 9.0, 0.5])
    loss = functools.partial(losses.bco_loss, ratios, labels, jnp.float32(delta), beta=0.3)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    rewards = 0.3 * np.asarray(ratios) - delta
    plain = [-np.log(sigmoid(r if good else -r)) for r, good in zip(rewards, labels, strict=True)]
    close(loss(), plain)
    close(loss(ratios=weights), np.array(plain) * [1.0, 2.0, 1.0, 0.5])
    moved = jax.grad(lambda d: losses.bco_loss(ratios, labels, d).sum())(jnp.float32(delta))
    assert moved == 0


def test_orpo_counts_the_tokens_of_prompts_where_it_is_told_to():
    whole = TINY._replace(prompt=jnp.array([-6.0, -3.0]), prompt_lengths=jnp.array([3.0, 0.0]))
    rest = losses.orpo_loss(TINY) - losses.nll_loss(TINY)
    found = losses.orpo_loss(whole, nll_on_prompt=True) - rest
    close(found, [(10 + 6) / (5 + 3), (12 + 3) / 6])
    close(losses.orpo_loss(whole), losses.orpo_loss(TINY))
    with pytest.raises(ValueError, match="nll_on_prompt needs prompt and prompt_lengths"):
        losses.orpo_loss(TINY, nll_on_prompt=True)


def test_a_reference_that_is_wrong_holds_no_hybrid_back():
    wrong = TINY._replace(ref_chosen=TINY.ref_rejected - 3)
    free = -jax.nn.log_sigmoid(0.1 * (TINY.chosen - TINY.rejected))
    close(losses.hybrid_dpo_loss(wrong), free)
    assert (jnp.abs(losses.dpo_loss(wrong) - free) > 1e-2).all()


def test_length_desensitised_sums_are_a_loop():
    log_probs = -jnp.arange(1.0, 13.0).reshape(2, 6)
    mask = jnp.array([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], jnp.float32)
    sums = functools.partial(losses.length_desensitised, log_probs, mask, jnp.array([2.0, 2.0]))
    close(sums(0.25), [-2 - 3 - 0.25 * (4 + 5), -9 - 10])
    close(sums(1.0), jnp.sum(log_probs * mask, axis=1))
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2.0"):
        sums(2.0)


def test_limits_in_which_a_loss_becomes_another():
    swapped = Pairs(*(TINY[i] for i in (1, 0, 3, 2, 5, 4)))
    dpo = losses.dpo_loss(TINY)
    close(losses.robust_dpo_loss(TINY, label_smoothing=0.0), dpo)
    close(f_dpo(lambda u: u)(TINY), dpo)
    close(f_dpo(losses.alpha_divergence(1.0))(TINY), dpo)
    close(losses.length_regularised_dpo_loss(TINY, alpha=0.0), dpo)
    close(losses.dpop_loss(TINY, dpop_lambda=0.0), dpo)
    close(losses.dpo_loss(TINY, beta=1e-6), [np.log(2)] * 2)
    # The loss of a swapped pair is that of a label that is surely wrong.
    close(losses.dpo_loss(swapped, label_smoothing=0.25) - losses.dpo_loss(TINY, label_smoothing=0.25),
          0.5 * (losses.dpo_loss(swapped) - dpo))  # fmt: skip
    simpo = losses.simpo_loss(TINY)
    close(losses.alpha_po_loss(TINY, alpha=0.0), simpo)
    chex.assert_trees_all_close(losses.alpha_po_loss(TINY, alpha=1e-4), simpo, rtol=1e-3)
    optimum = TINY._replace(ref_chosen=TINY.chosen - 5, ref_rejected=TINY.rejected + 5)
    close(losses.sppo_loss(optimum, beta=0.1), [0.0, 0.0])
    at_rest = TINY._replace(ref_chosen=TINY.chosen - 1, ref_rejected=TINY.rejected + 1)
    close(losses.sppo_loss(at_rest, beta=0.1, win_rate=0.6), [0.0, 0.0])
    labels = jnp.array([True, False])
    ratios = TINY.chosen - TINY.ref_chosen
    apo = jnp.array([1 - jax.nn.sigmoid(0.1 * ratios[0]), jax.nn.sigmoid(0.1 * ratios[1])])
    close(losses.kto_loss(ratios, labels, jnp.float32(0)), apo)
    one = lambda r: losses.bco_loss(r, labels, jnp.float32(0.3))
    pair = Pairs(ratios[:1], ratios[1:], jnp.zeros(1), jnp.zeros(1))
    close(one(ratios).sum(), losses.bco_pair_loss(pair, delta=0.3)[0])
    close(losses.correctness_loss(ratios, labels), -jax.nn.log_sigmoid(jnp.array([1.0, 0.5])))


def test_a_batch_of_good_completions_alone_has_no_nan_and_kl_gets_no_gradient():
    ratios, labels = jnp.array([0.5, -0.2]), jnp.array([True, True])
    total = lambda kl: losses.kto_loss(ratios, labels, kl).sum()
    assert jax.grad(total)(jnp.float32(0.3)) == 0
    assert jax.grad(lambda r: losses.kto_kl(r))(ratios).tolist() == [0, 0]
    assert losses.kto_kl(-jnp.ones(3)) == 0
    close(losses.kto_kl(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0])), 2.0)
    assert losses.kto_kl(jnp.ones(2), jnp.zeros(2)) == 0


def test_orpo_stays_finite_where_the_odds_are_not():
    certain = TINY._replace(chosen=jnp.zeros(2), rejected=jnp.array([-1000.0, 0.0]))
    value, gradient = jax.value_and_grad(
        lambda w: losses.orpo_loss(certain._replace(chosen=w)).sum()
    )(certain.chosen)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def optimum(loss, lengths, bias, rewards, beta):
    """The policy over five responses that minimises `loss` of all pairs, labelled by Bradley and Terry."""
    i, j = (jnp.asarray(x) for x in np.nonzero(~np.eye(5, dtype=bool)))
    label = jax.nn.sigmoid(rewards[i] - rewards[j] + bias * (lengths[i] - lengths[j]))
    ref = jnp.full(5, -jnp.log(5.0))

    @jax.jit
    @jax.value_and_grad
    def total(logits):
        log_p = jax.nn.log_softmax(logits)
        pairs = Pairs(log_p[i], log_p[j], ref[i], ref[j], lengths[i], lengths[j])
        return jnp.sum(label * loss(pairs, beta=beta))

    run = lambda x: [np.asarray(v, np.float64) for v in total(jnp.asarray(x, jnp.float32))]
    found = scipy.optimize.minimize(run, np.zeros(5), jac=True, method="BFGS", tol=1e-5)
    return np.asarray(jax.nn.softmax(jnp.asarray(found.x)))


def test_optima_with_and_without_length_bias():
    lengths, rewards = jnp.arange(2.0, 12.0, 2.0), jnp.array([1.0, 0.5, 0.0, 0.5, 1.0])
    best = np.asarray(jax.nn.softmax(rewards / 0.5))  # π_ref exp(r / β) / Z with a uniform π_ref
    run = functools.partial(optimum, lengths=lengths, rewards=rewards, beta=0.5)
    assert np.abs(run(losses.dpo_loss, bias=0.0) - best).max() < 1e-3
    assert np.abs(run(losses.dpo_loss, bias=0.1) @ np.asarray(lengths) - 8.138) < 5e-3
    for alpha, length in ((0.1, 6.000), (-0.1, 9.237)):
        loss = functools.partial(losses.length_regularised_dpo_loss, alpha=alpha)
        found = run(loss, bias=0.1)
        assert abs(found @ np.asarray(lengths) - length) < 5e-3
        assert (np.abs(found - best).max() < 1e-3) == (alpha > 0)


def test_the_surrogates_gradient_is_that_of_kl():
    """All texts of two tokens of three, enumerated."""
    first, second = np.divmod(np.arange(9), 3)
    keys = jax.random.split(jax.random.key(0), 2)
    theta, ref = (jax.random.normal(k, (4, 3)) for k in keys)

    def log_prob(theta):
        rows = jax.nn.log_softmax(theta)
        return rows[0, first] + rows[1 + first, second]

    def kl(theta):
        log_p = log_prob(theta)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_prob(ref)))

    def surrogate(theta, baseline):
        log_p = log_prob(theta)
        weight = jax.lax.stop_gradient(jnp.exp(log_p))
        return jnp.sum(
            weight * losses.reverse_kl_surrogate(log_p, log_prob(ref), jnp.full(9, baseline))
        )

    expected = jax.grad(kl)(theta)
    for baseline in (0.0, 3.0):
        close(jax.grad(surrogate)(theta, baseline), expected)
    weight = jnp.exp(log_prob(theta))
    estimates = losses.kl_estimates(log_prob(theta), log_prob(ref))
    close(weight @ estimates.k1, kl(theta))
    close(weight @ estimates.k3, kl(theta))
    assert (estimates.k3 >= 0).all() and (estimates.k2 >= 0).all()


def test_leave_one_out_is_a_loop():
    values = np.array([1.0, 2.0, 6.0, 0.0, 3.0, 3.0])
    slow = [np.delete(values[i // 3 * 3 : i // 3 * 3 + 3], i % 3).mean() for i in range(6)]
    close(losses.leave_one_out(jnp.asarray(values, jnp.float32), 3), slow)
    for size in (1, 4):
        with pytest.raises(ValueError, match=f"group_size={size} for 6 values"):
            losses.leave_one_out(jnp.zeros(6), size)


def test_mistakes_are_explained():
    with pytest.raises(ValueError, match="beta must be positive, got 0.0"):
        losses.dpo_loss(TINY, beta=0.0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 0.5\), got 0.5"):
        losses.robust_dpo_loss(TINY, label_smoothing=0.5)
    with pytest.raises(ValueError, match="label_smoothing must be above 0, got 0.0"):
        losses.exo_loss(TINY, label_smoothing=0.0)
    with pytest.raises(ValueError, match="give ref_chosen and ref_rejected"):
        losses.ipo_loss(TINY._replace(ref_chosen=None))
    with pytest.raises(ValueError, match="give chosen_lengths"):
        losses.simpo_loss(TINY._replace(chosen_lengths=None))
    with pytest.raises(AssertionError):
        losses.dpo_loss(TINY._replace(chosen=TINY.chosen[:, None]))


def test_a_correctness_label_may_be_a_probability():
    rewards, labels = jnp.array([1.5, -0.3, 2.0]), jnp.array([True, False, True])
    for soft in (labels.astype(jnp.float32), jnp.array([1.0, 0.0, 1.0])):
        chex.assert_trees_all_close(
            losses.correctness_loss(rewards, soft), losses.correctness_loss(rewards, labels)
        )
    # The best reward is the log-odds of the label, where the loss is the entropy.
    p = jnp.array([0.25, 0.5, 0.9])
    best = jnp.log(p) - jnp.log1p(-p)
    gradient = jax.grad(lambda r: losses.correctness_loss(r, p).sum())(best)
    chex.assert_trees_all_close(gradient, jnp.zeros(3), atol=1e-6)
    entropy = -p * jnp.log(p) - (1 - p) * jnp.log1p(-p)
    chex.assert_trees_all_close(losses.correctness_loss(best, p), entropy, rtol=1e-5)
