"""Decoding rules against transformers' logits processors, as its `generate` would put them together."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxft.generation import (
    SamplingConfig,
    bad_word_ids,
    decode,
    fork,
    generate,
    left_pad,
    prefill,
    process_logits,
    remember,
    transform_logits,
)
from jaxft.models import Decoder, tiny_config
from tests.small_models import start

V, STOPS = 11, (2, 7)
LENGTHS = (1, 2, 3, 9, 24)
WORDS = ((3,), (5, 6), (6, 5), (1, 1, 4), (2,), (9, 7))
GENERATE = transformers.GenerationMixin._get_logits_processor


def theirs(config, prompt, new, logits):
    """Scores [V] that transformers samples from, after a prompt without padding and new tokens."""
    words = [list(word) for word in config.bad_words]
    settings = transformers.GenerationConfig(
        do_sample=config.temperature > 0,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        min_new_tokens=config.min_new_tokens or None,
        bad_words_ids=words or None,
        temperature=config.temperature or 1.0,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p,
        typical_p=1.0 if config.typical_p is None else config.typical_p,
    )
    settings._eos_token_tensor = torch.tensor(config.stop_ids) if config.stop_ids else None
    of = types.SimpleNamespace(
        config=types.SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda found, given: found,
    )
    chain = GENERATE(of, settings, len(prompt))
    ids, scores = torch.tensor([prompt + new]), torch.tensor(np.array(logits))[None]
    return chain(ids, scores)[0].numpy()


RULES = [
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.7),
    dict(no_repeat_ngram_size=1),
    dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=3),
    dict(bad_words=WORDS),
    dict(min_new_tokens=3),
    dict(min_new_tokens=3, stop_ids=()),
    dict(typical_p=0.6),
    dict(typical_p=0.999),
    dict(top_p=0.5),
    dict(top_p=0.0),
    dict(top_k=3, top_p=0.8, min_p=0.1, typical_p=0.5, temperature=0.7),
    dict(repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words=WORDS, min_new_tokens=9, top_p=0.7)
    | dict(temperature=1.7, typical_p=0.8),
]  # fmt: skip


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_rules_equal_transformers(rules):
    config = SamplingConfig(30, **{"stop_ids": STOPS} | rules)
    rng = np.random.default_rng(0)
    # Few values, so that logits tie; few tokens, so that n-grams come again.
    logits = rng.choice([-2.0, -0.5, 0.0, 1.0, 2.5], (len(LENGTHS), V)).astype(np.float32)
    logits[-2:] = rng.normal(size=(2, V)) * 2
    history = np.full((len(LENGTHS), 26), -1)
    rows = [rng.choice([1, 4, 5, 6, 9], n).tolist() for n in LENGTHS]
    rows[0] = [1]  # shorter than the beginning of the bad word 1, 1, 4
    for line, row in zip(history, rows, strict=True):
        line[: len(row)] = row
    position = np.array(LENGTHS)
    new = 0 if rules.get("min_new_tokens") != 9 else 8
    short = jnp.asarray(new < config.min_new_tokens) if config.min_new_tokens else None
    ours = process_logits(jnp.asarray(logits), config, jnp.asarray(history), position, short)
    ours = transform_logits(ours, config)
    for i, row in enumerate(rows):
        cut = len(row) - min(new, len(row) - 1)
        wanted = theirs(config, row[:cut], row[cut:], logits[i])
        np.testing.assert_array_equal(np.isfinite(ours[i]), np.isfinite(wanted), str(row))
        np.testing.assert_allclose(ours[i], wanted, rtol=1e-6)


@pytest.fixture(scope="module")
def model_and_params():
    model = Decoder(tiny_config(vocab_size=V, max_length=128))
    params = start(model)
    return model, jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim > 1 else leaf, params)


@pytest.fixture(scope="module")
def logits_of(model_and_params):
    """ids -> the logits [V] after them, by a full forward."""
    model, params = model_and_params
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits[0])

    def logits(ids):
        row = np.zeros((1, 20), np.int32)
        row[0, : len(ids)] = ids
        return np.asarray(apply(row), np.float32)[len(ids) - 1]

    return logits


PROMPTS = [[1], [5, 6, 5], [4, 4, 9, 1, 6, 5, 6]]
ALL = SamplingConfig(
    10, 0.0, repetition_penalty=1.2, no_repeat_ngram_size=3, bad_words=WORDS, min_new_tokens=4,
    stop_ids=STOPS,
)  # fmt: skip


def test_the_sampler_follows_the_rules(model_and_params, logits_of):
    """Greedy, against full forwards and transformers' processors; prompts of several lengths in a batch."""
    model, params = model_and_params
    out = generate(model, params, PROMPTS, jax.random.key(0), ALL, samples=2)
    free = generate(
        model, params, PROMPTS, jax.random.key(0), SamplingConfig(10, 0.0, stop_ids=STOPS)
    )
    for i, prompt in enumerate(PROMPTS):
        new = []
        while len(new) < 10 and not (new and new[-1] in STOPS):
            logits = logits_of(prompt + new)
            new.append(int(np.argmax(theirs(ALL, prompt, new, logits))))
        assert out.completions[2 * i] == out.completions[2 * i + 1] == new
    assert out.completions[::2] != free.completions


