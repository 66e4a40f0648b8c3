"""Contrastive training of embeddings: its losses, what counts as a negative, memory, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.losses import info_nce, margin_mse
from jaxft.models import Pooling, embedding_of
from jaxft.objectives import contrastive, distilled_margins
from jaxft.parallel import make_mesh, mesh_context, shard_params
from jaxft.train import accumulate
from jaxft.train.batches import place_batch
from tests.small_models import BERT, base, large

MODEL, START = base(dataclasses.replace(BERT, num_layers=1, pooler=False))
PARAMS = jax.jit(large)(START)
EMBED = embedding_of(MODEL)
SIZE, TEXTS, WIDTH = 8, 3, 6


def groups(empty=(), none=()):
    """Queries, answers and one negative each; `empty` records, and records without a negative (`none`)."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, WIDTH + 1, (SIZE, TEXTS))
    lengths[list(empty)] = 0
    lengths[list(none), 2] = 0
    there = np.arange(WIDTH) < lengths[..., None]
    tokens = rng.integers(0, 29, there.shape) * there
    return {"tokens": tokens, "segment_ids": there.astype(np.int32)}


@functools.cache
def compiled(**options):
    objective = contrastive(EMBED, **options)
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def update(batch, **options):
    (loss, metrics), grads = compiled(**options)(PARAMS, batch, None)
    return float(loss), metrics, grads


def close(found, wanted, rtol=2e-4):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found[2]), jax.tree.leaves(wanted[2]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max() + 1e-6)


def by_hand(vectors, temperature, margin=0.0, symmetric=False, left_out=None):
    """The mean over queries, one number at a time; vectors [B, G, D]."""
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    queries, answers = unit[:, 0], [*unit[:, 1], *unit[:, 2:].reshape(-1, unit.shape[-1])]
    losses = []
    for i, query in enumerate(queries):
        scores = [(query @ a - margin * (i == j)) / temperature for j, a in enumerate(answers)]
        kept = [s for j, s in enumerate(scores) if i == j or left_out is None or not left_out[i, j]]
        loss = np.log(sum(np.exp(s) for s in kept)) - scores[i]
        if symmetric:
            back = [
                (q @ answers[i] - margin * (i == j)) / temperature for j, q in enumerate(queries)
            ]
            loss = (loss + np.log(sum(np.exp(s) for s in back)) - back[i]) / 2
        losses.append(loss)
    return np.mean(losses)


@pytest.mark.parametrize(
    "options",
    [{}, {"margin": 0.2}, {"symmetric": True}, {"temperature": 0.5}, {"cosine": False}],
    ids=str,
)
def test_the_loss_is_that_by_hand(options):
    batch = groups()
    flat = {name: x.reshape(-1, WIDTH) for name, x in batch.items()}
    embed = embedding_of(MODEL, Pooling(normalize=False))
    vectors = np.asarray(embed(PARAMS, flat, None), np.float64).reshape(SIZE, TEXTS, -1)
    given = {"temperature": 0.05} | options
    if given.pop("cosine", True):
        wanted = by_hand(vectors, **given)
    else:
        scores = vectors[:, 0] @ np.concatenate([vectors[:, 1], vectors[:, 2]]).T / 0.05
        wanted = np.mean([np.logaddexp.reduce(row) - row[i] for i, row in enumerate(scores)])
    objective = contrastive(embed, **options)
    loss, metrics = jax.jit(objective)(PARAMS, batch, None)
    assert float(loss) == pytest.approx(wanted, rel=1e-4)
    np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-6)


