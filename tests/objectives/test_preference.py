"""Objectives of preferences: against slow loops, and their invariances."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import data, train
from jaxft.adapters import adapt, base_params, combine, full, lora, named_rules, partition
from jaxft.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import (
    bco,
    hypo,
    kto,
    outcome_reward,
    pairwise_reward,
    preference,
    process_reward,
    sequence_log_probs,
)
from jaxft.rewards import add_reward_head, sequence_rewards, token_rewards
from tests.small_models import forward_of, jitted, start

MODEL = Decoder(dataclasses.replace(tiny_config(vocab_size=17), num_layers=1))
FORWARD = forward_of(MODEL)
BASE = start(MODEL)
KERNELS = r"layers/.*/(query|down)/kernel"
LENGTHS = [(3, 2), (5, 7), (2, 4), (6, 3)]  # tokens of the completions; prompts have 2 to 5


def groups_of(seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)

    def part(prompt, n):
        tokens = np.concatenate([prompt, rng.integers(0, 17, n)]).astype(np.int32)
        return data.Tokenised(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.float32))

    result = []
    for i, pair in enumerate(lengths):
        prompt = rng.integers(0, 17, 2 + i)
        parts = tuple(part(prompt, n) for n in pair)
        last = len(parts[0].tokens) - 1
        columns = {"label": np.bool_(i % 2), "step_labels": np.array([i % 2, 1], bool)}
        columns["step_ends"] = np.array([last - 1, last] if i % 2 else [last, -1], np.int32)
        result.append(data.TokenisedGroup(parts, columns))
    return result


GROUPS = groups_of()


def with_reference(groups=GROUPS, params=BASE):
    return train.reference_log_probs(FORWARD, params, groups, batch_size=2, max_length=32)


referenced = functools.cache(with_reference)  # without arguments: GROUPS, by BASE


def batch_of(groups, rows=None, max_length=16):
    (batch,) = data.finite_group_batches(
        groups, batch_size=rows or len(groups), max_length=max_length
    )
    return batch


@jax.jit
def moved(params=BASE, seed=1):
    """Params that are not where they started."""
    trainable, frozen = partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return combine(jax.tree.unflatten(treedef, leaves), frozen)


@jax.jit
def rows_log_probs(params, tokens, mask):
    logits = MODEL.apply({"params": params}, tokens).logits[:, :-1]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(log_p * mask[:, 1:], axis=1)


def slow(params, groups):
    """[B, G] sums of each sequence in a separate row, zeros behind it: no segments, no groups."""
    parts = [part for group in groups for part in group.parts]
    pad = lambda x: np.pad(x, (0, 16 - len(x)))
    tokens, mask = (np.stack([pad(getattr(p, n)) for p in parts]) for n in ("tokens", "loss_mask"))
    return rows_log_probs(params, tokens, mask).reshape(len(groups), -1)


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=2e-5, atol=2e-6)


run = lambda objective, params, batch: compiled(objective)(params, batch, None)
compiled = functools.cache(lambda objective: jax.jit(jax.value_and_grad(objective, has_aux=True)))


def test_log_probs_are_those_of_each_sequence_alone():
    found = jax.jit(functools.partial(sequence_log_probs, FORWARD))(BASE, batch_of(GROUPS))
    expected = slow(BASE, GROUPS)
    close(found.sums, expected)
    chex.assert_trees_all_equal(found.lengths, jnp.asarray(LENGTHS, jnp.float32))
    for group, row in zip(referenced(), expected, strict=True):
        close(jnp.asarray(group.columns["ref_log_probs"]), row)
    with pytest.raises(ValueError, match=r"must be \[B, G, T\]"):
        sequence_log_probs(FORWARD, BASE, {"tokens": jnp.zeros((2, 3), jnp.int32)})


def test_a_policy_that_is_its_reference_has_loss_log_2():
    objective = preference(FORWARD, functools.partial(dpo_loss, beta=0.3), beta=0.3)
    (loss, metrics), grads = run(objective, BASE, batch_of(referenced()))
    close(loss, jnp.log(2.0))
    assert metrics["rewards/accuracy"].value == 0.5
    assert jnp.abs(metrics["rewards/margin"].value) < 1e-5

    def margins(params):
        sums = slow(params, GROUPS)
        return jnp.mean(-0.15 * (sums[:, 0] - sums[:, 1]))

    close(grads, jax.jit(jax.grad(margins))(BASE))  # -β/2 of the margins' gradient


def test_metrics_are_means_over_pairs():
    params = moved()
    batch = batch_of(referenced())
    loss = functools.partial(ipo_loss, beta=0.2)
    (value, metrics), _ = run(preference(FORWARD, loss, beta=0.2), params, batch)
    policy = np.asarray(slow(params, GROUPS))
    ratio = policy - np.asarray(slow(BASE, GROUPS))
    n = np.array(LENGTHS)
    expected = np.mean((ratio[:, 0] / n[:, 0] - ratio[:, 1] / n[:, 1] - 2.5) ** 2)
    numbers = {name: float(mean.value) for name, mean in metrics.items()}
    assert numbers["loss"] == pytest.approx(expected, rel=1e-4) == float(value)
    for i, side in enumerate(("chosen", "rejected")):
        assert numbers[f"rewards/{side}"] == pytest.approx(0.2 * ratio[:, i].mean(), rel=1e-3)
        assert numbers[f"log_probs/{side}"] == pytest.approx(policy[:, i].mean(), rel=1e-4)
        assert numbers[f"lengths/{side}"] == n[:, i].mean()
    assert numbers["rewards/accuracy"] == (ratio[:, 0] > ratio[:, 1]).mean()
    assert metrics["num_tokens"].total == sum(len(p.tokens) for g in GROUPS for p in g.parts)


OBJECTIVES = {
    "dpo": preference(FORWARD, dpo_loss),
    "simpo": preference(FORWARD, simpo_loss),
    "wpo": preference(FORWARD, dpo_loss, use_weighting=True),
    "kto": kto(FORWARD, beta=0.3, undesirable_weight=0.5),
    "bco": bco(FORWARD),
    "reward": pairwise_reward(FORWARD, center_rewards_coefficient=0.1),
    "outcome": outcome_reward(FORWARD),
    "process": process_reward(FORWARD),
}


def params_for(name):
    params = moved()
    if name in ("reward", "outcome", "process"):
        return add_reward_head(jax.random.key(2), params, MODEL.config.hidden_size)
    return params


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_changes_nothing(name):
    groups, params = referenced(), params_for(name)
    exact = run(OBJECTIVES[name], params, batch_of(groups))
    wide = batch_of(groups, rows=6, max_length=32)  # and two empty groups
    wide = {k: np.pad(v, [(0, 0)] * 2 + [(0, 8)]) if v.ndim == 3 else v for k, v in wide.items()}
    assert wide["tokens"].shape == (6, 2, 24)
    chex.assert_trees_all_close(exact, run(OBJECTIVES[name], params, wide), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantise", [None, "int8"])
def test_the_base_under_an_adapter_is_the_reference(quantise):
    rules = {KERNELS: lora(2)} | ({} if quantise else named_rules("prompt", rank=2))
    start = BASE
    if quantise:
        from jaxft.adapters import quantised

        start = adapt(jax.random.key(3), BASE, {KERNELS: quantised(quantise)})
    adapted = moved(adapt(jax.random.key(4), start, rules))
    chex.assert_trees_all_equal_structs(base_params(adapted), adapt(jax.random.key(0), start, {}))
    objective = preference(FORWARD, dpo_loss, reference=base_params)
    (loss, _), grads = run(lambda t, b, k: objective(combine(t, partition(adapted)[1]), b, k),
                           partition(adapted)[0], batch_of(GROUPS))  # fmt: skip
    columns = batch_of(with_reference(params=start))
    (again, _), grads_again = run(
        lambda t, b, k: preference(FORWARD, dpo_loss)(combine(t, partition(adapted)[1]), b, k),
        partition(adapted)[0], columns)  # fmt: skip
    close((loss, grads), (again, grads_again))
    assert abs(float(loss) - np.log(2)) > 1e-3


@pytest.mark.parametrize(
    "rule", [full(), named_rules("paca", rank=2)[next(iter(named_rules("paca")))]]
)
def test_what_trains_in_place_has_no_base(rule):
    adapted = adapt(jax.random.key(0), BASE, {KERNELS: rule})
    with pytest.raises(ValueError, match="query/kernel is trained in place"):
        base_params(adapted)


def test_kto_is_its_formula_and_its_kl_passes_no_gradient():
    params, batch = moved(), batch_of(referenced())
    (loss, metrics), grads = run(OBJECTIVES["kto"], params, batch)
    labels = jnp.array([bool(g.columns["label"]) for g in GROUPS])
    ref = jnp.asarray(batch["ref_log_probs"])
    other = slow(params, GROUPS)[:, 1] - ref[:, 1]
    kl = jnp.maximum(jnp.mean(other), 0.0)

    def expected(params):
        ratios = slow(params, GROUPS)[:, 0] - ref[:, 0]
        return jnp.mean(kto_loss(ratios, labels, kl, beta=0.3, undesirable_weight=0.5))

    value, gradient = jax.jit(jax.value_and_grad(expected))(params)
    chex.assert_trees_all_close((loss, grads), (value, gradient), rtol=1e-4, atol=1e-5)
    close(metrics["kl"].value, jnp.mean(other))
    for name, side in (("chosen", True), ("rejected", False)):
        assert metrics[f"rewards/{name}"].weight == (labels == side).sum()


def test_wpo_weights_come_from_the_whole_distribution():
    params, batch = moved(), batch_of(GROUPS)
    run = jax.jit(functools.partial(sequence_log_probs, FORWARD, wpo=True))
    weights = run(params, batch).weights
    part = GROUPS[1].parts[0]
    log_p = jax.nn.log_softmax(jitted(MODEL)({"params": params}, part.tokens[None]).logits[0])
    picked = log_p[np.arange(len(part.tokens) - 1), part.tokens[1:]]
    collision = jnp.log(jnp.sum(jnp.exp(2 * log_p), axis=-1))[:-1]
    mask = part.loss_mask[1:]
    expected = jnp.exp(jnp.sum(mask * (picked - collision)) / mask.sum())
    close(weights[1, 0], expected)
    columns = batch_of(referenced())
    loss, _ = jax.jit(OBJECTIVES["wpo"])(params, columns, None)
    ratios = slow(params, GROUPS) - columns["ref_log_probs"]
    plain = -jax.nn.log_sigmoid(0.1 * (ratios[:, 0] - ratios[:, 1]))
    close(loss, jnp.mean(plain * weights[:, 0] * weights[:, 1]))


def test_length_desensitised_log_probs_are_of_policy_and_reference_alike():
    params = moved()
    options = dict(batch_size=4, max_length=32, ld_alpha=0.25)
    scored = train.reference_log_probs(FORWARD, BASE, GROUPS, **options)
    run = jax.jit(functools.partial(sequence_log_probs, FORWARD, ld_alpha=0.25))
    sums = run(params, batch_of(GROUPS)).sums
    part = GROUPS[0].parts[0]  # of 3 tokens, the other of 2: its last counts a quarter
    log_p = jax.nn.log_softmax(jitted(MODEL)({"params": params}, part.tokens[None]).logits[0])
    picked = log_p[np.arange(len(part.tokens) - 1), part.tokens[1:]][-3:]
    close(sums[0, 0], picked[0] + picked[1] + 0.25 * picked[2])
    close(sums[0, 1], slow(params, GROUPS)[0, 1])
    value, _ = jax.jit(preference(FORWARD, dpo_loss, ld_alpha=0.25))(params, batch_of(scored), None)
    ratios = sums - np.stack([group.columns["ref_log_probs"] for group in scored])
    close(value, jnp.mean(-jax.nn.log_sigmoid(0.1 * (ratios[:, 0] - ratios[:, 1]))))


def test_hypo_adds_the_gradient_of_the_surrogate():
    params = moved()
    batch = batch_of(referenced())
    online = with_reference(groups_of(5, [(3, 4), (2, 2)]))
    both = batch | {"online": batch_of(online)}
    plain = run(preference(FORWARD, dpo_loss), params, batch)
    chex.assert_trees_all_equal(run(hypo(FORWARD, dpo_loss, kl_weight=0.0), params, both), plain)
    (_, metrics), grads = run(hypo(FORWARD, dpo_loss, kl_weight=0.5), params, both)
    ratios = slow(params, online) - np.stack([g.columns["ref_log_probs"] for g in online])
    advantages = ratios - ratios[:, ::-1]  # of two samples, the other is the baseline

    def surrogate(params):
        return 0.5 * jnp.mean(slow(params, online) * advantages)

    expected = jax.tree.map(np.add, plain[1], jax.jit(jax.grad(surrogate))(params))
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)
    close(metrics["kl"].value, jnp.mean(ratios))  # and not the surrogate's value
    with pytest.raises(ValueError, match="no 'online' samples"):
        hypo(FORWARD, dpo_loss)(params, batch, None)


def test_rewards_are_read_at_the_last_token_of_the_completion():
    params, batch = params_for("reward"), batch_of(GROUPS)
    rewards, present = jax.jit(functools.partial(sequence_rewards, FORWARD))(params, batch)
    assert present.all()
    part = GROUPS[1].parts[0]
    hidden = jitted(MODEL)({"params": moved()}, part.tokens[None]).hidden[0, -1]
    close(rewards[1, 0], hidden @ params["reward"]["kernel"][:, 0])
    kernel = add_reward_head(jax.random.key(1), {}, 9999)["reward"]["kernel"]
    assert kernel.shape == (9999, 1) and abs(float(kernel.std()) - 0.01) < 4e-4
    with pytest.raises(ValueError, match="no 'reward' head"):
        token_rewards(FORWARD, BASE, batch)


def test_process_rewards_are_of_steps():
    params, batch = params_for("reward"), batch_of(GROUPS)
    ends = np.array([[2, 3, -1], [4, 5, 6], [4, -1, -1], [6, 9, -1]])
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]], bool)
    columns = {"step_ends": ends, "step_labels": labels}
    loss, metrics = jax.jit(process_reward(FORWARD))(params, batch | columns, None)
    values = jax.jit(functools.partial(token_rewards, FORWARD))(params, batch)[:, 0]
    signed = [
        values[b, t] * (1 if labels[b, s] else -1)
        for b in range(4) for s, t in enumerate(ends[b]) if t >= 0
    ]  # fmt: skip
    close(loss, jnp.mean(jnp.log1p(jnp.exp(-jnp.asarray(signed)))))
    assert metrics["loss"].weight == len(signed) == 8
    close(metrics["accuracy"].value, jnp.mean(jnp.asarray(signed) > 0))
    # Labels of half a step's loss and half of its opposite.
    soft = columns | {"step_labels": np.full(labels.shape, 0.5, np.float32)}
    halves = jax.jit(process_reward(FORWARD))(params, batch | soft, None)[0]
    flipped = jax.jit(process_reward(FORWARD))(
        params, batch | columns | {"step_labels": ~labels}, None
    )[0]
    close(halves, (loss + flipped) / 2)


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto", "reward"])
def test_training_learns_its_pairs(name):
    batch = batch_of(referenced())
    params = params_for(name)
    _, history = train.fit(params, OBJECTIVES[name], optax.adam(5e-3), iter([batch] * 15), steps=15)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["rewards/accuracy"] == 1.0
    real = lambda parts: sum(len(p.tokens) for g in GROUPS for p in g.parts[:parts])
    assert history[0]["num_input_tokens"] == real(2)
    if name != "reward":
        assert history[0]["num_tokens"] == real(
            1 if name == "kto" else 2
        )  # KTO's loss reads the first


def test_orpo_reads_the_likelihood_of_the_prompt():
    objective = preference(FORWARD, functools.partial(orpo_loss, nll_on_prompt=True))
    (loss, _), _ = run(objective, BASE, batch_of(GROUPS))
    (plain, _), _ = run(preference(FORWARD, orpo_loss), BASE, batch_of(GROUPS))
    everything = [
        dataclasses.replace(g.parts[0], loss_mask=np.ones(20, np.float32)) for g in GROUPS
    ]
    cut = [dataclasses.replace(p, loss_mask=p.loss_mask[: len(p.tokens)]) for p in everything]
    sums = slow(BASE, [data.TokenisedGroup((p, p), {}) for p in cut])[:, 0]
    counts = np.array([len(p.tokens) - 1 for p in cut])  # The first token is predicted by none.
    own = np.asarray(slow(BASE, GROUPS))[:, 0] / np.array(LENGTHS)[:, 0]
    close(loss, plain + np.mean(own - np.asarray(sums) / counts))


def train_on(objective, groups, params=None, steps=5, **options):
    params = moved() if params is None else params
    batches = [batch_of(groups)] * steps
    return train.fit(params, objective, optax.sgd(0.05), batches, **options)[1]


@pytest.mark.parametrize("adapter", [None, "paca"])
def test_a_moving_reference_is_that_of_the_policy_so_far(adapter):
    """TR-DPO against a loop with a separate reference, and in its limits."""
    objective = preference(FORWARD, functools.partial(dpo_loss, beta=0.5))
    params = moved()
    if adapter:
        rules = named_rules(adapter, rank=2, target=KERNELS)
        params = train.commit(moved(adapt(jax.random.key(3), BASE, rules)))

    def losses(*settings):
        books = {"reference": train.moving_reference(FORWARD, *settings)}
        return [row["loss"] for row in train_on(objective, GROUPS, params, books=books)]

    # The reference is the policy itself at each step; or never moves.
    np.testing.assert_allclose(losses(1.0, 1), np.log(2), rtol=1e-5)
    step = train.jit_step(train.make_step(objective, optax.sgd(0.05)))

    def loop(alpha, every):
        state, found = train.init_state(params, optax.sgd(0.05), jax.random.key(0)), []
        reference = partition(params)[0]
        for number in range(1, 6):
            whole = train.commit(combine(reference, partition(state.params)[1]))
            batch = batch_of(GROUPS) | {"ref_log_probs": slow(whole, GROUPS)}
            state, metrics = step(state, batch)
            found.append(metrics["loss"].value)
            if number % every == 0:
                mix = lambda old, new: alpha * new + (1 - alpha) * old
                reference = jax.tree.map(mix, reference, partition(state.params)[0])
        return found

    moving = losses(0.3, 2)
    np.testing.assert_allclose(moving, loop(0.3, 2), rtol=1e-4)
    assert abs(moving[-1] - loop(0.3, 6)[-1]) > 1e-3  # as if it stood still


def test_the_delta_of_bco_is_the_mean_of_all_rewards_so_far():
    books = {"rewards": train.running_mean("rewards/mean")}
    history = train_on(bco(FORWARD, beta=0.5), referenced(), books=books)
    rewards = np.array([row["rewards/mean"] for row in history])
    assert np.ptp(rewards) > 1e-2
    wanted = np.cumsum(rewards) / np.arange(1, 6)
    np.testing.assert_allclose([row["delta"] for row in history], wanted, rtol=1e-4)
    # In a single batch it is the batch's mean; undesirable completions weigh what their ratio says.
    batch = batch_of(referenced()) | {"density_ratio": np.array([2.0, 5.0, 0.5, 5.0])}
    (loss, metrics), _ = run(bco(FORWARD, beta=0.5), moved(), batch)
    ratio = (np.asarray(slow(moved(), GROUPS)) - np.asarray(slow(BASE, GROUPS)))[:, 0]
    good = np.arange(4) % 2 == 1
    z = 0.5 * ratio - 0.5 * ratio.mean()
    values = np.where(good, 1, batch["density_ratio"]) * np.log1p(np.exp(-np.where(good, z, -z)))
    close(loss, jnp.asarray(values.mean(), jnp.float32))
    close(metrics["delta"].value, jnp.asarray(0.5 * ratio.mean(), jnp.float32))


def test_a_missing_reference_is_explained():
    batch = batch_of(GROUPS)
    for objective, message in [
        (preference(FORWARD, dpo_loss), "give ref_chosen and ref_rejected"),
        (kto(FORWARD), "reference_log_probs"),
        (bco(FORWARD), "reference_log_probs"),
    ]:
        with pytest.raises(ValueError, match=message):
            objective(BASE, batch, None)
