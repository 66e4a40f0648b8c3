"""Rounds of federated averaging as steps (McMahan et al., 2017, arxiv.org/abs/1602.05629)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.adapters import adapt, combine, lora, partition
from jaxft.train import init_state, run_steps
from jaxft.weights import matmul

CLIENTS, LOCAL, DIM = 3, 5, 6
SERVER, CLIENT = optax.sgd(1.0), optax.sgd(0.05)


def loss_fn(trainable, frozen, rows):
    kernel = combine(trainable, frozen)["kernel"]
    return jnp.mean((matmul(rows["x"], kernel) - rows["y"]) ** 2)


def step(state, batch):
    """Each client [K, ...] takes local steps from the server's adapter, whose next is their mean."""
    trainable, frozen = partition(state.params)

    def client(rows):
        def local(carry, _):
            params, opt_state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, frozen, rows)
            updates, opt_state = CLIENT.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        start = trainable, CLIENT.init(trainable)
        (params, _), found = jax.lax.scan(local, start, length=LOCAL)
        return jax.tree.map(jnp.subtract, trainable, params), found[0]

    deltas, before = jax.vmap(client)({name: batch[name] for name in ("x", "y")})
    share = batch["share"] / jnp.sum(batch["share"])
    mean = jax.tree.map(lambda d: jnp.tensordot(share, d, axes=1), deltas)
    updates, opt_state = SERVER.update(mean, state.opt_state, trainable)
    params = combine(optax.apply_updates(trainable, updates), frozen)
    carry = {"rounds": state.carry["rounds"] + 1, "seen": state.carry["seen"] + batch["share"]}
    return state._replace(params=params, opt_state=opt_state, carry=carry), {"loss": before @ share}


def task():
    rng = np.random.default_rng(0)
    truth, x = rng.normal(size=(DIM, DIM)), rng.normal(size=(CLIENTS, 32, DIM))
    share = jnp.array([1.0, 2.0, 3.0])
    return {"x": jnp.array(x), "y": jnp.array(x @ truth), "share": share}


def test_three_clients_learn_one_adapter():
    params = adapt(jax.random.key(0), {"kernel": jnp.zeros((DIM, DIM))}, {"kernel": lora(rank=DIM)})
    carry = {"rounds": jnp.zeros((), jnp.int32), "seen": jnp.zeros(CLIENTS)}
    first = init_state(params, SERVER, jax.random.key(1), carry)
    one, metrics = step(first, task())
    # One round by a slow loop: local steps client by client, then the weighted mean of where they end.
    trainable, frozen = partition(params)
    ends = []
    for i in range(CLIENTS):
        rows, theirs = {k: task()[k][i] for k in "xy"}, trainable
        for _ in range(LOCAL):
            grads = jax.grad(loss_fn)(theirs, frozen, rows)
            theirs = jax.tree.map(lambda p, g: p - 0.05 * g, theirs, grads)
        ends.append(theirs)
    wanted = jax.tree.map(lambda *p: (p[0] + 2 * p[1] + 3 * p[2]) / 6, *ends)
    for a, b in zip(*map(jax.tree.leaves, (partition(one.params)[0], wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    state, history = run_steps(first, step, [task()] * 60)
    assert history[-1]["loss"] < 0.01 * history[0]["loss"] and int(state.carry["rounds"]) == 60
