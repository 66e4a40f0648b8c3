"""Samplers, transforms and collect functions of the user's own: what is honoured, and what is an error."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft import rl
from jaxft.parallel import make_mesh
from jaxft.rl.advantages import grpo_advantages
from jaxft.rl.rollouts import concatenated
from jaxft.train import fit
from tests.rl.rl_task import taken

GROUP, PROMPTS = 4, rl.Prompts([[1, 2], [3], [4, 5], [6]], 2)
OLD = lambda batch, params, key: batch | {"old_log_probs": batch["sampler_log_probs"]}
CREDIT = lambda rewards, batch: {"advantages": grpo_advantages(rewards, GROUP)}


def sampler(sizes=(3,), **own):
    """Random responses whose lengths go through `sizes`; `own` are functions of [B, N] or values."""
    sizes, numbers = itertools.cycle(sizes), itertools.count()

    def sample(params, asked, key):
        width, size, rows = asked.width or 2, next(sizes), GROUP * len(asked.ids)
        draw, ones = next(numbers), np.ones((rows, width + size), np.int32)
        batch = {
            "tokens": ones * (draw + 1),
            "segment_ids": ones,
            "positions": np.cumsum(ones, axis=1) - 1,
            "completion_mask": np.ones((rows, size), bool),
            "sampler_log_probs": np.zeros((rows, size), np.float32),
            "behaviour_log_probs": np.zeros((rows, size), np.float32),
            "truncated": np.zeros(rows, bool),
            # The first group of a draw has no contrast, the second has.
            "rewards": [0.0] * GROUP + [0.0, 1.0] * (GROUP // 2),
        }
        return batch | {n: f(rows, size) if callable(f) else f for n, f in own.items()}

    return sample


def collected(sample, *transforms, count=1, **settings):
    return taken(rl.collect(PROMPTS, sample, CREDIT, *transforms, **settings), {}, count)


def test_own_entries_of_draws_of_several_lengths_are_padded():
    own = dict(
        stats=lambda rows, size: {"mine": np.arange(rows) * 1.0},
        score=lambda rows, size: np.full((rows, size, 2), 7.0),
        whole=lambda rows, size: np.full((rows, 2 + size), 8),
        flat=lambda rows, size: np.full((rows, 5), 9),
        nested=lambda rows, size: {"score": np.full((rows, size), 6)},
        scalar=np.float32(3),
    )
    (batch,) = collected(rl.until_contrast(sampler((3, 5), **own), 2))
    # The contrast group of each draw, the shorter first.
    assert batch["tokens"][:, -3].tolist() == [1] * 4 + [2] * 4
    mask = batch["completion_mask"]
    assert mask.sum(axis=1).tolist() == [3] * 4 + [5] * 4 and mask.dtype == bool
    np.testing.assert_array_equal(batch["score"], 7.0 * mask[..., None] * np.ones(2))
    np.testing.assert_array_equal(batch["nested"]["score"], 6 * mask)
    np.testing.assert_array_equal(batch["whole"], 8 * (batch["tokens"] > 0))
    np.testing.assert_array_equal(batch["flat"], np.full((8, 5), 9))
    assert batch["scalar"] == 3 and batch["stats"]["mine"].tolist() == [4, 5, 6, 7] * 2
    assert batch["stats"]["reward"].tolist() == [0, 1] * 4


def test_columns_of_prompts_keep_their_shapes_even_where_they_are_as_long_as_rows():
    rows = lambda width, size: {
        "tokens": np.ones((1, width + size)),
        "completion_mask": np.ones((1, size), bool),
        "image": np.ones((1, width + size)),
    }
    batches = [rows(2, 3), rows(3, 2)]
    assert concatenated(batches, ["image"])["image"].shape == (2, 5)
    assert concatenated(batches)["image"].shape == concatenated(batches)["tokens"].shape == (2, 6)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_masks_of_numbers_and_lists_are_taken(dtype):
    own = dict(
        completion_mask=lambda rows, size: np.tri(rows, size, dtype=dtype),
        truncated=lambda rows, size: [True] + [False] * (rows - 1),
    )
    wanted = np.tri(8, 3).astype(bool)
    wanted[0] = False
    reference = lambda batch, params, key: batch | {"ref_log_probs": np.full((8, 3), -1.0)}
    numbers = lambda batch, params, key: (
        batch | {"completion_mask": batch["completion_mask"].astype(dtype)}
    )
    (batch,) = collected(sampler(**own), rl.mask_truncated, reference, numbers)
    np.testing.assert_array_equal(batch["completion_mask"], wanted)
    assert batch["completion_mask"].dtype == bool
    np.testing.assert_array_equal(batch["stats"]["response_kl"], wanted.sum(axis=1))


@pytest.mark.parametrize("devices", [None, 4])
def test_a_scalar_is_in_every_part_of_a_rollout(devices):
    mesh = None if devices is None else make_mesh(data=devices, devices=jax.devices()[:devices])
    scale = lambda batch, params, key: batch | {"scale": np.float32(batch["tokens"][0, 0])}
    batches = rl.collect(PROMPTS, sampler(), CREDIT, OLD, scale, updates=2, mesh=mesh)

    def objective(params, batch, key):
        loss = params["w"] * batch["scale"] + 0 * jnp.sum(batch["tokens"])
        return loss, {"scale": batch["scale"], "rows": batch["tokens"].shape[0] * 1.0}

    _, history = fit({"w": jnp.ones(())}, objective, optax.sgd(0.1), batches, steps=4, mesh=mesh)
    assert [(row["scale"], row["rows"]) for row in history] == [(1, 4), (1, 4), (2, 4), (2, 4)]


def test_rollouts_in_parts_whose_shapes_change_are_an_error_that_says_what_to_do():
    assert len(collected(sampler((3, 5)), count=2)) == 2
    with pytest.raises(ValueError, match="must pad prompts to asked.width columns"):
        collected(sampler((3, 5)), OLD, updates=2, count=3)


def test_what_is_no_batch_is_an_error():
    nothing = lambda batch, params, key: None
    with pytest.raises(ValueError, match="transform 1 returned NoneType instead of the batch"):
        collected(sampler(), OLD, nothing)
    with pytest.raises(ValueError, match="this one gave NoneType"):
        collected(lambda params, asked, key: None)
    with pytest.raises(ValueError, match=r"this one gave none of \['rewards', 'truncated'\]"):
        without = ("rewards", "truncated")
        whole = sampler()
        cut = lambda *args: {n: x for n, x in whole(*args).items() if n not in without}
        collected(rl.until_contrast(cut, 2))


@pytest.mark.parametrize("alone", [{"x": 1.0, "y": 2.0}, None])
def test_a_collect_function_returns_its_carry_too(alone):
    with pytest.raises(ValueError, match=r"must return \(batch, carry\), got"):
        objective = lambda params, batch, key: (params["w"], {})
        fit(
            {"w": jnp.ones(())},
            objective,
            optax.sgd(0.1),
            lambda params, carry, key: alone,
            steps=1,
        )
