"""Two writers: switch times, masks, schedules; gradients against an enumerated chain; limits; errors."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxft import losses, rl
from jaxft.generation import Generation, SamplingConfig
from jaxft.models import Prediction
from jaxft.objectives import policy_gradient, supervised
from jaxft.rewards import in_process
from jaxft.rl.guided import (
    d2lols,
    guide_begins,
    guide_ends,
    lols,
    mixed_rollout,
    switch_times,
)
from jaxft.rl.rollouts import judged
from jaxft.rl.two_critics import (
    GUIDE_HEAD,
    critic_values,
    with_critics,
    without_critics,
    written_masks,
)
from tests.rl.rl_task import (
    PROMPTS,
    RECORDS,
    SAMPLING,
    Digits,
    exact,
    model_and_params,
    taken,
)

SIZE = SAMPLING.max_new_tokens


def says(token, size, end=None):
    """A writer of `size` equal tokens, the last of which is `end` if there is room for all."""

    def write(params, contexts, limits, key):
        write.contexts, write.limits = contexts, limits
        tokens = np.full((len(contexts), size), token)
        if end is not None:
            tokens[:, -1] = end
        mask = np.arange(size)[None] < np.minimum(size, limits)[:, None]
        finish = ["stop" if end is not None and n >= size else "length" for n in limits]
        return Generation(tokens, mask, 0.1 * token * mask, 0.2 * token * mask, finish)

    return write


def test_switch_times_are_uniform_and_short_roll_ins_have_none():
    times = np.asarray(switch_times(jax.random.key(0), np.full(40_000, 5), 1.0))
    counts = np.bincount(times, minlength=6)
    assert counts[0] == counts[5] == 0
    assert stats.chisquare(counts[1:5]).pvalue > 1e-3
    mixed = np.asarray(switch_times(jax.random.key(1), np.full(40_000, 5), 0.8))
    assert np.mean(mixed > 0) == pytest.approx(0.8, abs=0.008)  # four standard errors
    assert stats.chisquare(np.bincount(mixed)[1:]).pvalue > 1e-3
    short = switch_times(jax.random.key(2), np.repeat([0, 1, 2], 50), 1.0)
    assert np.asarray(short).tolist() == [0] * 100 + [1] * 50
    assert not np.any(switch_times(jax.random.key(2), np.full(50, 9), 0.0))


def test_the_roll_out_continues_after_the_first_h_tokens():
    first, last = says(1, 5), says(2, 3, end=3)
    prompts = [[7, 7]] * 40
    out = mixed_rollout(None, prompts, jax.random.key(0), first, last, 6, 1.0)
    assert set(out.switch) == {1, 2, 3, 4} and first.limits.tolist() == [6] * 40
    for i, h in enumerate(out.switch):
        assert last.contexts[i] == [7, 7] + [1] * h and last.limits[i] == 6 - h
        rest = [2, 2, 3][: 6 - h]
        assert out.tokens[i][out.mask[i]].tolist() == [1] * h + rest
        assert out.mask[i].tolist() == [True] * (h + len(rest)) + [False] * (6 - h - len(rest))
        assert out.rolled_in[i].tolist() == [True] * h + [False] * (6 - h)
        assert out.truncated[i] == (h == 4)
        written = [0.1] * h + [0.2, 0.2, 0.2][: 6 - h]
        np.testing.assert_allclose(out.log_probs[i][out.mask[i]], written)
    whole = mixed_rollout(None, prompts, jax.random.key(0), first, last, 6, 0.0)
    assert not whole.switch.any() and not whole.rolled_in.any() and (whole.tokens < 4).all()


@pytest.mark.parametrize("begins", [True, False])
def test_masks_of_who_wrote_each_token(begins, monkeypatch):
    """The worked example: L = 5 and h = 2."""
    monkeypatch.setattr("jaxft.rl.guided.switch_times", lambda key, n, mix: np.full(len(n), 2))
    policy, guide = says(1, 5), says(2, 5)
    model, _ = model_and_params()
    judge = lambda completions, records: [float(sum(ids)) for ids in completions]
    sample = rl.guided_answers(
        model, policy, guide, judge, guide_begins if begins else guide_ends, size=5
    )
    batch = sample(None, rl.Prompts(PROMPTS, 4, RECORDS).pick(0), jax.random.key(0))
    own, fitted = map(np.asarray, written_masks(batch))
    early, late = [True] * 2 + [False] * 3, [False] * 2 + [True] * 3
    assert own.tolist() == [late if begins else early] * 4
    assert fitted.tolist() == [late] * 4 and batch["guide_critic"].tolist() == [not begins] * 4
    assert batch["author"].tolist() == [[4, 4, 1, 1, 1] if begins else [1, 1, 4, 4, 4]] * 4
    assert batch["completion_mask"].all()
    assert np.array_equal(own | fitted, batch["completion_mask"]) == (not begins)
    assert batch["rewards"] == [7.0 if begins else 8.0] * 4
    assert batch["stats"]["switch"].tolist() == [2.0] * 4
    np.testing.assert_allclose(batch["stats"]["guide_tokens"], 0.4 if begins else 0.6)
    wide = sample(None, rl.Prompts(PROMPTS, 4, RECORDS).pick(0, fixed=True), jax.random.key(0))
    assert wide["tokens"].shape == (4, 21) and wide["author"].shape == (4, 5)


def test_schedules():
    key = jax.random.key(0)
    assert guide_begins(0, key) and not guide_ends(0, key)
    assert [bool(d2lols(3)(number, key)) for number in range(6)] == [False] * 3 + [True] * 3
    keys = jax.random.split(key, 10_000)
    found = jax.jit(jax.vmap(functools.partial(lols(0.8), 0)))(keys)
    assert float(found.mean()) == pytest.approx(0.8, abs=0.012)  # three standard errors
    numbers = [rl.Prompts(PROMPTS, 2).pick(draw).number for draw in (0, 5)]
    assert numbers == [0, 5] and rl.Prompts(PROMPTS, 2).pick(3).following().number == 4


# A chain of three binary actions: state 0, then 1 and 2, then 3 to 6; the reward is that of the leaf.
DEPTH, STATES = 3, 7
RNG = np.random.default_rng(0)
LEAVES = RNG.normal(size=8)
LOGITS, GUIDE_LOGITS = RNG.normal(size=(2, STATES, 2))
PATHS = np.array(list(itertools.product((0, 1), repeat=DEPTH)))


def states_of(path):
    return [0, 1 + path[0], 3 + 2 * path[0] + path[1]]


def chain(params, batch, key=None):
    """A tabular model: its hidden states are the chain's, one-hot."""
    a, b = batch["tokens"][:, 1], batch["tokens"][:, 2]
    states = jnp.stack([jnp.zeros_like(a), 1 + a, 3 + 2 * a + b, jnp.zeros_like(a)], axis=1)
    return Prediction(jax.nn.one_hot(states, STATES), params["logits"])


