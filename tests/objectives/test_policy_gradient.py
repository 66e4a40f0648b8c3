"""Policy-gradient objectives: reductions of worked examples, limits, and what must change nothing."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import losses, rl
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import completion_log_probs, policy_gradient, with_value_head
from jaxft.objectives.policy import (
    constant_length,
    sequence_correction,
    sequence_mean,
    sequence_sum,
    token_correction,
    token_mean,
)
from jaxft.rl.token_losses import clipped, clipped_sums, reinforce
from tests.small_models import forward_of, start

ROWS, PROMPT, RESPONSE, VOCABULARY = 8, 4, 5, 11
MODEL = Decoder(
    dataclasses.replace(tiny_config(vocab_size=VOCABULARY, max_length=64), num_layers=1)
)
FORWARD = forward_of(MODEL)


@pytest.fixture(scope="module")
def params():
    return start(MODEL)


@pytest.fixture(scope="module")
def batch(params):
    """Two groups of four; ragged prompts on the left, ragged responses on the right, one empty."""
    rng = np.random.default_rng(0)
    starts, ends = rng.integers(0, 3, ROWS), rng.integers(1, RESPONSE + 1, ROWS)
    ends[5] = 0
    columns = np.arange(PROMPT + RESPONSE)
    seen = (columns >= starts[:, None]) & (columns < PROMPT + ends[:, None])
    fields = {
        "tokens": rng.integers(0, VOCABULARY, seen.shape) * seen,
        "segment_ids": seen.astype(np.int32),
        "positions": np.maximum(np.cumsum(seen, axis=1) - 1, 0),
        "completion_mask": seen[:, PROMPT:],
        "advantages": rng.normal(size=ROWS).astype(np.float32),
        "stats": {"reward": np.array([1, 0, np.nan, 1, 0, 0, 1, 0], np.float32)},
        "correct": np.array([1, 0, 0, 1, 0, 0, 1, 0], bool),
        "success_rates": np.repeat(np.float32([0.5, 0.25]), 4),
    }
    fields = jax.tree.map(jnp.asarray, fields)
    fields["sampler_log_probs"] = log_probs = log_probs_of(params, fields)
    noise = 0.2 * jax.random.normal(jax.random.key(1), (2, *log_probs.shape))
    return fields | {"old_log_probs": log_probs + noise[0], "ref_log_probs": log_probs + noise[1]}


@jax.jit
def logits_of(params, batch):
    columns = {name: batch[name] for name in ("positions", "segment_ids")}
    return MODEL.apply({"params": params}, batch["tokens"], **columns).logits


log_probs_of = jax.jit(functools.partial(completion_log_probs, FORWARD))


def close(got, wanted, tolerance=1e-5):
    chex.assert_trees_all_close(got, wanted, rtol=tolerance, atol=tolerance)


def gradient(objective, params, batch):
    return compiled(objective)(params, batch, None)


@functools.cache
def compiled(objective):
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


@pytest.mark.parametrize(
    "reduction, wanted",
    [
        (sequence_mean, -0.117473),
        (token_mean, -0.576209),
        (constant_length(4), -0.288105),
        (sequence_sum, -1.152419),
    ],
)
def test_reductions_of_a_worked_example(reduction, wanted):
    token = jnp.array([[-1.2, -0.904837, -1.0], [0.8, 9.0, jnp.nan], [jnp.nan] * 3])
    mask = jnp.array([[True, True, True], [True, False, False], [False] * 3])
    close(reduction(token, mask).value, jnp.array(wanted))
    assert reduction(token, mask & False).value == 0


def test_uncertain_tokens_and_a_corrected_kl_are_a_slow_loop(params, batch):
    """TRL's top_entropy_quantile and use_bias_correction_kl: the KL counts all tokens, L and H some."""
    settings = dict(kl_weight=0.3, entropy_weight=0.1, top_entropy=0.4, corrects_kl=True)
    (loss, metrics), _ = gradient(
        policy_gradient(FORWARD, clipped(), token_mean, **settings), params, batch
    )
    known = {name: np.asarray(x, np.float64) for name, x in batch.items() if name != "stats"}
    table = np.asarray(jax.nn.log_softmax(logits_of(params, batch))[:, PROMPT - 1 : -1], np.float64)
    entropy, mask = -np.sum(np.exp(table) * table, axis=-1), known["completion_mask"] > 0
    log_p = np.asarray(log_probs_of(params, batch), np.float64)
    threshold = np.quantile(entropy[mask], 0.6)
    total = 0.0
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio, a = np.exp(log_p[i, t] - known["old_log_probs"][i, t]), known["advantages"][i]
        gap = known["ref_log_probs"][i, t] - log_p[i, t]
        total += 0.3 * ratio * (np.exp(gap) - gap - 1)
        if entropy[i, t] >= threshold:
            total -= min(ratio * a, np.clip(ratio, 0.8, 1.2) * a) + 0.1 * entropy[i, t]
    close(np.float64(loss), total / mask.sum(), 1e-4)
    close(np.float64(metrics["entropy"].value), entropy[mask].mean(), 1e-4)


