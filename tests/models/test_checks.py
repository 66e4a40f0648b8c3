"""Batches and forwards of wrong shapes are refused while tracing, with what was wrong and what to do."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxft import objectives
from jaxft.losses import dpo_loss
from jaxft.models import Prediction
from jaxft.objectives.policy import token_mean
from jaxft.rewards import sequence_rewards
from jaxft.rl.token_losses import clipped

B, T, D, V = 3, 5, 4, 7
PARAMS = {
    "embed": jnp.ones((V, D)),
    "head": jnp.ones((D, V)),
    "reward": {"kernel": jnp.ones((D, 1))},
}
ones = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
tokens = functools.partial(ones, dtype=jnp.int32)
ROWS = {"tokens": tokens(B, T), "loss_mask": ones(B, T)}
GROUPS = {
    "tokens": tokens(B, 2, T),
    "loss_mask": ones(B, 2, T),
    "ref_log_probs": ones(B, 2),
    "label": ones(B, dtype=bool),
}
EXPERIENCE = {
    "tokens": tokens(B, T),
    "completion_mask": ones(B, 2, dtype=bool),
    "sampler_log_probs": ones(B, 2),
    "advantages": ones(B),
}


def forward(params, batch, key=None):
    return Prediction(params["embed"][batch["tokens"]], params["head"])


def longer(params, batch, key=None):
    padded = jnp.pad(batch["tokens"], ((0, 0), (2, 0)))
    return forward(params, batch | {"tokens": padded})


def shorter(params, batch, key=None):
    return forward(params, batch).at(slice(None), slice(0, -1))


def logits(params, batch, key=None):
    return forward(params, batch).logits


class Model:
    """A class with a forward."""

    def forward(self, params, batch, key=None):
        return forward(params, batch)

    def __call__(self, params, batch, key=None):
        return forward(params, batch)


def policy(forward):
    def token_loss(log_probs, old, batch):
        return clipped()(log_probs, old, batch)

    return objectives.policy_gradient(forward, token_loss, token_mean)


def rewards(forward):
    def objective(params, batch, key):
        return sequence_rewards(forward, params, batch, key)

    return objective


KINDS = {
    "supervised": (objectives.supervised, ROWS),
    "coverage": (lambda f: objectives.coverage(f, 4), ROWS),
    "token_logits": (objectives.token_logits, ROWS),
    "preference": (lambda f: objectives.preference(f, dpo_loss), GROUPS),
    "kto": (objectives.kto, GROUPS),
    "bco": (objectives.bco, GROUPS),
    "outcome_reward": (objectives.outcome_reward, GROUPS),
    "pairwise_reward": (objectives.pairwise_reward, GROUPS),
    "rewards": (rewards, GROUPS),
    "policy_gradient": (policy, EXPERIENCE),
}


def trace(kind, forward=forward, **columns):
    make, batch = KINDS[kind]
    batch = {k: x for k, x in (batch | columns).items() if x is not None}
    return jax.eval_shape(make(forward), PARAMS, batch, jax.random.key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_forwards_that_predict_something_else_are_refused(kind):
    trace(kind)
    for wrong, length in ((longer, T + 2), (shorter, T - 1)):
        with pytest.raises(ValueError, match=rf"hidden states \(\d, {length}, 4\) for tokens"):
            trace(kind, wrong)
    with pytest.raises(ValueError, match=r"expected a jaxft.models.Prediction.*got .*\d, 5, 7"):
        trace(kind, logits)
    with pytest.raises(ValueError, match="got a Model itself; pass its function: model.forward"):
        trace(kind, Model())
    with pytest.raises(ValueError, match="expected a function .* got a dict"):
        trace(kind, {})


@pytest.mark.parametrize(
    "kind, columns, message",
    [
        ("supervised", {"loss_mask": ones(B)}, r"loss_mask \(3,\) must have .* tokens \(3, 5\)"),
        ("supervised", {"loss_mask": ones(B, 1)}, r"loss_mask \(3, 1\) must have"),
        ("supervised", {"loss_mask": ones(B, T - 1)}, r"loss_mask \(3, 4\) must have"),
        ("supervised", {"segment_ids": tokens(1, T)}, r"segment_ids \(1, 5\) must have"),
        ("supervised", {"tokens": tokens(T)}, r"must be \[B, T\], got \(5,\)"),
        ("supervised", {"tokens": tokens(0, T)}, "no rows"),
        ("coverage", {"loss_mask": ones(B, 1)}, r"loss_mask \(3, 1\) must have"),
        ("preference", {"loss_mask": ones(B, 2, 1)}, r"loss_mask \(3, 2, 1\) must have"),
        ("preference", {"loss_mask": ones(B, T)}, r"loss_mask \(3, 5\) must have"),
        ("rewards", {"loss_mask": ones(B, 2, 1)}, r"loss_mask \(3, 2, 1\) must have"),
        ("preference", {"ref_log_probs": ones(B, 1)}, r"shape \(3, 1\), expected \(3, 2\)"),
        ("preference", {"ref_log_probs": ones(B)}, r"shape \(3,\), expected \(3, 2\)"),
        ("kto", {"ref_log_probs": ones(B, 1)}, r"shape \(3, 1\), expected \(3, 2\)"),
        ("bco", {"ref_log_probs": ones(1, 2)}, r"shape \(1, 2\), expected \(3, 2\)"),
        ("kto", {"label": ones(B, 1, dtype=bool)}, r"label has shape \(3, 1\), expected \(3,\)"),
        ("bco", {"label": ones(B)}, "bool or integer .* got float32"),
        ("outcome_reward", {"label": ones(dtype=bool)}, r"label has shape \(\), expected \(3,\)"),
        ("policy_gradient", {"sampler_log_probs": ones(B, 1)}, r"\(3, 1\), expected \(3, 2\)"),
        ("policy_gradient", {"ref_log_probs": ones(B, 1)}, r"\(3, 1\), expected \(3, 2\)"),
        ("policy_gradient", {"completion_mask": ones(B, dtype=bool)}, r"completion_mask has shape"),
        ("policy_gradient", {"tokens": tokens(T)}, r"must be \[B, T\], got \(5,\)"),
    ]
    + [(kind, {"label": None}, f"{kind}: the batch has no 'label'") for kind in ("kto", "bco")],
)
def test_columns_of_other_shapes_are_refused(kind, columns, message):
    with pytest.raises(ValueError, match=message):
        trace(kind, **columns)


@pytest.mark.parametrize("kind", ["preference", "pairwise_reward"])
@pytest.mark.parametrize("size", [1, 3])
def test_groups_that_are_no_pairs_are_refused(kind, size):
    shapes = {"tokens": tokens(B, size, T), "loss_mask": ones(B, size, T)}
    with pytest.raises(ValueError, match=rf"{kind}: .* groups of {size} .* expected \[B, 2, T\]"):
        trace(kind, **shapes, ref_log_probs=ones(B, size))


def test_kto_needs_the_other_completion():
    shapes = {"tokens": tokens(B, 1, T), "loss_mask": ones(B, 1, T), "ref_log_probs": ones(B, 1)}
    with pytest.raises(ValueError, match="no sequence 1 in groups of 1"):
        trace("kto", **shapes)
    trace("bco", **shapes)


@pytest.mark.parametrize("kind", ["kto", "bco", "outcome_reward"])
def test_labels_are_desirable_above_0(kind):
    make, shapes = KINDS[kind]
    batch = {k: jnp.ones(s.shape, s.dtype) for k, s in shapes.items()}
    batch["ref_log_probs"] = jnp.arange(2.0 * B).reshape(B, 2)
    loss = lambda label: make(forward)(PARAMS, batch | {"label": label}, jax.random.key(0))[0]
    wanted = loss(jnp.array([True, False, False]))
    assert wanted != loss(jnp.array([True, True, True]))
    assert wanted == loss(jnp.array([1, 0, 0])) == loss(jnp.array([1, -1, -1]))
