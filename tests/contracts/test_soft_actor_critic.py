"""Four critic updates an actor update: SAC (Haarnoja et al., 2018, arxiv.org/abs/1801.01290)."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxft.train import Checkpoints, init_state, run_steps

ENVS, ROOM, GAMMA, TAU, ALPHA, GOAL = 8, 512, 0.9, 0.05, 0.05, 2.0
ACTOR, CRITIC = (nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(n)]) for n in (2, 1))
RATES = {"actor": optax.adam(3e-3), "critic": optax.adam(1e-2)}
OPTIMIZER = optax.multi_transform(RATES, {name: name for name in RATES})


def act(actor, place, key):
    """(action, its log density) of a normal."""
    mean, log_std = ACTOR.apply(actor, place[:, None]).T
    noise, log_std = jax.random.normal(key, place.shape), jnp.clip(log_std, -3, 0)
    return mean + noise * jnp.exp(log_std), -(noise**2) / 2 - log_std


def value(critic, place, action):
    return CRITIC.apply(critic, jnp.stack([place, action], axis=-1))[:, 0]


def losses(params, target, rows, key):
    fixed = jax.lax.stop_gradient(params)
    action, log_prob = act(fixed["actor"], rows["next"], key)
    goal = rows["reward"] + GAMMA * (value(target, rows["next"], action) - ALPHA * log_prob)
    critic = jnp.mean((value(params["critic"], rows["place"], rows["action"]) - goal) ** 2)
    action, log_prob = act(params["actor"], rows["place"], key)
    actor = jnp.mean(ALPHA * log_prob - value(fixed["critic"], rows["place"], action))
    return critic + actor, {"critic": critic, "actor": actor}


def step(state, batch):
    """One action in each environment; the carry has their places, the replay buffer and the slow critic."""
    (place, replay, target), params, opt_state = state.carry, state.params, state.opt_state
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 6)
    action, _ = act(params["actor"], place, keys[0])
    moved = jnp.clip(place + jnp.clip(action, -1, 1), -3, 3)
    seen = {"place": place, "action": action, "reward": -((moved - GOAL) ** 2), "next": moved}
    number = state.step * ENVS + jnp.arange(ENVS)
    replay = {name: replay[name].at[number % ROOM].set(x) for name, x in seen.items()}

    def update(carry, inputs):
        (params, opt_state, target), (i, key) = carry, inputs
        picked = jax.random.randint(key, (64,), 0, jnp.minimum(number[-1] + 1, ROOM))
        rows = {name: x[picked] for name, x in replay.items()}
        grads, metrics = jax.grad(losses, has_aux=True)(params, target, rows, key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        updates = {**updates, "actor": optax.tree.scale(i == 3, updates["actor"])}
        params = optax.apply_updates(params, updates)
        target = optax.incremental_update(params["critic"], target, TAU)
        return (params, opt_state, target), metrics

    start = params, opt_state, target
    (params, opt_state, target), found = jax.lax.scan(update, start, (jnp.arange(4), keys[1:5]))
    again = jax.random.uniform(keys[5], (ENVS,), minval=-3, maxval=3)
    place = jnp.where((state.step + jnp.arange(ENVS)) % 8 == 0, again, moved)
    state = state._replace(params=params, opt_state=opt_state, carry=(place, replay, target))
    metrics = {name: x[-1] for name, x in found.items()}
    return state, metrics | {"reward": jnp.mean(seen["reward"])}


def run(directory=None, stop=None, resume=False):
    params = {"actor": ACTOR.init(jax.random.key(1), jnp.zeros((1, 1)))}
    params["critic"] = CRITIC.init(jax.random.key(2), jnp.zeros((1, 2)))
    replay = {name: jnp.zeros(ROOM) for name in ("place", "action", "reward", "next")}
    carry = jnp.linspace(-3, 3, ENVS), replay, params["critic"]
    state = init_state(params, OPTIMIZER, jax.random.key(3), carry)
    kept = directory and Checkpoints(directory, every=40, resume=resume)

    def kill(row):
        if row["step"] == stop:
            raise KeyboardInterrupt

    batches = itertools.repeat({})
    return run_steps(state, step, batches, steps=120, callbacks=[kill], checkpoints=kept)


def test_sac_learns_and_goes_on_after_a_kill_to_the_same_bits(tmp_path):
    whole, history = run()
    reward = jnp.array([row["reward"] for row in history])
    assert reward[-40:].mean() > reward[:20].mean() + 2  # of places drawn over all of the line
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=70)
    again, _ = run(tmp_path, resume=True)
    chex.assert_trees_all_equal(*(s._replace(key=None) for s in (whole, again)))