def test_log_probs_are_those_of_the_plain_softmax(params, batch):
    logits = logits_of(params, batch)
    table = jax.nn.log_softmax(logits / 0.7)[:, PROMPT - 1 : -1]
    picked = jnp.take_along_axis(table, batch["tokens"][:, PROMPT:, None], axis=-1)[..., 0]
    wanted = jnp.where(batch["completion_mask"], picked, 0.0)
    ours = jax.jit(functools.partial(completion_log_probs, FORWARD, temperature=0.7))
    close(ours(params, batch), wanted)


def test_padding_and_what_it_holds_change_nothing(params, batch):
    objective = policy_gradient(FORWARD, clipped(), sequence_mean, kl_weight=0.1)
    (loss, _), grads = gradient(objective, params, batch)

    def widen(name, x):
        if x.ndim == 1:
            return x
        x = jnp.pad(x, ((0, 0), (0, 3)))  # responses
        return jnp.pad(x, ((0, 0), (2, 0))) if name in ("tokens", "segment_ids", "positions") else x

    wide = {name: widen(name, x) for name, x in without(batch, "stats").items()}
    wide["tokens"] = jnp.where(wide["segment_ids"] > 0, wide["tokens"], 7)
    for name in ("old_log_probs", "ref_log_probs", "sampler_log_probs"):
        wide[name] = jnp.where(wide["completion_mask"], wide[name], 5.0)
    (wide_loss, _), wide_grads = gradient(objective, params, wide)
    close((wide_loss, wide_grads), (loss, grads))


def test_on_policy_the_clipped_gradient_is_that_of_reinforce(params, batch):
    on_policy = without(batch, "old_log_probs")
    plain = policy_gradient(FORWARD, reinforce(), token_mean)
    surrogate = policy_gradient(FORWARD, clipped(), token_mean, correction=token_correction())
    (_, metrics), grads = gradient(surrogate, params, on_policy)
    close(grads, gradient(plain, params, on_policy)[1], 1e-6)
    assert metrics["clipped_low"].value == metrics["clipped_high"].value == 0
    assert metrics["gap"].value < 1e-4
    # Off-policy with the clip at infinity: importance-weighted.
    far = policy_gradient(FORWARD, clipped(1.0, jnp.inf), token_mean)
    mask = batch["completion_mask"]
    ratio = jnp.exp(batch["sampler_log_probs"] - batch["old_log_probs"])
    weighted = on_policy | {"advantages": batch["advantages"][:, None] * ratio * mask}
    close(gradient(far, params, batch)[1], gradient(plain, params, weighted)[1])


def test_kl_entropy_and_correction_are_what_they_say(params, batch):
    build = functools.partial(policy_gradient, FORWARD, clipped(), token_mean)
    value = lambda objective, batch: jax.jit(objective)(params, batch, None)
    plain = jax.jit(build())
    loss, metrics = value(plain, batch)
    assert np.isclose(metrics["reward"].value, 3 / 7)
    with_kl, _ = value(build(kl_weight=0.5), batch)
    close(with_kl, loss + 0.5 * metrics["kl"].value)
    with_entropy, shown = value(build(entropy_weight=0.5, temperature=0.7), batch)
    logits = logits_of(params, batch)[:, PROMPT - 1 : -1]
    exact = token_mean(losses.entropy(logits / 0.7), batch["completion_mask"]).value
    close(shown["entropy"].value, exact)
    tempered, _ = value(build(temperature=0.7), batch)
    close(with_entropy, tempered - 0.5 * exact)
    # A sampler that was twice as sure halves each token's weight, or more for a sequence's.
    halved = batch | {"sampler_log_probs": batch["old_log_probs"] + jnp.log(2.0)}
    corrected, shown = value(build(correction=token_correction()), halved)
    close(corrected, 0.5 * loss)
    close(shown["gap"].value, jnp.log(2.0))
    corrected, _ = value(build(correction=sequence_correction()), halved)
    weights = 0.5 ** jnp.sum(batch["completion_mask"], axis=1)
    scaled = batch | {"advantages": batch["advantages"] * weights}
    close(corrected, value(plain, scaled)[0])


