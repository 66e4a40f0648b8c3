import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.adapters import combine, partition
from jaxft.keys import stream
from jaxft.metrics import Mean, Terms, terms_of
from jaxft.optim import spsa
from jaxft.train import accumulate, split_batch


def gradients(problem, batch, microbatches, objective):
    trainable, frozen = partition(problem.make_params())
    fun = lambda t, batch, key: objective(combine(t, frozen), batch, key)
    estimate = accumulate(jax.value_and_grad, microbatches)(fun, has_aux=True)
    return jax.jit(estimate)(trainable, batch, jax.random.key(0))


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_microbatches_of_ragged_weights_equal_the_whole_batch(problem, microbatches):
    batch = problem.make_batch(3)  # With 4 and 8, some microbatches have weight 0.
    whole = gradients(problem, batch, 1, problem.quiet)
    chex.assert_trees_all_close(
        gradients(problem, batch, microbatches, problem.quiet), whole, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("microbatches", [2, 8])
def test_microbatches_equal_a_plain_loop(problem, microbatches):
    batch = problem.make_batch(4)
    (loss, metrics), grads = gradients(problem, batch, microbatches, problem.quiet)
    total, weight, grad_sum = 0.0, 0.0, jax.tree.map(jnp.zeros_like, grads)
    for part in range(microbatches):
        rows = jax.tree.map(lambda x, p=part: x[p::microbatches], batch)
        (part_loss, _), part_grads = gradients(problem, rows, 1, problem.quiet)
        tokens = rows["weights"].sum()
        total, weight = total + part_loss * tokens, weight + tokens
        grad_sum = jax.tree.map(lambda a, b, n=tokens: a + b * n, grad_sum, part_grads)
    expected = jax.tree.map(lambda g: g / weight, grad_sum)
    chex.assert_trees_all_close((loss, grads), (total / weight, expected), rtol=1e-5, atol=1e-7)
    assert metrics["loss"].weight == weight


def test_a_microbatch_of_weight_zero_contributes_nothing_even_if_it_holds_nan(problem):
    batch = problem.make_batch(5)
    rows = batch["weights"].sum(1) == 0
    broken = {**batch, "x": np.where(rows[:, None, None], np.nan, batch["x"])}
    # Rows 0 and 4 of 8 have no tokens; with 4 microbatches they are the only ones in the first.
    assert rows.tolist() == [True, False, False, False] * 2
    value, grads = gradients(problem, broken, 4, problem.quiet)
    expected = gradients(problem, batch, 1, problem.quiet)
    chex.assert_tree_all_finite((value, grads))
    chex.assert_trees_all_close((value, grads), expected, rtol=1e-5, atol=1e-7)


def test_all_weights_zero_give_zero(problem):
    batch = problem.make_batch(5)
    batch = {**batch, "weights": np.zeros_like(batch["weights"])}
    (loss, _), grads = gradients(problem, batch, 4, problem.quiet)
    assert loss == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


def test_metrics_that_are_no_means_are_averaged_with_the_weights_of_the_loss():
    def objective(params, batch, key):
        del key
        loss = Mean.of(batch * params, jnp.abs(batch))
        return loss.value, {"loss": loss, "mean": jnp.mean(batch), "count": Mean(1, 1)}

    batch = jnp.array([1.0, 2.0, 3.0, 6.0])
    estimate = accumulate(jax.value_and_grad, 2)(objective, has_aux=True)
    (_, metrics), _ = estimate(jnp.array(1.0), batch, jax.random.key(0))
    # Microbatches [1, 3] and [2, 6] of weights 4 and 8 and means 2 and 4.
    chex.assert_trees_all_close(metrics["mean"], (4 * 2.0 + 8 * 4.0) / 12)
    chex.assert_trees_all_close(metrics["count"], Mean(2.0, 2.0))


def two_terms(stop, compiled=False, constant=False):
    """Means over different weights; one may be a constant."""

    def objective(params, batch, key):
        del key
        second = jnp.ones(()) if constant else params
        task = Mean.of((params * batch["x"]) ** 2, batch["w"])
        terms = Terms((task, Mean.of(second * batch["x"], batch["v"])))
        metrics = {"loss": terms, "size": jnp.abs(params)}
        stopped = jax.lax.stop_gradient(metrics)
        return terms.value, stopped if stop else stopped | {"loss": terms}

    return jax.jit(objective) if compiled else objective


TWO = {"x": jnp.arange(1.0, 5.0), "w": jnp.array([1.0, 0, 1, 1]), "v": jnp.array([0.0, 2, 1, 0])}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("outer", [lambda f: f, jax.jit])
def test_terms_without_a_gradient_are_refused(compiled, outer):
    args = jnp.array(0.5), TWO, jax.random.key(0)
    refused = pytest.raises(ValueError, match="Terms without a gradient, but microbatches")
    sliced = lambda f, gradient=jax.value_and_grad: outer(accumulate(gradient, 2)(f, has_aux=True))
    with refused:
        sliced(two_terms(True, compiled))(*args)
    # Another objective's loss, too, is made of the terms.
    logged = two_terms(True, compiled)
    around = lambda *a: (Terms(terms_of(*(lambda o: (o[0], o[1]["loss"]))(logged(*a)))).value, {})
    with refused:
        outer(jax.grad(around, has_aux=True))(*args)
    for constant in (False, True):
        whole = jax.value_and_grad(two_terms(False, compiled, constant), has_aux=True)(*args)
        (loss, _), grads = sliced(two_terms(False, compiled, constant))(*args)
        chex.assert_trees_all_close((loss, grads), (whole[0][0], whole[1]), rtol=1e-6)
    # What differentiates nothing needs no gradient.
    estimates = [sliced(two_terms(stop), spsa(1e-2))(*args)[1] for stop in (True, False)]
    assert estimates[0] == estimates[1] != 0


def test_an_objective_without_a_mean_has_weight_one():
    objective = lambda params, batch, key: (params * jnp.mean(batch), {})
    estimate = accumulate(jax.value_and_grad, 2)(objective, has_aux=True)
    (loss, metrics), grads = estimate(
        jnp.array(2.0), jnp.array([1.0, 2.0, 3.0, 4.0]), jax.random.key(0)
    )
    chex.assert_trees_all_close((loss, grads, metrics), (5.0, 2.5, {}))


def test_the_objective_is_traced_once_for_its_weights_and_once_for_its_gradient():
    traced = []

    def objective(params, batch, key):
        traced.append(batch.shape)
        return jnp.sum(batch @ params), {}

    step = jax.jit(accumulate(jax.value_and_grad, 2)(objective, has_aux=True))
    step(jnp.ones(3), jnp.ones((4, 3)), jax.random.key(0))
    assert traced == [(2, 3)] * 2


def test_bfloat16_gradients_are_summed_in_float32():
    objective = lambda params, batch, key: (jnp.sum(params * batch.astype(params.dtype)), {})
    estimate = accumulate(jax.value_and_grad, 1024)(objective, has_aux=True)
    _, grads = estimate(jnp.array(1.0, jnp.bfloat16), jnp.ones(1024), jax.random.key(0))
    # In bfloat16 a sum of ones stops at 256.
    assert grads.dtype == jnp.bfloat16
    assert grads == 1.0


def test_each_microbatch_has_its_own_key():
    objective = lambda params, batch, key: (params * jax.random.normal(key), {})
    estimate = accumulate(jax.value_and_grad, 2)(objective, has_aux=True)
    _, grads = estimate(jnp.array(1.0), jnp.ones(2), jax.random.key(7))
    draws = [
        jax.random.normal(k) for k in (stream(jax.random.key(7), "microbatch", i) for i in range(2))
    ]
    chex.assert_trees_all_close(grads, (draws[0] + draws[1]) / 2)


def test_split_batch_takes_strided_rows_and_shares_scalars():
    parts = split_batch({"x": jnp.arange(6), "scale": 2.0}, 3)
    chex.assert_trees_all_equal(parts["x"], jnp.array([[0, 3], [1, 4], [2, 5]]))
    chex.assert_trees_all_equal(parts["scale"], jnp.full(3, 2.0))


def test_bad_splits_are_refused():
    with pytest.raises(ValueError, match=r"6 rows of 'x' \(6,\) cannot be split into 4"):
        split_batch({"x": jnp.arange(6)}, 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        accumulate(jax.value_and_grad, 0)
