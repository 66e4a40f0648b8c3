"""Q-learning of a NumPy environment: its walkers and a replay buffer in the carry, killed and resumed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.train import Checkpoints, fit

LENGTH, WALKERS, ROOM, GAMMA = 6, 4, 256, 0.8


def collect(params, carry, key):
    """A step to the left or right of each walker on a line whose right end pays 1; rows of the buffer."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    place, seen = np.asarray(carry["place"]), int(carry["seen"])
    replay = {name: np.array(x) for name, x in carry["replay"].items()}
    noise = 1e-6 * rng.random((WALKERS, 2))  # Of equal values either may be the best.
    greedy = (np.asarray(params["values"])[place] + noise).argmax(axis=1)
    action = np.where(rng.random(WALKERS) < 0.3, rng.integers(0, 2, WALKERS), greedy)
    moved = np.clip(place + 2 * action - 1, 0, LENGTH - 1)
    reward = (moved == LENGTH - 1).astype(np.float32)
    rows = (seen + np.arange(WALKERS)) % ROOM
    for name, x in dict(place=place, action=action, reward=reward, next=moved).items():
        replay[name][rows] = x
    picked = rng.integers(0, min(seen + WALKERS, ROOM), 32)
    place = np.where(reward > 0, 0, moved)
    carry = {**carry, "place": place, "seen": seen + WALKERS, "replay": replay}
    return {name: x[picked] for name, x in replay.items()}, carry


def q_loss(params, batch, key):
    values = params["values"]
    after = jnp.where(batch["reward"] > 0, 0.0, GAMMA * jnp.max(values[batch["next"]], axis=1))
    error = values[batch["place"], batch["action"]] - jax.lax.stop_gradient(batch["reward"] + after)
    return jnp.sum(error**2), {"paid": jnp.mean(batch["reward"])}


def run(directory=None, stop=None, resume=False):
    columns = {name: np.zeros(ROOM, np.int32) for name in ("place", "action", "next")}
    carry = {
        "place": np.zeros(WALKERS, np.int32),
        "seen": np.int32(0),
        "replay": columns | {"reward": np.zeros(ROOM, np.float32)},
        "mine": np.float32(2.0),
    }

    def kill(row):
        if row["step"] == stop:
            raise KeyboardInterrupt

    params = {"values": jnp.zeros((LENGTH, 2))}
    kept = directory and Checkpoints(directory, every=100, resume=resume)
    return fit(
        params, q_loss, optax.sgd(0.03), collect, carry=carry, steps=400, key=jax.random.key(1),
        callbacks=[kill], checkpoints=kept,
    )[0]  # fmt: skip


def test_it_learns_and_goes_on_after_a_kill_to_the_same_bits(tmp_path):
    whole = run()
    # To the right from everywhere; a step before the end is worth 1, one before that γ.
    values = np.asarray(whole.params["values"])
    np.testing.assert_allclose(values[:-1, 1], GAMMA ** np.arange(LENGTH - 2, -1, -1), atol=0.1)
    assert int(whole.carry["seen"]) == 400 * WALKERS and whole.carry["mine"] == 2.0
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=170)
    again = run(tmp_path, resume=True)
    chex.assert_trees_all_equal(*(s._replace(key=None) for s in (whole, again)))