@functools.cache
def algorithms():
    build = functools.partial(policy_gradient, FORWARD)
    return {
        "reinforce": rl.reinforce_with_baseline(build),
        "rloo": rl.rloo(build, 4, reward_kl=0.01),
        "grpo": rl.grpo(build, 4),
        "dr_grpo": rl.dr_grpo(build, 4, RESPONSE),
        "dapo": rl.dapo(build, 4),
        "gspo": rl.gspo(build, 4),
        "cispo": rl.cispo(build, 4),
        "reinforce_plus_plus": rl.reinforce_plus_plus(build, reward_kl=0.01),
        "expert_iteration": rl.expert_iteration(build),
        "nft": rl.nft(build, 4),
    }


@pytest.mark.parametrize(
    "name",
    "reinforce rloo grpo dr_grpo dapo gspo cispo reinforce_plus_plus expert_iteration nft".split(),
)
def test_every_algorithm_moves_towards_what_was_rewarded(name, params, batch):
    credit, objective = algorithms()[name]
    on_policy = without(batch, "old_log_probs", "advantages", "correct", "success_rates")
    given = credit(REWARDS, on_policy)
    (loss, _), grads = gradient(objective, params, on_policy | given)
    size = 1e-2 / norm(grads)
    moved = jax.tree.map(lambda p, g: p - size * np.asarray(g), params, grads)
    change = np.asarray(log_probs_of(moved, batch) - log_probs_of(params, batch))
    change = change.sum(axis=1) / np.maximum(np.sum(batch["completion_mask"], axis=1), 1)
    right = np.asarray(REWARDS) == 1
    assert change[right].mean() > change[~right].mean() + 1e-4
    assert jnp.isfinite(loss)


def slow_loss(name, log_p, batch):
    """The loss of a rollout's second update, one row and token after the other."""
    mask, old = np.asarray(batch["completion_mask"]), np.asarray(batch["old_log_probs"])
    surrogate = lambda ratio, a, low, high: (
        -jnp.minimum(ratio * a, jnp.clip(ratio, 1 - low, 1 + high) * a)
    )
    rows = []  # the values of each row's tokens
    for i in np.flatnonzero(mask.any(axis=1)):
        real = np.flatnonzero(mask[i])
        p, q = log_p[i, real], old[i, real]
        if name == "nft":
            rate, right = batch["success_rates"][i], batch["correct"][i]
            implied = (1 - rate * jnp.exp(p - q)) / (1 - rate)
            # max_v(x, 1): the value of max(x, 1) with the gradient of x
            wrong = [-x / jax.lax.stop_gradient(jnp.maximum(x, 1)) for x in implied]
            rows.append((1 - rate) * (-p if right else jnp.stack(wrong)))
            continue
        a = np.broadcast_to(batch["advantages"][i], mask.shape[1:])[real]
        if name in ("reinforce", "rloo"):
            ratio = jnp.exp(jnp.sum(p) - jnp.sum(q))
            rows.append(surrogate(ratio, a, 0.2, 0.2)[:1])
        elif name == "gspo":
            rows.append(surrogate(jnp.exp(jnp.mean(p - q)), a, 3e-4, 4e-4)[:1])
        elif name == "cispo":
            weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(p - q), 5.0))
            rows.append(-weight * a * p)
        else:
            rows.append(surrogate(jnp.exp(p - q), a, 0.2, 0.28 if name == "dapo" else 0.2))
    if name in ("dapo", "cispo", "nft", "ppo"):
        return jnp.mean(jnp.concatenate(rows))
    if name == "dr_grpo":
        return jnp.sum(jnp.concatenate(rows)) / (len(rows) * RESPONSE)
    return jnp.mean(jnp.stack([jnp.mean(row) for row in rows]))


@jax.jit
def plain_log_probs(params, batch):
    logits = logits_of(params, batch)
    table = jax.nn.log_softmax(logits)[:, PROMPT - 1 : -1]
    return jnp.take_along_axis(table, batch["tokens"][:, PROMPT:, None], axis=-1)[..., 0]