@jax.jit
def backed_up(logits):
    """(V [7], Q [7, 2]) of the policy with these logits."""
    p, values = jax.nn.softmax(logits), [None] * STATES
    q = [None] * STATES
    for state in reversed(range(STATES)):
        after = LEAVES[2 * (state - 3) : 2 * state - 4] if state >= 3 else None
        q[state] = jnp.asarray(
            after if after is not None else values[2 * state + 1 : 2 * state + 3]
        )
        values[state] = jnp.sum(p[state] * q[state])
    return jnp.stack(values), jnp.stack(q)


def probability(path, h, first, last):
    p = [np.asarray(jax.nn.softmax(jnp.asarray(x))) for x in (first, last)]
    return np.prod(
        [p[t >= h][s, a] for t, (s, a) in enumerate(zip(states_of(path), path, strict=True))]
    )


@jax.jit
def slopes(params, batch):
    """The gradient of each row's policy loss; λ is in the batch's advantages only."""
    _, objective = rl.guided_ppo(chain, value_weight=0.0)
    alone = lambda row: jax.tree.map(lambda x: x[None], row)
    slope = lambda row: jax.grad(lambda p: objective(p, alone(row), None)[0])(params)["logits"]
    return jax.vmap(slope)(batch)


@jax.jit
def slope_of_values(reached):
    """∇ Σ_s reached[s] V(s) at the policy's logits."""
    return jax.grad(lambda logits: reached @ backed_up(logits)[0])(jnp.asarray(LOGITS))


