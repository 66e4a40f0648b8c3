import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.generation import SamplingConfig, generate, sampler, transform_logits
from jaxft.models import Cache, Decoder, DecoderConfig, Prediction, stack_layers, tiny_config
from jaxft.rl import on_device
from tests.small_models import start

GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    return Decoder(
        dataclasses.replace(tiny_config(vocab_size=31, max_length=256), windows=(9, None))
    )


@pytest.fixture(scope="module")
def params(model):
    params = start(model)
    return jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 31, n).tolist() for n in (1, 5, 14)]


def scorer(model, params):
    """ids -> logits of each token after the first [N - 1, V]: one program for all lengths."""
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)

    def score(ids):
        row = np.zeros((1, 128), np.int32)
        row[0, : len(ids)] = ids
        return apply(row)[0, : len(ids) - 1]

    return score


def slow_greedy(model, params, prompt, steps):
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)
    tokens = np.zeros((1, 40), np.int32)
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + steps):
        tokens[0, i] = np.argmax(apply(tokens)[0, i - 1])
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


def test_greedy_equals_repeated_full_forwards(model, params, prompts):
    expected = [slow_greedy(model, params, prompt, 12) for prompt in prompts]
    key = jax.random.key(0)
    assert generate(model, params, prompts, key, GREEDY).completions == expected
    # Another bucket of prompts, another batch, the other layout.
    long = prompts + [list(range(30)) * 2]
    assert generate(model, params, long, key, GREEDY).completions[:3] == expected
    assert generate(model, params, prompts[1:2], key, GREEDY).completions == expected[1:2]
    stacked = stack_layers(params)
    assert generate(model, stacked, prompts, key, GREEDY).completions == expected


@dataclasses.dataclass(frozen=True)
class Mine:
    """A model from outside: what lies at "layers" is its own affair; token t is followed by 2t mod 7."""

    config = types.SimpleNamespace(max_length=64)

    def init_cache(self, rows, length, dtype=None):
        return Cache((), (), jnp.zeros((), jnp.int32), None, None)

    def forward(self, params, batch, key=None, *, cache=None):
        return Prediction(params["layers"]["next"][batch["tokens"]], jnp.eye(7), None, cache)


def test_another_model_gets_its_params_as_they_are():
    table = {"layers": {"next": jnp.eye(7)[2 * jnp.arange(7) % 7]}}
    rules = SamplingConfig(max_new_tokens=3, temperature=0.0)
    assert generate(Mine(), table, [[1]], jax.random.key(0), rules).completions == [[2, 4, 1]]


def test_log_probs_are_those_of_a_full_forward(model, params, prompts):
    config = SamplingConfig(max_new_tokens=100, temperature=0.7)
    out = generate(model, params, prompts, jax.random.key(1), config)
    np.testing.assert_array_equal(out.log_probs, out.sampler_log_probs)
    score = scorer(model, params)
    for prompt, ids, got in zip(prompts, out.completions, out.log_probs, strict=True):
        logits = np.asarray(score(prompt + ids), np.float64)[len(prompt) - 1 :] / 0.7
        scored = logits[np.arange(len(ids)), ids] - np.log(np.sum(np.exp(logits), axis=1))
        np.testing.assert_allclose(scored, got, atol=1e-4)


def test_sampler_log_probs_are_those_of_the_cut_distribution(model, params, prompts):
    config = SamplingConfig(max_new_tokens=8, temperature=0.7, top_k=3)
    out = generate(model, params, prompts, jax.random.key(1), config)
    score = scorer(model, params)
    for prompt, ids, got in zip(prompts, out.completions, out.sampler_log_probs, strict=True):
        logits = score(prompt + ids)[len(prompt) - 1 :]
        kept = jax.nn.log_softmax(transform_logits(logits, config))
        wanted = np.asarray(kept)[np.arange(8), ids]
        chex.assert_trees_all_close(got, wanted, atol=1e-4)
    greedy = generate(model, params, prompts, jax.random.key(1), GREEDY)
    assert not greedy.sampler_log_probs.any() and (greedy.log_probs < 0).all()


def test_draws_depend_on_the_key_and_the_row_alone(model, params, prompts):
    config = SamplingConfig(max_new_tokens=10)
    draw = lambda prompts, seed, ids: (
        generate(model, params, prompts, jax.random.key(seed), config, row_ids=ids).completions
    )
    first = draw(prompts, 0, [3, 4, 5])
    assert draw(prompts, 0, [3, 4, 5]) == first
    assert draw(prompts[::-1], 0, [5, 4, 3]) == first[::-1]
    assert draw(prompts[1:2], 0, [4]) == first[1:2]
    assert draw(prompts, 1, [3, 4, 5]) != first
    same = draw([prompts[0]] * 4, 0, range(4))
    assert len(set(map(tuple, same))) == 4


