import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import losses
from jaxft.models import Decoder, tiny_config
from jaxft.objectives import shift, supervised, token_supervised
from tests.small_models import forward_of, jitted, start


def test_shift_stays_inside_segments():
    batch = {
        "tokens": jnp.array([[5, 6, 7, 8, 9, 0]]),
        "segment_ids": jnp.array([[1, 1, 2, 2, 2, 0]]),
        "loss_mask": jnp.array([[1.0, 1.0, 1.0, 0.0, 0.5, 0.0]]),
    }
    targets, weights = shift(batch)
    chex.assert_trees_all_equal(targets, jnp.array([[6, 7, 8, 9, 0, 0]]))
    # 5 -> 6 counts; 6 -> 7 crosses; 8 is masked; 8 -> 9 has weight 1/2; padding never counts.
    chex.assert_trees_all_equal(weights, jnp.array([[1.0, 0.0, 0.0, 0.5, 0.0, 0.0]]))


def test_packed_rows_give_the_loss_and_gradient_of_records_alone():
    model = Decoder(dataclasses.replace(tiny_config(vocab_size=17), num_layers=1))
    forward = forward_of(model)
    rng = np.random.default_rng(0)
    records = [rng.integers(0, 17, n) for n in (3, 5, 2, 4)]
    params = start(model)

    def row(parts, length=10):
        filled = sum(len(p) for p in parts)
        fill = lambda values: np.concatenate([*values, np.zeros(length - filled, int)])
        segments = fill([np.full(len(p), i + 1) for i, p in enumerate(parts)])
        return {
            "tokens": fill(parts),
            "segment_ids": segments,
            "positions": fill([np.arange(len(p)) for p in parts]),
            "loss_mask": (segments > 0).astype(np.float32),
        }

    stack = lambda rows: jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *rows)
    packed = stack([row(records[:2]), row(records[2:])])
    alone = stack([row([record]) for record in records])
    run = jax.jit(jax.value_and_grad(supervised(forward), has_aux=True))
    (loss, metrics), grads = run(params, packed, None)
    (loss_alone, metrics_alone), grads_alone = run(params, alone, None)
    chex.assert_trees_all_close((loss, grads), (loss_alone, grads_alone), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, metrics_alone, rtol=1e-6)
    # With the cross-entropy given as a loss of logits, and weights that are not all one.
    packed["loss_mask"] *= jnp.linspace(0.0, 2.0, 10)[None]
    given = token_supervised(
        forward,
        lambda key, logits, targets, mask: losses.cross_entropy(logits, targets),
        lambda key, logits, targets: {"right": (jnp.argmax(logits, axis=-1) == targets) * 1.0},
    )
    theirs, ours = run(params, packed, None), jax.value_and_grad(given, has_aux=True)
    (loss_given, found), grads_given = jax.jit(ours)(params, packed, None)
    chex.assert_trees_all_close(
        (loss_given, grads_given), (theirs[0][0], theirs[1]), rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_close(found["loss"], theirs[0][1]["loss"], rtol=1e-6)
    assert found["right"].weight == found["loss"].weight
    assert metrics["loss"].weight == sum(len(r) - 1 for r in records)

    # Behind each record zeros, which it does not see.
    rows = np.stack([np.pad(record, (0, 5 - len(record))) for record in records])
    logits = jitted(model)({"params": params}, rows).logits
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows[:, 1:])
    count = np.array([len(record) - 1 for record in records])
    expected = np.sum(each * (np.arange(4) < count[:, None])) / count.sum()
    chex.assert_trees_all_close(loss, expected, rtol=1e-5)