def expected_gradient(h, begins, lam):
    """The expected gradient of the policy loss for one h, with the exact critic, by enumeration."""
    values = np.asarray(backed_up(LOGITS if begins else GUIDE_LOGITS)[0], np.float32)
    head = {"kernel": jnp.asarray(values)[:, None], "bias": jnp.zeros(1)}
    none = {"kernel": jnp.full((STATES, 1), 9.0), "bias": jnp.zeros(1)}
    params = {"logits": jnp.asarray(LOGITS, jnp.float32)}
    params |= {"value_head": head if begins else none, GUIDE_HEAD: none if begins else head}
    count = len(PATHS)
    written = np.where((np.arange(DEPTH) < h) == begins, 4, 1)
    batch = {
        "tokens": np.concatenate([np.zeros((count, 1), int), PATHS], axis=1),
        "positions": np.tile(np.arange(4), (count, 1)),
        "segment_ids": np.ones((count, 4), int),
        "completion_mask": np.ones((count, DEPTH), bool),
        "author": np.tile(written, (count, 1)),
        "guide_critic": np.full(count, not begins),
    }
    batch = rl.add_guided_policy(chain, 1.0)(batch, params, None)
    np.testing.assert_allclose(
        batch["old_values"], [values[states_of(p)] for p in PATHS], rtol=1e-5
    )
    credit, _ = rl.guided_ppo(chain, lam=lam)
    batch |= credit(jnp.asarray(LEAVES), batch)
    grads = slopes(params, batch)
    pair = (GUIDE_LOGITS, LOGITS) if begins else (LOGITS, GUIDE_LOGITS)
    weights = [probability(path, h, *pair) for path in PATHS]
    # The loss is a mean over the policy's tokens of a row.
    return -np.tensordot(weights, grads, axes=1) * (DEPTH - h if begins else h)


