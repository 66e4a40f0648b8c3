"""Distillation from a teacher of another family, packed, with LoRA: the plain formula and its gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.adapters import ALL_LINEAR, lora, partition
from jaxft.losses import generalised_jsd, linear_top_log_probs
from jaxft.objectives import (
    distillation,
    next_token,
    supervised,
    with_teacher,
    without_teacher,
)
from jaxft.train import init_state, jit_step, make_step
from jaxft.weights import to_dense
from tests.small_models import GPT2, LLAMA, adapted, base, trained

STUDENT, TEACHER = base(LLAMA), base(GPT2)


@functools.cache
def params():
    own = trained(adapted(STUDENT[1], {ALL_LINEAR: lora(2)}))
    return with_teacher(own, TEACHER[1])


def packed():
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 4 + [2] * 5 + [0], [1] * 10])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0], range(10)])
    return {
        "tokens": rng.integers(0, 29, (2, 10)) * (segments > 0),
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": rng.random((2, 10)) * (rng.random((2, 10)) < 0.7),
    }


def objective(**options):
    return distillation(STUDENT[0].forward, supervised, TEACHER[0].forward, **options)


@functools.cache
def derived(weight):
    """(loss, metrics, gradient) by the trainable part."""
    options = dict(beta=0.3, temperature=1.5, weight=weight)
    run = jax.jit(jax.value_and_grad(objective(**options), has_aux=True, allow_int=True))
    (loss, metrics), grads = run(params(), packed(), jax.random.key(0))
    return loss, metrics, partition(grads)[0]


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_the_plain_sum_and_reaches_the_student_alone(weight):
    batch = packed()

    @jax.jit
    def plain(params):
        student = STUDENT[0].forward(params, batch).logits
        teacher = jax.lax.stop_gradient(TEACHER[0].forward(TEACHER[1], batch).logits)
        targets, counted = next_token.shift(batch)
        mean = lambda x: jnp.sum(counted * x) / jnp.sum(counted)
        task = mean(optax.softmax_cross_entropy_with_integer_labels(student, targets))
        divergence = mean(generalised_jsd(student, teacher, beta=0.3, temperature=1.5))
        return (1 - weight) * task + weight * divergence, (task, divergence)

    (wanted, parts), grads = jax.value_and_grad(plain, has_aux=True, allow_int=True)(
        without_teacher(params())
    )
    loss, metrics, found = derived(weight)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    shown = metrics["task_loss"].value, metrics["divergence"].value
    chex.assert_trees_all_close(shown, parts, rtol=1e-5)
    # The teacher is frozen, so the trainable part of the gradient has nothing of it.
    assert not jax.tree.leaves(found["teacher"])
    known = jax.tree.leaves(partition(grads)[0])
    chex.assert_trees_all_close(jax.tree.leaves(found), known, rtol=2e-4, atol=1e-6)


def test_a_step_takes_the_teacher_as_an_input_and_leaves_it():
    program = jax.make_jaxpr(objective())(params(), packed(), jax.random.key(0))
    assert sum(np.size(x) for x in program.consts) < 100  # no weights
    optimizer = optax.sgd(0.5)
    state = init_state(params(), optimizer, jax.random.key(0))
    new, _ = jit_step(make_step(objective(), optimizer))(state, packed())
    chex.assert_trees_all_equal(new.params["teacher"], params()["teacher"])
    moved = jax.tree.map(lambda a, b: np.any(a != b), *map(partition_of, (new.params, params())))
    assert all(jax.tree.leaves(moved))


def partition_of(tree):
    return partition(tree)[0]


def test_rows_and_experience_with_a_model_or_its_columns_have_one_divergence():
    """A prompt of 4 tokens and a response of up to 6: `completion_mask` replaces `loss_mask`."""
    batch = packed() | {
        "segment_ids": np.ones((2, 10), int),
        "positions": np.tile(range(10), (2, 1)),
    }
    mask = np.arange(6) < np.array([[6], [3]])
    rows = batch | {"loss_mask": np.concatenate([np.zeros((2, 4)), mask], axis=1)}
    del batch["loss_mask"]
    experience = batch | {"completion_mask": mask}
    task = lambda forward: lambda *args: (jnp.zeros(()), {})

    @jax.jit
    def run(params):
        told = TEACHER[0].forward(TEACHER[1], rows)
        # All 29 tokens are listed; what the teacher says at position t is of token t + 1.
        listed = linear_top_log_probs(told.hidden, told.head, 29)
        listed = [jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) for x in listed]
        names = "teacher_ids", "teacher_top_log_probs"
        columns = dict(zip(names, listed, strict=True))
        own = {name: x[:, -6:] for name, x in columns.items()}
        of = lambda teacher, batch: distillation(STUDENT[0].forward, task, teacher, beta=1.0)(
            params, batch, None
        )
        model = [of(TEACHER[0].forward, x)[0] for x in (rows, experience)]
        return model + [of(None, x)[0] for x in (rows | columns, experience | own)]

    found = run(params())
    assert found[0] > 0.1
    np.testing.assert_allclose(found, [found[0]] * 4, rtol=2e-5)


def test_a_model_is_at_no_distance_from_itself_with_unused_rows():
    """The teacher's head has three more rows, as of a family whose vocabularies are padded."""
    model, own = STUDENT

    def forward(params, batch, key=None):
        found = model.forward(params, batch, key)
        return found.replace(head=jnp.pad(to_dense(found.head), ((0, 0), (0, 3))))

    run = jax.jit(distillation(model.forward, supervised, forward, beta=0.5))
    loss, _ = run(with_teacher(own, own), packed(), jax.random.key(0))
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=0.0), "weight must be above 0 and at most 1, got 0.0"),
        (dict(weight=1.5), "got 1.5"),
        (dict(beta=2.0), r"beta must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        objective(**change)


@pytest.mark.parametrize(
    "teacher, columns, message",
    [
        (True, {}, "the params have no teacher; see with_teacher"),
        (False, {}, "the batch has no 'teacher_ids'"),
        (False, {"teacher_ids": np.zeros((2, 9, 3))}, r"teacher_ids has shape \(2, 9, 3\)"),
        (False, {"teacher_ids": np.zeros((2, 10, 3))}, "no 'teacher_top_log_probs'"),
    ],
)
def test_a_missing_teacher_is_refused(teacher, columns, message):
    forward = TEACHER[0].forward if teacher else None
    run = distillation(STUDENT[0].forward, supervised, forward)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, STUDENT[1], packed() | columns, jax.random.key(0))