def test_stop_tokens_and_strings(model, params, prompts):
    free = generate(model, params, prompts, jax.random.key(0), GREEDY).completions
    stop = free[1][4]
    config = dataclasses.replace(GREEDY, stop_ids=(stop,))
    out = generate(model, params, prompts, jax.random.key(0), config)
    for ids, whole, finish in zip(out.completions, free, out.finish, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert ids == whole[:end]
        assert finish == ("stop" if stop in whole else "length")

    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("A") + i) for i in ids)

    text = Letters().decode(free[1])
    config = dataclasses.replace(GREEDY, stop_strings=(text[2:5],))
    out = generate(model, params, prompts[1:2], jax.random.key(0), config, tokenizer=Letters())
    assert out.completions[0] == free[1][: text.index(text[2:5]) + 3]
    assert out.finish == ["stop"]
    # However often the host looks: a string may lie across two looks, and one row end before the others.
    strings = text[4:7], Letters().decode(free[2])[1:3]
    config = dataclasses.replace(config, stop_strings=strings, max_new_tokens=9)
    run = functools.partial(generate, model, params, prompts, jax.random.key(0), config)
    one, often = run(tokenizer=Letters()), run(tokenizer=Letters(), samples=2, chunk=2)
    assert min(map(len, one.completions)) < max(map(len, one.completions))
    for i, ids in enumerate(one.completions):
        assert often.completions[2 * i : 2 * i + 2] == [ids] * 2
        assert often.finish[2 * i] == one.finish[i]
        np.testing.assert_allclose(
            often.log_probs[2 * i, : len(ids)], one.log_probs[i, : len(ids)], atol=1e-5
        )
        assert not often.log_probs[2 * i, len(ids) :].any()


@pytest.mark.parametrize("new", [1, 64, 65])
def test_length_limits(model, params, prompts, new):
    config = SamplingConfig(max_new_tokens=new)
    out = generate(model, params, prompts, jax.random.key(0), config)
    assert [len(ids) for ids in out.completions] == [new] * 3
    assert out.finish == ["length"] * 3
    assert out.tokens.shape == (3, new)


def test_bad_arguments_are_explained(model, params):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, params, [[]], key)
    with pytest.raises(ValueError, match="exceed the model's 256"):
        generate(model, params, [[1] * 200], key)
    with pytest.raises(ValueError, match="temperature=0 is greedy"):
        SamplingConfig(temperature=0.0, top_k=3)
    with pytest.raises(ValueError, match="top_p must lie in 0..1, got 2"):
        SamplingConfig(top_p=2)


LOGITS = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))


@pytest.mark.parametrize(
    "config, kept",
    [
        (SamplingConfig(), [0, 1, 2, 3]),
        (SamplingConfig(top_k=1), [0]),
        (SamplingConfig(top_k=3), [0, 1, 2]),
        (SamplingConfig(top_p=1.0), [0, 1, 2, 3]),
        (SamplingConfig(top_p=0.7), [0, 1]),
        (SamplingConfig(top_p=0.0), [0]),
        (SamplingConfig(min_p=0.0), [0, 1, 2, 3]),
        (SamplingConfig(min_p=0.29), [0, 1, 2]),
        (SamplingConfig(min_p=1.0), [0]),
        (SamplingConfig(temperature=0.0), [0]),
        (SamplingConfig(top_k=2, top_p=0.6), [0]),
    ],
)
def test_rules_keep_what_they_say(config, kept):
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        cut = transform_logits(LOGITS[jnp.array(order)], config)
        assert sorted(order[i] for i in np.flatnonzero(np.isfinite(cut))) == kept


def test_sampled_frequencies_follow_the_cut_distribution(model):
    """Chi-square at 20,000 draws: 3 degrees of freedom, 16.3 is the 0.1 % point."""
    config = SamplingConfig(temperature=0.8, top_k=4, min_p=0.05)
    logits = jnp.tile(jnp.array([[2.0, 1.0, 0.5, 0.0, -0.5, -4.0]]), (20_000, 1))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(20_000))
    state = sampler.State(None, logits, None, None, keys, jnp.zeros(20_000, jnp.int32))
    counts = np.bincount(np.asarray(sampler._draw(state, config)[0]), minlength=6)
    probs = np.exp(np.array([2.0, 1.0, 0.5, 0.0]) / 0.8)
    probs = probs / probs.sum()
    assert counts[4:].sum() == 0
    assert np.sum((counts[:4] - 20_000 * probs) ** 2 / (20_000 * probs)) < 16.3