def test_empty_records_and_absent_negatives_change_nothing():
    batch, kept = groups(empty=(1, 5)), [0, 2, 3, 4, 6, 7]
    close(update(batch), update({name: x[kept] for name, x in batch.items()}))
    batch = groups(none=range(SIZE))
    close(update(batch), update({name: x[:, :2] for name, x in batch.items()}))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(update(groups(empty=range(SIZE)))[2]))


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_the_queries_of_empty_records_are_not_compared_with_answers(mode):
    """The last batch of an evaluation is filled with empty records."""
    batch, kept = groups(empty=(1, 5)), [0, 2, 3, 4, 6, 7]
    objective = jax.jit(contrastive(embedding_of(MODEL, Pooling((mode,))), symmetric=True))
    found = objective(PARAMS, batch, None)[0]
    wanted = objective(PARAMS, {name: x[kept] for name, x in batch.items()}, None)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_other_answers_to_the_same_query_are_not_negatives(symmetric):
    """Records 0, 2 and 5 have one query; record 4 has the answer of record 2 as its negative."""
    batch, same = groups(), (0, 2, 5)
    ids = np.arange(SIZE * TEXTS).reshape(SIZE, TEXTS)
    for i in same[1:]:
        ids[i, 0] = ids[0, 0]
        for name in ("tokens", "segment_ids"):
            batch[name][i, 0] = batch[name][0, 0]
    ids[4, 2] = ids[2, 1]
    for name in ("tokens", "segment_ids"):
        batch[name][4, 2] = batch[name][2, 1]
    left_out = np.zeros((SIZE, 2 * SIZE), bool)
    for i in same:
        left_out[i, [*same, SIZE + 4]] = True
    flat = {name: x.reshape(-1, WIDTH) for name, x in batch.items()}
    unit = np.asarray(EMBED(PARAMS, flat, None), np.float64).reshape(SIZE, TEXTS, -1)
    scores = 20 * unit[:, 0] @ np.concatenate([unit[:, 1], unit[:, 2]]).T
    scores[left_out & ~np.eye(*left_out.shape, dtype=bool)] = -np.inf
    losses = [np.logaddexp.reduce(row) - row[i] for i, row in enumerate(scores)]
    if symmetric:
        back = [np.logaddexp.reduce(scores[:, i]) - scores[i, i] for i in range(SIZE)]
        losses = np.add(losses, back) / 2
    found = update(batch | {"text_ids": ids}, symmetric=symmetric)[0]
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_batch_without_segments_has_whole_texts():
    batch = {"tokens": np.random.default_rng(3).integers(0, 29, (SIZE, TEXTS, WIDTH))}
    close(update(batch), update(batch | {"segment_ids": np.ones_like(batch["tokens"])}))


def test_equal_texts_are_not_negatives():
    """Record 3 has the answer of record 0, whose negative is the query of record 6."""
    batch = groups()
    for name in ("tokens", "segment_ids"):
        batch[name][3, 1], batch[name][0, 2] = batch[name][0, 1], batch[name][6, 0]
    ids = np.arange(SIZE * TEXTS).reshape(SIZE, TEXTS)
    ids[3, 1], ids[0, 2] = ids[0, 1], ids[6, 0]
    left_out = np.zeros((SIZE, 2 * SIZE), bool)
    left_out[0, 3] = left_out[3, 0] = left_out[6, SIZE + 0] = True
    flat = {name: x.reshape(-1, WIDTH) for name, x in batch.items()}
    vectors = np.asarray(EMBED(PARAMS, flat, None), np.float64).reshape(SIZE, TEXTS, -1)
    found = update(batch | {"text_ids": ids})[0]
    assert found == pytest.approx(by_hand(vectors, 0.05, left_out=left_out), rel=1e-4)
    assert found < update(batch)[0]


def test_chunks_and_devices_change_nothing():
    batch = groups(empty=(2,)) | {"text_ids": np.arange(SIZE * TEXTS).reshape(SIZE, TEXTS)}
    wanted = update(batch, dims=(8, 4))
    close(update(batch, dims=(8, 4), chunk=8), wanted)
    mesh = make_mesh(data=2, fsdp=4)
    objective = contrastive(EMBED, dims=(8, 4), chunk=12)
    with mesh_context(mesh):
        run = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (loss, _), grads = run(shard_params(PARAMS, mesh), place_batch(batch, mesh), None)
    close((loss, None, grads), wanted)


def test_chunks_keep_no_activations():
    """With 4 of 24 texts at a time, the backward pass keeps about a sixth."""
    saved = {}
    for chunk in (None, 4):
        run = jax.jit(jax.grad(lambda p, b, c=chunk: contrastive(EMBED, chunk=c)(p, b, None)[0]))
        saved[chunk] = run.lower(PARAMS, groups()).compile().memory_analysis().temp_size_in_bytes
    assert saved[4] < 0.5 * saved[None]