@jax.jit
def pulled_back(params, batch, slope):
    """The gradient by the params of what has the gradient `slope` by the plain log-probabilities."""
    return jax.vjp(lambda params: plain_log_probs(params, batch), params)[1](slope)[0]


SEVERAL = "reinforce rloo grpo dr_grpo dapo gspo cispo reinforce_plus_plus nft ppo".split()
REWARDS = jnp.array([1.0, 0, 0, 1, 0, 0, 1, 0])


def ppo_without_critic(build):
    return rl.ppo(build, value_weight=0.0)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_second_update_of_a_rollout_is_a_slow_loop(name, params, batch):
    """A policy that is no longer the one that sampled: an importance ratio, or its like, of each."""
    build = functools.partial(policy_gradient, FORWARD)
    made = algorithms() | {"ppo": ppo_without_critic(build)}
    whole = without(batch, "advantages", "correct", "success_rates")
    whole |= {"old_values": jnp.zeros(batch["completion_mask"].shape)}
    whole |= dict(made[name].credit(REWARDS, whole))
    params = with_value_head(MODEL, params) if name == "ppo" else params
    (loss, _), grads = gradient(made[name].objective, params, whole)
    known = jax.tree.map(np.asarray, whole)
    slow = jax.jit(jax.value_and_grad(lambda log_p: slow_loss(name, log_p, known)))
    value, slope = slow(plain_log_probs(params, whole))
    close(grads, pulled_back(params, whole, slope))
    if name not in ("gspo", "nft", "cispo"):  # whose token forms have other values than gradients
        close(loss, value)
    # That is another gradient than the one without a ratio.
    once = without(whole, "old_log_probs")
    other = gradient(made[name].objective, params, once)[1]
    assert norm(jax.tree.map(np.subtract, other, grads)) > 0.02 * norm(grads)


@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_at_the_first_update_a_clipped_sum_is_reinforce(name, params, batch):
    credit, objective = algorithms()[name]
    build = functools.partial(policy_gradient, FORWARD, correction=token_correction())
    batch = batch | dict(credit(REWARDS, batch))
    on_policy = without(batch, "old_log_probs")
    plain = policy_gradient(FORWARD, reinforce(), sequence_sum)
    wanted = gradient(plain, params, on_policy)[1]
    close(gradient(objective, params, on_policy)[1], wanted, 1e-6)
    sampled = batch | {"old_log_probs": log_probs_of(params, batch)}
    close(gradient(objective, params, sampled)[1], wanted)
    corrected = build(clipped_sums(), sequence_sum), build(reinforce(), sequence_sum)
    noisy = on_policy | {"sampler_log_probs": batch["old_log_probs"]}
    close(*(gradient(objective, params, noisy)[1] for objective in corrected))


@pytest.mark.parametrize("name", ["expert_iteration", "online_preference", "xpo"])
def test_what_has_no_ratio_refuses_several_updates_a_rollout(name, params, batch):
    build = functools.partial(policy_gradient, FORWARD)
    more = {
        "online_preference": rl.online_preference(build, losses.dpo_loss, 4),
        "xpo": rl.xpo(build, losses.dpo_loss, 4),
    }
    credit, objective = (algorithms() | more)[name]
    batch = batch | {"from_reference": jnp.arange(ROWS) % 4 > 1}
    batch |= dict(credit(REWARDS, batch))
    with pytest.raises(
        ValueError, match=r"no importance ratio, so it allows only one update a rollout"
    ):
        objective(params, batch, None)
    objective(params, without(batch, "old_log_probs"), None)


def test_missing_fields_and_bad_settings_are_errors(params, batch):
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        policy_gradient(FORWARD, clipped(), token_mean, temperature=0.0)
    with pytest.raises(ValueError, match="kl_weight must be at least 0, got -1"):
        policy_gradient(FORWARD, clipped(), token_mean, kl_weight=-1.0)
    with pytest.raises(ValueError, match="needs ref_log_probs in the batch"):
        policy_gradient(FORWARD, clipped(), token_mean, kl_weight=1.0)(
            params, without(batch, "ref_log_probs"), None
        )
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        constant_length(0)
    cut = ("tokens", "segment_ids", "positions")
    bare = batch | {name: batch[name][:, -RESPONSE:] for name in cut}
    with pytest.raises(ValueError, match="5 response tokens leave none of 5"):
        completion_log_probs(FORWARD, params, bare)
