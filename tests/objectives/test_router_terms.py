"""The routers' terms of a loss: the loss of a whole batch for any split, and nothing of padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.losses import balance_loss, expert_load, router_z_loss
from jaxft.models import Prediction, Routing
from jaxft.objectives import RouterTerms, supervised
from jaxft.train import accumulate

TERMS = RouterTerms(balance=0.5, z=0.25)


def forward(params, batch, key=None):
    """A bigram model with a router."""
    hidden = params["embed"][batch["tokens"]]
    logits = (hidden @ params["router"])[None]
    routing = Routing(logits, jax.lax.top_k(logits, 2)[1])
    return Prediction(hidden, params["head"], routing=routing)


@pytest.fixture(scope="module")
def task():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"embed": (16, 6), "router": (6, 4), "head": (6, 16)}
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=False)}
    tokens = jax.random.randint(keys[3], (8, 8), 0, 16)
    segments = (jnp.arange(8)[None] < jnp.arange(1, 9)[:, None]).astype(jnp.int32)
    return params, {"tokens": tokens, "segment_ids": segments}


def run(task, estimator=jax.value_and_grad, terms=TERMS, **changes):
    params, batch = task
    objective = supervised(forward, router=terms)
    program = jax.jit(estimator(objective, has_aux=True))
    return program(params, batch | changes, jax.random.key(0))


def test_the_loss_is_the_sum_of_its_terms(task):
    (loss, metrics), _ = run(task)
    routing, mask = forward(*task).routing, 1.0 * task[1]["segment_ids"]
    logits = routing.logits
    load, tokens = expert_load(routing.chosen, mask, experts=4)
    mean = lambda x: float(jnp.sum(x * mask) / jnp.sum(mask))
    balance, z = mean(balance_loss(logits, load / tokens)), mean(router_z_loss(logits))
    expected = float(metrics["cross_entropy"].value) + 0.5 * balance + 0.25 * z
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(metrics["router/load"].value, load / tokens * 2, rtol=1e-6)
    assert float(run(task, terms=RouterTerms())[0][0]) == pytest.approx(
        float(metrics["cross_entropy"].value), rel=1e-6
    )


def test_microbatches_have_the_loss_of_the_whole_batch(task):
    found, wanted = run(task, accumulate(jax.value_and_grad, 4)), run(task)
    numbers = lambda result: jax.tree.leaves((result[0][0], result[1]))
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_padding_is_in_no_term(task):
    params, batch = task
    other = jnp.where(batch["segment_ids"] > 0, batch["tokens"], 5)
    assert (other != batch["tokens"]).any()
    assert float(run(task, tokens=other)[0][0]) == float(run(task)[0][0])