@pytest.mark.parametrize("h", [1, 2])
def test_aggrevated_follows_the_guides_advantage(h):
    """With λ = 0 at all tokens of the policy, with any λ at the switch, after which the guide acts."""
    values, q = map(np.asarray, backed_up(GUIDE_LOGITS))
    p = np.asarray(jax.nn.softmax(jnp.asarray(LOGITS)))
    reached = np.zeros(STATES)
    reached[0] = 1.0
    for state in range(3):
        reached[2 * state + 1 : 2 * state + 3] = reached[state] * p[state]
    advantage = q - values[:, None]
    # Σ_a π(a) ∇log π(a) A(a), by the softmax's ∇_b log π(a) = 1[a = b] - π(b).
    wanted = reached[:, None] * p * (advantage - np.sum(p * advantage, axis=1, keepdims=True))
    depths = np.array([0, 1, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(
        expected_gradient(h, False, 0.0), np.where((depths < h)[:, None], wanted, 0), atol=1e-5
    )
    last = depths == h - 1
    np.testing.assert_allclose(expected_gradient(h, False, 0.95)[last], wanted[last], atol=1e-5)


@pytest.mark.parametrize("h", [0, 1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_ppo_after_a_guides_prefix_is_the_policy_gradient_from_there(h, lam):
    first = {0: [0], 1: [1, 2], 2: [3, 4, 5, 6]}[h]
    tokens = {0: [()], 1: [(0,), (1,)], 2: list(itertools.product((0, 1), repeat=2))}[h]
    guide = np.asarray(jax.nn.softmax(jnp.asarray(GUIDE_LOGITS)))
    reached = np.zeros(STATES)
    reached[first] = [
        np.prod([guide[states_of(t + (0,) * 3)[i], a] for i, a in enumerate(t)]) for t in tokens
    ]
    wanted = slope_of_values(reached)
    np.testing.assert_allclose(expected_gradient(h, True, lam), wanted, atol=1e-5)


def test_roll_outs_of_the_guide_estimate_its_value_after_the_policys_prefix():
    def tabular(logits):
        p = np.asarray(jax.nn.softmax(jnp.asarray(logits)))

        def write(params, contexts, limits, key):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            tokens = np.zeros((len(contexts), DEPTH), int)
            for row, context, limit in zip(tokens, contexts, limits, strict=True):
                path = context[1:]
                for t in range(limit):
                    state = states_of([*path, 0, 0])[len(path)]
                    row[t] = rng.random() < p[state, 1]
                    path = [*path, row[t]]
            mask = np.arange(DEPTH)[None] < limits[:, None]
            return Generation(tokens, mask, 0.0 * mask, 0.0 * mask, ["stop"] * len(contexts))

        return write

    writers = tabular(LOGITS), tabular(GUIDE_LOGITS)
    out = mixed_rollout(None, [[0]] * 5_000, jax.random.key(3), *writers, DEPTH, 0.8)
    rewards = LEAVES[out.tokens @ [4, 2, 1]]
    values = np.asarray(backed_up(GUIDE_LOGITS)[0])
    states = np.array([states_of(row)[h] for row, h in zip(out.tokens, out.switch, strict=True)])
    assert set(states) == set(range(STATES))
    for state in range(STATES):
        found = rewards[states == state]
        assert abs(found.mean() - values[state]) < 4 * found.std() / len(found) ** 0.5


@pytest.fixture(scope="module")
def critics():
    """Params with value heads that have moved."""
    model, params = model_and_params()
    params = with_critics(model, params)
    assert without_critics(params).keys() == model_and_params()[1].keys()
    for i, name in enumerate(("value_head", GUIDE_HEAD)):
        kernel = 0.3 * jax.random.normal(jax.random.key(i), params[name]["kernel"].shape)
        params |= {name: {"kernel": kernel, "bias": jnp.array([0.1 * i])}}
    return params


def collector(schedule, mix, credit, *transforms, guide=None, **settings):
    model, params = model_and_params()
    policy = rl.writer(model, SAMPLING)
    guide = guide or rl.writer(model, dataclasses.replace(SAMPLING, top_k=2), params)
    sample = rl.guided_answers(
        model, policy, guide, judged(Digits(), in_process(exact)), schedule, size=SIZE, mix=mix
    )
    return rl.collect(rl.Prompts(PROMPTS, 4, RECORDS), sample, credit, *transforms, **settings)


def test_without_a_mix_it_is_ppo(critics):
    """The same key gives the same batch, the same loss and the same gradient."""
    model, _ = model_and_params()
    settings = dict(gamma=0.9, lam=0.8, value_weight=0.3)
    credit, objective = rl.guided_ppo(model.forward, clip=0.1, **settings)
    (ours,) = taken(collector(guide_begins, 0.0, credit, rl.add_guided_policy(model.forward, 1.0),
                              updates=1), critics)  # fmt: skip
    build = functools.partial(policy_gradient, model.forward)
    plain = rl.ppo(build, clip_low=0.1, clip_high=0.1, **settings)
    sample = rl.answers(model, Digits(), in_process(exact), SAMPLING, 1)
    (theirs,) = taken(
        rl.collect(rl.Prompts(PROMPTS, 4, RECORDS), sample, plain.credit,
                   rl.add_old_policy(model.forward, 1.0)), critics)  # fmt: skip
    size = theirs["completion_mask"].shape[1]
    for name in ("old_log_probs", "old_values", "returns", "completion_mask", "sampler_log_probs"):
        np.testing.assert_allclose(ours[name][:, :size], theirs[name], atol=1e-6, err_msg=name)
    mask = theirs["completion_mask"]
    white = losses_whitened(ours["advantages"][:, :size], mask)
    np.testing.assert_allclose(white, theirs["advantages"], atol=1e-4)
    run = lambda objective, batch: jax.value_and_grad(lambda p: objective(p, batch, None)[0])(
        critics
    )
    both = jax.jit(lambda batch: (run(objective, batch), run(plain.objective, batch)))
    (loss, grads), (other, others) = both(ours)
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, others)
    assert not np.any(grads[GUIDE_HEAD]["kernel"])


def test_a_guide_that_is_the_policy_leaves_it_on_policy(critics):
    """The sampler's log-probs, in a cache that begins after the prefix, are those of the whole row."""
    model, _ = model_and_params()
    credit, _ = rl.guided_ppo(model.forward)
    (batch,) = taken(
        collector(guide_begins, 1.0, credit, rl.add_guided_policy(model.forward, 1.0),
                  guide=rl.writer(model, SAMPLING)), critics)  # fmt: skip
    np.testing.assert_allclose(batch["old_log_probs"], batch["sampler_log_probs"], atol=1e-5)
    own, fitted = map(np.asarray, written_masks(batch))
    lengths = batch["completion_mask"].sum(axis=1)
    np.testing.assert_array_equal(own.sum(axis=1), lengths - batch["stats"]["switch"])
    np.testing.assert_array_equal(own, fitted)
    assert batch["stats"]["switch"].any()


def losses_whitened(values, mask):
    centred = values - values[mask].mean()
    return np.where(mask, centred / np.sqrt(values[mask].var(ddof=1) + 1e-8), 0.0)


@functools.cache
def unclipped():
    """(credit, gradient of the loss), compiled once for all schedules."""
    credit, objective = rl.guided_ppo(model_and_params()[0].forward, value_clip=np.inf)
    return credit, jax.jit(jax.grad(lambda p, batch: objective(p, batch, None)[0]))


@pytest.mark.parametrize("schedule", [guide_begins, guide_ends, d2lols(1)])
def test_each_phase_trains_its_own_critic(critics, schedule):
    model, _ = model_and_params()
    credit, slope = unclipped()
    batches = collector(
        schedule, 1.0, credit, rl.add_guided_policy(model.forward, 1.0), updates=2, epochs=2
    )
    found = taken(batches, critics, 5)
    begins = [bool(schedule(number, None)) for number in (0, 0, 0, 0, 1)]
    for batch, by_policy in zip(found, begins, strict=True):
        assert np.all(batch["guide_critic"] == (not by_policy))
        grads = slope(critics, batch)
        norms = [float(jnp.abs(grads[name]["kernel"]).sum()) for name in ("value_head", GUIDE_HEAD)]
        assert (norms[0] > 0, norms[1] > 0) == (by_policy, not by_policy)
        # No other token than the policy's has a gradient through log π.
        masked = batch | {"advantages": batch["advantages"] * np.asarray(written_masks(batch)[0])}
        jax.tree.map(np.testing.assert_array_equal, slope(critics, masked), grads)


def test_critics_of_rows():
    params = {name: {"kernel": jnp.array([[x], [0.0]]), "bias": jnp.zeros(1)}
              for name, x in (("value_head", 1.0), (GUIDE_HEAD, 2.0))}  # fmt: skip
    hidden = jnp.tile(jnp.array([3.0, 5.0]), (2, 4, 1))
    found = critic_values(params, hidden, jnp.array([False, True]))
    assert found.tolist() == [[3.0] * 4, [6.0] * 4]


def test_references_add_their_cross_entropy(critics):
    model, _ = model_and_params()
    rows = {
        "tokens": jnp.array([[1, 6, 1, 7], [2, 6, 2, 7]]),
        "loss_mask": jnp.array([[0.0, 0, 1, 1]] * 2),
    }
    task = lambda params, batch, key: (jnp.float32(2.0), {"loss": jnp.float32(2.0)})
    both = rl.with_references(task, model.forward, 0.3)
    weighted = lambda p: 0.3 * supervised(model.forward)(p, rows, None)[0]
    whole = jax.value_and_grad(lambda p: both(p, {"references": rows}, None), has_aux=True)
    run = jax.jit(lambda p: (whole(p), jax.grad(weighted)(p), model.forward(p, rows).logits))
    ((loss, metrics), ours), plain, logits = run(critics)
    logits = logits[:, 1:3]
    wanted = losses.cross_entropy(logits, rows["tokens"][:, 2:]).mean()
    np.testing.assert_allclose(loss, 2.0 + 0.3 * wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["reference_loss"].value, wanted, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), ours, plain)


def test_what_cannot_be_honoured_is_one_line(critics):
    model, params = model_and_params()
    too_long, silent, one_row = says(1, 9), says(1, 3), says(1, 2)
    unbounded = lambda p, contexts, limits, key: too_long(
        p, contexts, np.full(len(contexts), 9), key
    )
    empty = lambda p, contexts, limits, key: silent(p, contexts, 0 * limits, key)
    missing = lambda p, contexts, limits, key: one_row(p, contexts[:1], limits[:1], key)
    policy = rl.writer(model, SAMPLING)
    for guide, message in ((unbounded, "of at most the given limits"), (empty, "has no token in any of 4"),
                           (missing, "must have 4 rows")):  # fmt: skip
        for pair in ((guide, policy), (policy, guide)):
            with pytest.raises(ValueError, match=message):
                mixed_rollout(params, PROMPTS, jax.random.key(0), *pair, SIZE, 0.8)
    for mix in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            collector(guide_begins, mix, None)
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            switch_times(jax.random.key(0), np.ones(3, int), mix)
    with pytest.raises(ValueError, match="lols: tau must lie"):
        lols(2.0)
    with pytest.raises(ValueError, match="d2lols: tau must be at least 0"):
        d2lols(-1)
    with pytest.raises(ValueError, match="weight must be at least 0"):
        rl.with_references(None, None, -1.0)
    with pytest.raises(ValueError, match="greedy"):
        rl.writer(model, SamplingConfig(3, temperature=0))
    without = {name: x for name, x in critics.items() if name != GUIDE_HEAD}
    batches = collector(d2lols(1), 0.8, None, rl.add_guided_policy(model.forward, 1.0))
    with pytest.raises(ValueError, match="no guide_value_head.*see with_critics"):
        taken(batches, without)


def test_the_loss_equals_a_slow_loop(critics):
    """Each loss is a mean over its own tokens, in a batch where both phases occur."""
    model, _ = model_and_params()
    credit, objective = rl.guided_ppo(model.forward, clip=0.1, value_clip=0.05, value_weight=0.3)
    score = rl.add_guided_policy(model.forward, 1.0)
    parts = [
        taken(collector(s, 1.0, credit, score), critics)[0] for s in (guide_begins, guide_ends)
    ]
    parts = [{name: part[name] for name in part if name != "stats"} for part in parts]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rng = np.random.default_rng(0)
    for name in ("old_log_probs", "old_values", "advantages"):
        batch[name] = batch[name] + rng.normal(0, 0.2, batch[name].shape).astype(np.float32)
    now = score(batch, critics, None)
    policy, critic = [], []
    for i, t in zip(*np.nonzero(batch["completion_mask"]), strict=True):
        at = lambda name, i=i, t=t: float(batch[name][i, t])
        if batch["author"][i, t] == 1:
            ratio = np.exp(float(now["old_log_probs"][i, t]) - at("old_log_probs"))
            limited = np.clip(ratio, 0.9, 1.1)
            policy.append(max(-ratio * at("advantages"), -limited * at("advantages")))
        if (batch["author"][i, t] == 4) == batch["guide_critic"][i]:
            value, old = float(now["old_values"][i, t]), at("old_values")
            near = old + np.clip(value - old, -0.05, 0.05)
            critic.append(0.5 * max((value - at("returns")) ** 2, (near - at("returns")) ** 2))
    assert 0 < len(policy) != len(critic)
    loss, metrics = jax.jit(lambda p, batch: objective(p, batch, None))(critics, batch)
    np.testing.assert_allclose(loss, np.mean(policy) + 0.3 * np.mean(critic), rtol=1e-4)
    np.testing.assert_allclose(metrics["value_loss"].value, np.mean(critic), rtol=1e-4)