def test_log_probs_under_the_rules(model_and_params, logits_of):
    """`log_probs` are the model's own, `sampler_log_probs` those of what was sampled from."""
    model, params = model_and_params
    config = dataclasses.replace(ALL, temperature=0.8, top_p=0.9)
    out = generate(model, params, PROMPTS, jax.random.key(1), config)
    for prompt, ids, own, sampled in zip(
        PROMPTS, out.completions, out.log_probs, out.sampler_log_probs, strict=True
    ):
        for j, token in enumerate(ids):
            at = logits_of(prompt + ids[:j])
            cut = jax.nn.log_softmax(theirs(config, prompt, ids[:j], at))
            np.testing.assert_allclose(sampled[j], cut[token], atol=1e-4)
            np.testing.assert_allclose(own[j], jax.nn.log_softmax(at / 0.8)[token], atol=1e-4)


def test_rules_that_are_off_cost_nothing(model_and_params):
    model, params = model_and_params
    tokens, valid = map(jnp.asarray, left_pad(PROMPTS[:1], model.config))
    state = prefill(model, params, tokens, valid, jax.random.split(jax.random.key(0), 1), 80)
    assert state.history is None
    assert not SamplingConfig(min_new_tokens=3, bad_words=((3,),), typical_p=0.5).looks_back
    with pytest.raises(ValueError, match="decode: repetition_penalty.* call remember"):
        decode(model, params, state, ALL)
    history = fork(remember(state, tokens, valid, 80), 2).history
    assert history.shape == (2, 80) and history[:, :2].tolist() == [[1, -1]] * 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(repetition_penalty=0), "repetition_penalty must be positive, got 0"),
        (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size must be at least 0"),
        (dict(min_new_tokens=9), "got min_new_tokens=9 and max_new_tokens=8; lower"),
        (dict(typical_p=1.5), "typical_p must lie in 0..1, got 1.5"),
        (dict(typical_p=0), "typical_p must be positive"),
        (dict(typical_p=0.5, temperature=0), "temperature=0 is greedy"),
        (dict(bad_words=("word",)), "bad_words must be sequences of token ids, got 'word'"),
        (dict(bad_words=((),)), "bad_words must be sequences"),
        (dict(bad_words=((-1,),)), "bad_words must be sequences"),
    ],
)
def test_wrong_rules_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(8, **wrong)


def test_bad_words_from_text():
    encode = lambda text, add_special_tokens: [len(text)] if text.strip() else []
    tokenizer = types.SimpleNamespace(encode=encode)
    assert bad_word_ids(tokenizer, ["ab", "abc"]) == ((2,), (3,), (4,))
    with pytest.raises(ValueError, match="needs at least one token"):
        bad_word_ids(tokenizer, [""])
    config = SamplingConfig(8, bad_words=[[99]])
    with pytest.raises(ValueError, match=r"ids \[99\] lie outside of the vocabulary of 11"):
        process_logits(jnp.zeros((1, V)), config, None, jnp.ones(1, int))