def test_samples_of_a_prompt_share_its_prefill(model, params, prompts, monkeypatch):
    config = SamplingConfig(max_new_tokens=6)
    rows = []
    whole = sampler.prefill
    spy = lambda model, params, tokens, *rest: (
        rows.append(len(tokens)) or whole(model, params, tokens, *rest)
    )
    monkeypatch.setattr(sampler, "prefill", spy)
    key = jax.random.key(3)
    out = generate(model, params, prompts, key, config, samples=4)
    assert rows == [3]  # a bucket of three prompts, not twelve
    assert out.tokens.shape == (12, 6) and len(out.finish) == 12
    # A sample is what a single row with its key gets; the four of a prompt differ.
    for i, j in ((0, 0), (1, 2), (2, 3)):
        tokens, valid = sampler.left_pad([prompts[i]], model.config)
        own = jax.random.fold_in(jax.random.fold_in(key, i), j)[None]
        state = whole(model, params, jnp.asarray(tokens), jnp.asarray(valid), own, 80)
        _, part = sampler.decode(model, params, state, config)
        assert part.tokens[0, :6].tolist() == out.completions[4 * i + j]
    assert len({tuple(row) for row in out.completions[:4]}) > 1
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        generate(model, params, prompts, key, config, samples=0)


def test_a_group_costs_one_prefill(model, params):
    """Compares FLOPs of the compiled programs, where one answer is sampled and where eight share a prompt."""
    flops = lambda program: program.compile().cost_analysis().get("flops", 0.0)

    def prefill(rows):
        given = jnp.ones((rows, 64), jnp.int32), jnp.ones((rows, 64), bool)
        keys = jax.random.split(jax.random.key(0), rows)
        lowered = sampler.prefill.lower(model, params, *given, keys, 128)
        return flops(lowered), jax.eval_shape(sampler.prefill, model, params, *given, keys, 128)

    (one, state), (eight, _) = prefill(1), prefill(8)
    forked = flops(sampler.fork.lower(state, 8))
    assert one > 2e6 and eight > 7 * one
    assert forked < 1e-3 * one
    # And in the one program that samples on the device: the rest of it does not know of the prompts.
    config = SamplingConfig(max_new_tokens=64)

    def whole(prompts, samples, width):
        given = jnp.ones((prompts, width), jnp.int32), jnp.ones((prompts, width), bool)
        chosen, key = jnp.arange(prompts), jax.random.key(0)
        run = on_device._sample_jit
        return flops(run.lower(model, params, *given, key, chosen, config, samples))

    # Eight rows are decoded in each; what differs is the prompts' share.
    shared, apart = whole(1, 8, 64), whole(8, 1, 64)
    assert abs((apart - shared) / (eight - one) - 1) < 0.02


@pytest.mark.parametrize("appended", [False, True])
def test_a_prefill_holds_little_beside_its_cache(appended):
    """Few layers with few heads of keys: activations count for much beside the cache."""
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=352,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        max_length=8192,
    )
    model, shape = Decoder(config), jax.ShapeDtypeStruct
    params = jax.eval_shape(model.init, jax.random.key(0), model.example_input())["params"]
    given = shape((1, 4096), jnp.int32), shape((1, 4096), bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    slots = 4096 + 64
    lowered = sampler.prefill.lower(model, params, *given, keys, slots)
    state = jax.eval_shape(sampler.prefill, model, params, *given, keys, slots)
    if appended:
        lowered = sampler.append.lower(model, params, state, *given)
    cache = sum(x.size * 4 for x in (*state.cache.keys, *state.cache.values))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 1.2 * cache


def test_prefill_and_append_equal_one_prefill(model, params, prompts):
    keys = jax.random.split(jax.random.key(0), 3)
    more = [[4, 5, 6], [], [7]]
    pad = lambda rows: map(jnp.asarray, sampler.left_pad(rows, model.config))
    forced = np.zeros((3, 3), np.int32)
    valid = np.zeros((3, 3), bool)
    for i, ids in enumerate(more):
        forced[i, 3 - len(ids) :], valid[i, 3 - len(ids) :] = ids, True
    state = sampler.prefill(model, params, *pad(prompts), keys, 90)
    state = sampler.append(model, params, state, jnp.asarray(forced), jnp.asarray(valid))
    joined = [p + m for p, m in zip(prompts, more, strict=True)]
    whole = sampler.prefill(model, params, *pad(joined), keys, 90)
    chex.assert_trees_all_close(state.logits, whole.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(state.position, whole.position)
    # Branches go on from there, each its own way.
    config = SamplingConfig(max_new_tokens=8)
    run = lambda state: sampler.decode(model, params, sampler.fork(state, 2), config)[1].tokens
    forked = run(state)
    np.testing.assert_array_equal(forked, run(whole))
    assert (forked[0] != forked[1]).any()
