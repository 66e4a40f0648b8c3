"""Distances and penalties on jaxft's models, against the same by hand."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.adapters import ALL_LINEAR, adapt, combine, lora, partition
from jaxft.losses import kl_divergence, symmetric_kl_divergence
from jaxft.metrics import Mean
from jaxft.models import Decoder, Encoder, EncoderConfig, stack_layers, tiny_config, with_noise
from jaxft.objectives import (
    classifier_logits,
    embedding_noise,
    function_distance,
    mean_of,
    noise_distance,
    on_rows,
    r3f,
    r4f,
    sample_distance,
    shift,
    spectrally_normalised,
    supervised,
    token_logits,
    trust_region,
)
from jaxft.optim import tram, tram_fisher, with_tram, with_tram_fisher
from jaxft.train import accumulate, fit
from tests.small_models import forward_of, start

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16
)
MODEL = Decoder(dataclasses.replace(tiny_config(vocab_size=17), **SMALL))
FORWARD = forward_of(MODEL)
RNG = np.random.default_rng(0)
BATCH = {
    "tokens": jnp.asarray(RNG.integers(0, 17, (4, 6))),
    "loss_mask": jnp.asarray((np.arange(6)[None] < np.array([[6], [3], [1], [0]])) * 1.0),
}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def params():
    return start(MODEL)


@pytest.fixture(scope="module")
def other(params):
    return jax.tree.map(lambda p: p * 1.3, params)


@functools.partial(jax.jit, static_argnames="noise")
def logits_of(params, noise=None):
    return MODEL.apply({"params": params}, BATCH["tokens"], noise=noise).logits


def test_function_distance_is_the_mean_over_counted_tokens(params, other):
    distance = jax.jit(function_distance(token_logits(FORWARD)))
    d = distance(other, params, BATCH, KEY)
    _, weights = shift(BATCH)
    p, q = jax.nn.softmax(logits_of(other)), jax.nn.softmax(logits_of(params))
    each = jnp.sum(p * jnp.log(p / q), -1)
    np.testing.assert_allclose(d.value, jnp.sum(each * weights) / weights.sum(), rtol=1e-3)
    assert d.weight == weights.sum() == 7
    assert distance(params, params, BATCH, KEY).value == 0
    none = distance(other, params, BATCH | {"loss_mask": jnp.zeros((4, 6))}, KEY)
    assert none.value == 0
    by_target = jax.jit(jax.grad(lambda t: distance(t, params, BATCH, KEY).value))(other)
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_target))


def test_a_distance_of_pairs_or_of_experience_is_that_of_their_counted_tokens(params, other):
    distance = jax.jit(function_distance(token_logits(FORWARD)))
    alone = distance(other, params, BATCH, KEY)
    # Pairs: the same rows two by two, with a column of their records.
    pairs = {name: x.reshape(2, 2, 6) for name, x in BATCH.items()} | {"label": jnp.ones(2)}
    chex.assert_trees_all_close(distance(other, params, pairs, KEY), alone, rtol=1e-6)
    # Experience: the last three columns are completions, whose masks are those of loss_mask there.
    rows = BATCH | {"loss_mask": BATCH["loss_mask"] * (jnp.arange(6) >= 3)[None]}
    learnt = {"tokens": BATCH["tokens"], "completion_mask": rows["loss_mask"][:, 3:] > 0}
    expected = distance(other, params, rows, KEY)
    assert 0 < expected.weight < alone.weight
    chex.assert_trees_all_close(distance(other, params, learnt, KEY), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "mask, message",
    [
        (jnp.ones((1, 3)), r"completion_mask has shape \(1, 3\), expected \(4, 3\)"),
        (jnp.ones(3), r"completion_mask has shape \(3,\), expected \(4, 3\)"),
        (jnp.ones((4, 6)), "6 response tokens leave none of 6"),
        (jnp.ones((4, 3), jnp.complex64), "must be bool or 0 and 1, got complex64"),
    ],
)
def test_masks_of_completions_that_do_not_fit_are_refused(params, mask, message):
    batch = {"tokens": BATCH["tokens"], "completion_mask": mask}
    with pytest.raises(ValueError, match=f"token_logits: .*{message}"):
        token_logits(MODEL.forward)(params, batch, KEY)


def test_a_distance_on_some_rows_is_that_of_their_batch(params, other):
    distance = jax.jit(function_distance(token_logits(FORWARD)))
    some = on_rows(distance, 3)(other, params, BATCH | {"scale": 2.0}, KEY)
    rows = {name: x[jnp.array([0, 3])] for name, x in BATCH.items()}
    chex.assert_trees_all_close(
        some, distance(other, params, rows | {"scale": 2.0}, KEY), rtol=1e-6
    )
    assert some.weight == 5
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        on_rows(distance, 0)


def test_what_does_not_count_may_be_nan():
    logits_fn = lambda params, batch, key, noise=None: (params * batch["x"], batch["weights"])
    batch = {"x": jnp.array([[1.0, 2.0], [jnp.nan, 1.0]]), "weights": jnp.array([1.0, 0.0])}
    d = function_distance(logits_fn)(2.0, 1.0, batch, KEY)
    expected = kl_divergence(jnp.array([2.0, 4.0]), jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(d.value, expected, rtol=1e-6)
    samples = sample_distance(logits_fn)(2.0, 1.0, {**batch, "x": jnp.ones((2, 2))}, KEY)
    assert samples.value > 0 and samples.weight == 1


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_has_its_scale_and_goes_on_the_embeddings(params, kind):
    seen = []

    def logits_fn(params, batch, key, noise=None):
        if noise is not None:
            seen.append(noise(jnp.zeros(100_000)))
        return token_logits(FORWARD)(params, batch, key, noise)

    d = noise_distance(logits_fn, 0.3, kind)(params, BATCH, KEY)
    z = np.asarray(seen[0])
    spread = 0.3 if kind == "normal" else 0.3 / np.sqrt(3)
    assert abs(z.std() / spread - 1) < 5 / np.sqrt(2 * len(z)) and abs(z.mean()) < 5e-3
    assert kind == "normal" or np.abs(z).max() <= 0.3
    assert d.value > 0
    assert noise_distance(logits_fn, 0.0, kind)(params, BATCH, KEY).value == 0
    again, new = (
        noise_distance(logits_fn, 0.3, kind)(params, BATCH, k) for k in (KEY, jax.random.key(6))
    )
    assert again.value == d.value != new.value


@pytest.mark.parametrize("stacked", [False, True])
def test_moved_embeddings_are_those_of_a_moved_table(params, stacked):
    # The same offset on all tokens is the offset of all rows of the (untied) table.
    model = Decoder(dataclasses.replace(MODEL.config, tie_embeddings=False))
    params = params | {"head": {"kernel": params["embed"]["embedding"].T}}
    offset = jnp.linspace(-1, 1, MODEL.config.hidden_size)
    table = params["embed"]["embedding"] + offset[None]
    tree = stack_layers(params) if stacked else params
    moved = tree | {"embed": {"embedding": table}}
    expected = model.apply({"params": moved}, BATCH["tokens"]).logits
    got = model.apply({"params": tree}, BATCH["tokens"], noise=lambda x: x + offset[None, None])
    chex.assert_trees_all_close(got.logits, expected, rtol=1e-5, atol=1e-5)


def image_model():
    config = EncoderConfig(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_positions=5,
        pre_norm=True, image_size=8, patch_size=4, channels=1, pooler=False,
    )  # fmt: skip
    model = Encoder(config)
    params = start(model)
    kernel = jax.random.normal(jax.random.key(1), (16, 3))
    head = lambda params, output: output.hidden[:, 0] @ params["head"]["kernel"]
    return model, params | {"head": {"kernel": kernel}}, head


def test_a_classifier_of_images_has_its_noise_on_the_pixels():
    model, params, head = image_model()
    logits_fn = classifier_logits(model, head, "images")
    logits_fn = jax.jit(logits_fn, static_argnames="noise")
    batch = {"images": jnp.asarray(RNG.normal(size=(4, 8, 8, 1)), jnp.float32)}
    got, weights = logits_fn(params, batch, KEY, noise=lambda x: x + 1)
    expected, _ = logits_fn(params, {"images": batch["images"] + 1}, KEY)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    assert got.shape == (4, 3) and weights.tolist() == [1] * 4
    masked = batch | {"weights": jnp.array([1, 1, 0, 0])}
    logits_fn = classifier_logits(model, head, "images")
    assert jax.jit(noise_distance(logits_fn))(params, masked, KEY).weight == 2


def test_a_classifier_of_tokens_has_its_noise_on_their_embeddings():
    config = EncoderConfig(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_positions=8,
        vocab_size=11, pooler=False,
    )  # fmt: skip
    model = Encoder(config)
    tokens = jnp.asarray(RNG.integers(0, 11, (2, 5)))
    params = start(model)
    table = params["embed"]["embedding"]
    logits_fn = classifier_logits(model, lambda params, output: output.hidden[:, 0])
    offset = jnp.linspace(-1, 1, 16)
    got, _ = logits_fn(params, {"tokens": tokens}, KEY, lambda x: x + offset[None, None])
    moved = params | {"embed": {"embedding": table + offset[None]}}
    expected, _ = logits_fn(moved, {"tokens": tokens}, KEY)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_r3f_is_the_loss_and_both_directions_of_kl(params):
    logits_fn, task = token_logits(FORWARD), supervised(FORWARD)
    objective = r3f(task, logits_fn, weight=0.7, sigma=0.3)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        params, BATCH, KEY
    )
    draw = []

    def catching(params, batch, key, noise=None):
        draw.append(noise)
        return logits_fn(params, batch, key, noise)

    noise_distance(catching, 0.3)(params, BATCH, KEY)
    _, weights = shift(BATCH)

    def by_hand(p):
        noised, clean = logits_of(p, noise=draw[0]), logits_of(p)
        each = symmetric_kl_divergence(noised, clean)
        return task(p, BATCH, KEY)[0] + 0.7 * jnp.sum(each * weights) / weights.sum()

    expected, wanted = jax.jit(jax.value_and_grad(by_hand))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, wanted, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"].value, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["task_loss"].value, task(params, BATCH, KEY)[0], rtol=1e-5)
    assert metrics["loss"].weight == 7


def test_a_penalty_of_weight_zero_is_the_objective_and_microbatches_add_up(params, other):
    task, logits_fn = supervised(FORWARD), token_logits(FORWARD)
    d = function_distance(logits_fn)
    to_other = lambda p, batch, key: d(other, p, batch, key)
    run = lambda objective, m: jax.jit(accumulate(jax.value_and_grad, m)(objective, has_aux=True))(
        params, BATCH, KEY
    )
    penalised = trust_region(task, to_other, 0.5)
    whole, halves = run(penalised, 1), run(penalised, 2)
    chex.assert_trees_all_close(whole, halves, rtol=1e-4, atol=1e-6)
    plain = run(task, 1)
    none = run(trust_region(task, to_other, 0.0), 1)
    # The zero term may be fused in: sums then round otherwise, by the size of the largest entries (0.4).
    chex.assert_trees_all_close(
        (none[0][0], none[1]), (plain[0][0], plain[1]), rtol=1e-6, atol=5e-8
    )
    bare = trust_region(lambda p, b, k: (p**2, {}), lambda p, b, k: p, 0.5)
    loss, metrics = bare(jnp.float32(3.0), None, KEY)
    assert loss == metrics["loss"] == 10.5 and metrics["task_loss"] == 9


def test_r4f_divides_the_head_by_its_largest_singular_value():
    model, params, head = image_model()
    logits_fn = classifier_logits(model, head, "images")
    labels = jnp.arange(4) % 3
    batch = {"images": jnp.asarray(RNG.normal(size=(4, 8, 8, 1)), jnp.float32)}

    def task(params, batch, key):
        logits, weights = logits_fn(params, batch, key)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        loss = Mean.of(each, weights)
        return loss.value, {"loss": loss}

    kernel = np.asarray(params["head"]["kernel"])
    u, s, vt = np.linalg.svd(kernel)
    normal = spectrally_normalised(params)
    np.testing.assert_allclose(normal["head"]["kernel"], kernel / s[0], rtol=1e-5, atol=1e-6)
    assert normal["layers"] is params["layers"]
    grad = lambda objective: jax.jit(jax.grad(lambda p: objective(p, batch, KEY)[0]))
    got = grad(r4f(task, logits_fn))(params)
    inner = grad(r3f(task, logits_fn))(normal)
    chex.assert_trees_all_close(got["layers"], inner["layers"], rtol=1e-4, atol=1e-6)
    # By the kernel: G / σ - <G, W> u vᵀ / σ², u and v its first singular vectors.
    g = np.asarray(inner["head"]["kernel"])
    expected = g / s[0] - (g * kernel).sum() * np.outer(u[:, 0], vt[0]) / s[0] ** 2
    np.testing.assert_allclose(got["head"]["kernel"], expected, rtol=1e-3, atol=1e-5)


def test_tram_runs_on_a_decoder_with_lora_and_microbatches(params):
    adapted = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(2)})
    task, logits_fn = supervised(FORWARD), token_logits(FORWARD)
    adam, run = optax.adam(1e-2), dict(steps=3, microbatches=2)
    distance = {"distance_fn": function_distance(logits_fn)}
    _, rows = fit(adapted, task, with_tram(adam), [BATCH] * 3, extra_args=distance, **run)
    assert rows[0]["trust_distance"] == 0 < rows[2]["trust_distance"]
    # TRAM-x, its noise new in each step. η > 0: LoRA's B begins at 0, where T = |θ| would leave it.
    noise = {"distance_fn": noise_distance(logits_fn, 0.3)}
    state, rows = fit(
        adapted, task, with_tram(adam, None, eta=0.01), [BATCH] * 3, extra_args=noise, **run
    )
    assert state.opt_state.target is None
    assert min(row["trust_distance"] for row in rows) > 0


def test_tram_fisher_on_lora_is_its_estimator_on_what_trains(params):
    adapted = adapt(jax.random.key(1), params, {ALL_LINEAR: lora(2)})
    noise = embedding_noise(0.3)
    clean, noised = (
        supervised(FORWARD),
        supervised(with_noise(FORWARD, lambda _, x: noise(KEY, x))),
    )
    whole = {"noised_fn": mean_of(noised)}
    sgd, run = optax.sgd(1.0), dict(steps=1)
    state, _ = fit(
        adapted, clean, with_tram_fisher(sgd, 0.2, 1e4), [BATCH], extra_args=whole, **run
    )
    trainable, frozen = partition(adapted)
    of = lambda objective: lambda t: objective(combine(t, frozen), BATCH, KEY)[0]
    value, grads = jax.jit(tram_fisher(of(noised), 0.2, 1e4)(of(clean)))(trainable)
    moved = jax.tree.map(
        lambda after, before: before - after, partition(state.params)[0], trainable
    )
    chex.assert_trees_all_close(moved, grads, rtol=1e-3, atol=1e-5)
    # The noise is there, and so are two slices of the batch, which add up to it.
    assert abs(jax.jit(of(noised))(trainable) - value) > 1e-3
    sliced, _ = fit(
        adapted,
        clean,
        with_tram_fisher(sgd, 0.2, 1e4),
        [BATCH],
        extra_args=whole,
        microbatches=2,
        **run,
    )
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), partition(sliced.params)[0]))


def test_tram_x_as_an_estimator_and_as_a_transform_is_one_method(key):
    def logits_fn(params, batch, key, noise=None):
        x = batch if noise is None else noise(batch)
        return x @ params, jnp.ones(len(batch))

    def task(params, batch, key):
        loss = Mean.of(jnp.sum((batch @ params) ** 2, -1), jnp.ones(len(batch)))
        return loss.value, {"loss": loss}

    # A separate key for the distance in the step: one fixed here, to compare.
    distance = lambda p, batch, key: noise_distance(logits_fn, 0.3)(p, batch, KEY)
    sgd, start = optax.sgd(0.1), jax.random.normal(key, (4, 3))
    run = dict(batches=[jnp.eye(4)], steps=1)
    one, _ = fit(start, task, sgd, gradient=tram(distance), **run)
    extra = {"distance_fn": distance}
    other, _ = fit(start, task, with_tram(sgd, None), extra_args=extra, **run)
    plain, _ = fit(start, task, sgd, **run)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-5, atol=1e-6)
    assert abs(one.params - plain.params).max() > 1e-3


def test_bad_input(params):
    with pytest.raises(ValueError, match="sigma must be at least 0"):
        noise_distance(token_logits(FORWARD), -0.1)
    with pytest.raises(ValueError, match="kind must be one of"):
        noise_distance(token_logits(FORWARD), kind="cauchy")
    with pytest.raises(ValueError, match="weight must be at least 0"):
        trust_region(supervised(FORWARD), None, -1.0)
    with pytest.raises(ValueError, match="no 'head' among"):
        spectrally_normalised({"layers": 1.0})