def test_shorter_embeddings_are_trained_too():
    batch = groups()
    parts = []
    for d in (16, 8, 4):
        cut = lambda params, rows, key, d=d: EMBED(params, rows, key)[:, :d]
        parts.append(float(contrastive(cut)(PARAMS, batch, None)[0]))
    assert update(batch, dims=(16, 8, 4))[0] == pytest.approx(np.mean(parts), rel=1e-5)


def test_margins_are_a_teachers():
    batch = groups(none=(4,)) | {"margins": np.linspace(-1, 1, SIZE)[:, None].astype(np.float32)}
    flat = {name: batch[name].reshape(-1, WIDTH) for name in ("tokens", "segment_ids")}
    vectors = np.asarray(EMBED(PARAMS, flat, None)).reshape(SIZE, TEXTS, -1)
    scores = np.einsum("bd,bgd->bg", vectors[:, 0], vectors[:, 1:])
    losses = (scores[:, 0] - scores[:, 1] - batch["margins"][:, 0]) ** 2
    loss, _ = distilled_margins(EMBED)(PARAMS, batch, None)
    np.testing.assert_allclose(loss, np.delete(losses, 4).mean(), rtol=1e-5)
    assert margin_mse(*jnp.array([3.0, 1.0, 1.5])) == 0.25


def test_wrong_settings_are_refused():
    batch = groups()
    run = lambda given=batch, **options: contrastive(EMBED, **options)(PARAMS, given, None)
    with pytest.raises(ValueError, match="chunk is 5, expected a divisor of the batch's 24 texts"):
        run(chunk=5)
    with pytest.raises(ValueError, match=r"dims \(8, 99\) must lie between 1 and the 16 features"):
        run(dims=(8, 99))
    with pytest.raises(ValueError, match="groups of 1 texts, expected at least 2"):
        run({name: x[:, :1] for name, x in batch.items()})
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        run(temperature=0.0)
    with pytest.raises(ValueError, match="margin must be finite, got nan"):
        contrastive(EMBED, margin=float("nan"))  # before any batch
    with pytest.raises(ValueError, match="one record without negatives has nothing to compare"):
        run({name: x[:1, :2] for name, x in batch.items()})
    run({name: x[:1] for name, x in batch.items()})  # with a negative there is something
    with pytest.raises(ValueError, match="groups of 2 texts, expected at least 3"):
        distilled_margins(EMBED)(PARAMS, {name: x[:, :2] for name, x in batch.items()}, None)
    with pytest.raises(ValueError, match=r"left_out \(2, 2\), expected \(2, 3\)"):
        info_nce(jnp.ones((2, 4)), jnp.ones((3, 4)), left_out=jnp.zeros((2, 2), bool))
    with pytest.raises(ValueError, match="value of the whole batch"):
        accumulate(jax.value_and_grad, 2)(contrastive(EMBED), has_aux=True)(
            PARAMS, batch, jax.random.key(0)
        )


@pytest.mark.parametrize("negatives", [0, 1])
def test_sentence_transformers_has_the_same_loss_and_gradients(negatives):
    torch = pytest.importorskip("torch", reason="the oracle needs torch: pip install 'jaxft[test]'")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    vectors = np.random.default_rng(1).normal(size=(SIZE, 2 + negatives, 5)).astype(np.float32)
    theirs = torch.tensor(vectors, requires_grad=True)
    loss = losses.MultipleNegativesRankingLoss(model=None, scale=20.0)
    columns = [theirs[:, i] for i in range(2 + negatives)]
    expected = loss.compute_loss_from_embeddings(columns, None)
    expected.backward()

    def ours(vectors):
        unit = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        candidates = jnp.concatenate([unit[:, i] for i in range(1, 2 + negatives)])
        return info_nce(unit[:, 0], candidates).mean()

    found, grads = jax.jit(jax.value_and_grad(ours))(vectors)
    assert float(found) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(grads, theirs.grad, rtol=0, atol=1e-5)
