"""Four critic updates an actor update: SAC (Haarnoja et al., 2018, arxiv.org/abs/1801.01290)."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from jaxft.train import Checkpoints, init_state, run_steps

ENVS, ROOM, GAMMA, TAU, ALPHA, GOAL = 8, 512, 0.9, 0.05, 0.05, 2.0
ACTOR, CRITIC = (nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(n)]) for n in (2, 1))
OPTIMIZER = optax.adam(1e-2)


def act(actor, place, key):
    mean, log_std = ACTOR.apply(actor, place[:, None]).T
    noise, log_std = jax.random.normal(key, place.shape), jnp.clip(log_std, -3, 0)
    return mean + noise * jnp.exp(log_std), -(noise**2) / 2 - log_std


def value(critic, place, action):
    return CRITIC.apply(critic, jnp.stack([place, action], axis=-1))[:, 0]


def loss(params, target, rows, key):
    fixed = jax.lax.stop_gradient(params)
    action, log_prob = act(fixed["actor"], rows["next"], key)
    goal = rows["reward"] + GAMMA * (value(target, rows["next"], action) - ALPHA * log_prob)
    critic = jnp.mean((value(params["critic"], rows["place"], rows["action"]) - goal) ** 2)
    action, log_prob = act(params["actor"], rows["place"], key)
    return critic + jnp.mean(ALPHA * log_prob - value(fixed["critic"], rows["place"], action))


def step(state, batch):
    """One action in each environment; the carry has the places, the replay buffer and the slow critic."""
    place, replay, target = state.carry
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 5)
    action, _ = act(state.params["actor"], place, keys[0])
    moved = jnp.clip(place + jnp.clip(action, -1, 1), -3, 3)
    seen = {"place": place, "action": action, "reward": -((moved - GOAL) ** 2), "next": moved}
    number = state.step * ENVS + jnp.arange(ENVS)
    replay = {name: replay[name].at[number % ROOM].set(x) for name, x in seen.items()}

    def update(carry, inputs):
        (params, opt_state, target), (i, key) = carry, inputs
        picked = jax.random.randint(key, (64,), 0, jnp.minimum(number[-1] + 1, ROOM))
        rows = {name: x[picked] for name, x in replay.items()}
        found, grads = jax.value_and_grad(loss)(params, target, rows, key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        updates = {**updates, "actor": optax.tree.scale(i == 3, updates["actor"])}
        params = optax.apply_updates(params, updates)
        return (params, opt_state, optax.incremental_update(params["critic"], target, TAU)), found

    start, inputs = (state.params, state.opt_state, target), (jnp.arange(4), keys[1:])
    (params, opt_state, target), found = jax.lax.scan(update, start, inputs)
    state = state._replace(params=params, opt_state=opt_state, carry=(moved, replay, target))
    return state, {"loss": found[-1], "reward": jnp.mean(seen["reward"])}


def run(batches, checkpoints=None):
    params = {"actor": ACTOR.init(jax.random.key(1), jnp.zeros((1, 1)))}
    params["critic"] = CRITIC.init(jax.random.key(2), jnp.zeros((1, 2)))
    replay = {name: jnp.zeros(ROOM) for name in ("place", "action", "reward", "next")}
    carry = jnp.linspace(-3, 3, ENVS), replay, params["critic"]
    state = init_state(params, OPTIMIZER, jax.random.key(3), carry)
    return run_steps(state, step, batches, checkpoints=checkpoints)


def test_sac_learns_and_goes_on_after_a_kill_to_the_same_bits(tmp_path):
    whole, history = run([{}] * 120)
    reward = jnp.array([row["reward"] for row in history])
    assert reward[-40:].mean() > reward[:20].mean() + 2
    killed = ([{}][i // 70] for i in range(120))  # no batch after step 70: an error, nothing saved
    with pytest.raises(IndexError):
        run(killed, Checkpoints(tmp_path, every=40))
    again, _ = run([{}] * 120, Checkpoints(tmp_path, every=40, resume=True))
    chex.assert_trees_all_equal(*(s._replace(key=None) for s in (whole, again)))
