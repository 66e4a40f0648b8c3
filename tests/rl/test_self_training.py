"""Self-training: what is kept, and the loss of the online form against its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import rl
from jaxft.metrics import rerank
from jaxft.objectives import completion_log_probs, supervised
from tests.rl.rl_task import model_and_params


def test_right_answers_are_kept_once_beside_the_gold_ones():
    samples = [["a", "b", "a", "gold"], ["c", "c", "x", "y"], ["z"] * 4]
    correct = [[True, False, True, True], [True, True, False, True], [False] * 4]
    own = [(0, "a"), (0, "gold"), (1, "c"), (1, "y")]
    assert rl.offline_collect(samples, correct) == own
    kept = rl.offline_collect(samples, correct, ["gold", "other", "last"])
    assert kept == [(0, "gold"), (1, "other"), (2, "last"), (0, "a"), (1, "c"), (1, "y")]
    with pytest.raises(ValueError, match="2 gold answers for 3 questions"):
        rl.offline_collect(samples, correct, ["a", "b"])
    with pytest.raises(ValueError, match="differ in number"):
        rl.offline_collect(samples, correct[:2])


@pytest.fixture(scope="module")
def batch():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 6, (3, 5)))
    samples = {
        "tokens": tokens,
        "positions": jnp.tile(jnp.arange(5), (3, 1)),
        "segment_ids": jnp.ones((3, 5), jnp.int32),
        "completion_mask": jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool),
    }
    gold = {"tokens": tokens[:2, ::-1], "loss_mask": jnp.ones((2, 5)).at[:, :2].set(0.0)}
    return {"samples": samples, "gold": gold}


def test_the_online_loss_is_half_of_each_cross_entropy(batch):
    model, params = model_and_params()
    run = jax.jit(jax.value_and_grad(rl.online_self_training(model.forward), has_aux=True))

    def with_rewards(*rewards):
        samples = batch["samples"]
        credit = rl.right_samples(jnp.array(rewards), samples)
        return run(params, batch | {"samples": samples | credit}, None)

    gold = lambda p: supervised(model.forward)(p, batch["gold"], None)[0]
    given, gold_grads = jax.jit(jax.value_and_grad(gold))(params)
    (loss, metrics), _ = with_rewards(1.0, 0.1, 1.0)
    log_probs = np.asarray(completion_log_probs(model.forward, params, batch["samples"]))
    own = -(log_probs[0].sum() + log_probs[2].sum()) / 6
    np.testing.assert_allclose(loss, 0.5 * own + 0.5 * given, rtol=1e-5)
    np.testing.assert_allclose(metrics["right"].value, 2 / 3, rtol=1e-6)
    # Without a right sample, half of the gold answers' cross-entropy is left.
    (loss, _), grads = with_rewards(0.1, jnp.nan, 0.0)
    np.testing.assert_allclose(loss, 0.5 * given, rtol=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, 0.5 * b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, grads, gold_grads)


def test_rerank():
    assert rerank([0.1, 0.9, 0.9], ["a", "b", "c"]) == "b"
    assert rerank([0.1, 0.9], ["a", None]) == "a"
    assert rerank([0.5], [None]) is None and rerank([], []) is None
    with pytest.raises(ValueError, match="2 scores for 1 answers"):
        rerank([1.0, 2.0], ["a"])
