"""Beam search against transformers' `generate`, and against all sequences of a small vocabulary."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxft.checkpoints import load_model
from jaxft.generation import Beams, SamplingConfig, beam_search, generate
from jaxft.models import Prediction

V, PAD = 23, 0
PROMPTS = [[5, 9, 4], [11], [3, 8, 8, 14, 6, 3, 8]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(transformers' model, ours, its params), random and far from uniform."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=PAD,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(path)
    return theirs, *load_model(str(path))


def generated(theirs, beams, config):
    """[(completion, score)] of transformers' `generate`, prompts padded on the left."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    out = theirs.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=list(config.stop_ids) or None,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens or None,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        bad_words_ids=[list(word) for word in config.bad_words] or None,
        return_dict_in_generate=True,
        output_scores=True,
        **dataclasses.asdict(beams),
    )
    rows = out.sequences[:, width:].tolist()
    ends = [[i for i, token in enumerate(row) if token in config.stop_ids] for row in rows]
    rows = [row[: end[0] + 1] if end else row for row, end in zip(rows, ends, strict=True)]
    return list(zip(rows, out.sequences_scores.tolist(), strict=True))


ONE, TWO = SamplingConfig(9, 0.0, stop_ids=(2,)), SamplingConfig(12, 0.0, stop_ids=(7, 2))
RULED = SamplingConfig(
    14, 0.0, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3, stop_ids=(7, 2),
    bad_words=((PAD,), (4, 4), (12,)),
)  # fmt: skip
SETTINGS = [
    (Beams(3), ONE),
    (Beams(3, num_return_sequences=3), ONE),
    *[(Beams(3, p, e, 3), ONE) for p in (-1.0, 2.0) for e in (False, True, "never")],
    (Beams(3, 0.0, "never", 3), ONE),
    (Beams(4, num_return_sequences=4), TWO),
    *[(Beams(4, 5.0, e, 4), TWO) for e in (False, True, "never")],
    (Beams(4, 1.0, True, 2), dataclasses.replace(TWO, max_new_tokens=1)),
    (Beams(4, 1.0, False, 2), dataclasses.replace(TWO, min_new_tokens=5)),
    (Beams(4, 0.8, False, 4), RULED),
    (Beams(4, 2.0, "never", 4), RULED),
]


def test_beam_search_is_transformers(models):
    theirs, model, params = models
    endings, found = set(), set()
    for beams, config in SETTINGS:
        wanted = generated(theirs, beams, config)
        out = beam_search(model, params, PROMPTS, beams, config)
        what = f"{beams} {config}"
        assert out.completions == [row for row, _ in wanted], what
        np.testing.assert_allclose(out.scores, [s for _, s in wanted], rtol=2e-5, atol=2e-5)
        ends = ["stop" if row[-1] in config.stop_ids else "length" for row, _ in wanted]
        assert out.finish == ends, what
        assert out.tokens.shape == (3 * beams.num_return_sequences, config.max_new_tokens)
        endings |= {*ends, *{len(row) for row, _ in wanted}}
        found.add((config, out.scores.tobytes()))
    # The settings differ: beams end early and late, and penalties and kinds of ending show.
    assert {"stop", "length", 1} < endings and len(found) >= 12


def test_a_prompt_s_completions_depend_on_no_other_prompt(models):
    _, model, params = models
    beams = Beams(3, num_return_sequences=3)
    whole = beam_search(model, params, PROMPTS, beams, ONE)
    for i in (0, 2):
        alone = beam_search(model, params, [PROMPTS[i]] * 3, beams, ONE)
        assert alone.completions[:3] == whole.completions[3 * i : 3 * i + 3]
        np.testing.assert_allclose(alone.scores[:3], whole.scores[3 * i : 3 * i + 3], rtol=1e-5)


def test_one_beam_is_greedy_decoding(models):
    _, model, params = models
    greedy = generate(model, params, PROMPTS, jax.random.key(0), RULED)
    out = beam_search(model, params, PROMPTS, Beams(1), RULED)
    assert out.completions == greedy.completions and out.finish == greedy.finish
    assert (out.mask == greedy.mask).all()


@dataclasses.dataclass(frozen=True)
class SecondOrder:
    """A model from outside, of 4 words: the next depends on the last two, of which its cache keeps one."""

    config = types.SimpleNamespace(max_length=64, vocab_size=4)

    def init_cache(self, rows, length, dtype=None):
        return {"before": jnp.zeros((rows, 1), jnp.int32)}

    def forward(self, params, batch, key=None, *, cache=None):
        tokens = jnp.concatenate([cache["before"], batch["tokens"]], axis=1)[:, -2:]
        hidden = params["table"][tokens[:, 0], tokens[:, 1]]
        return Prediction(hidden[:, None], jnp.eye(4), cache={"before": tokens[:, 1:]})


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.5])
def test_wide_beams_find_the_best_of_all_sequences(penalty):
    rng = np.random.default_rng(0)
    table = rng.normal(0, 1.5, (4, 4, 4)).astype(np.float32)
    log_p = table - np.log(np.exp(table).sum(axis=-1, keepdims=True))
    prompts, config = [[1, 3], [2, 2, 0, 1]], SamplingConfig(4, 0.0, stop_ids=(0,))
    out = beam_search(
        SecondOrder(), {"table": table}, prompts, Beams(64, penalty, "never", 7), config
    )
    for i, prompt in enumerate(prompts):
        ranked = []
        for length in (1, 2, 3, 4):
            for new in itertools.product(range(4), repeat=length):
                if 0 in new[:-1] or (length < 4 and new[-1] != 0):
                    continue
                row = [*prompt, *new][-length - 2 :]
                total = sum(log_p[tuple(row[j : j + 3])] for j in range(length))
                ranked.append((total / length**penalty, [*new]))
        ranked = sorted(ranked, reverse=True)[:7]
        assert out.completions[7 * i : 7 * i + 7] == [new for _, new in ranked]
        np.testing.assert_allclose(out.scores[7 * i : 7 * i + 7], [s for s, _ in ranked], rtol=1e-5)
    # Of one token there are four completions, and no fifth.
    short = dataclasses.replace(config, max_new_tokens=1)
    out = beam_search(SecondOrder(), {"table": table}, prompts, Beams(64, penalty, False, 7), short)
    assert out.finish[4:7] == ["none"] * 3 and out.completions[4:7] == [[]] * 3
    assert np.isneginf(out.scores[4:7]).all() and np.isfinite(out.scores[:4]).all()
    assert sorted(out.completions[:4]) == [[0], [1], [2], [3]]


LONG = [2] * 12
ENDINGS = {
    # After two completions the beam of 2s scores worse at its length, and would score better in the end.
    "worse now": ((0.6, 0, 0.12, 0.28), {True: [0], False: [0], "never": LONG}),
    # It scores better already.
    "better now": ((0.4, 0, 0.35, 0.25), {True: [3, 0], False: LONG, "never": LONG}),
}


def likelihoods(first, after_2, after_3):
    """A table whose next word depends on the last: 1 is the prompt's."""
    table = np.full((4, 4, 4), 1e-9, np.float32)
    table[:, 1], table[:, 2], table[:, 3] = (np.maximum(p, 1e-9) for p in (first, after_2, after_3))
    return {"table": np.log(table)}


@pytest.mark.parametrize("case", ENDINGS)
def test_each_kind_of_early_stopping_ends_where_it_says(case):
    first, wanted = ENDINGS[case]
    params = likelihoods(first, (0.02, 0, 0.98, 0), (0.9, 0.1, 0, 0))
    scores = {1: np.log(first[0]), 2: np.log(first[3] * 0.9) / 2}
    scores[12] = np.log(first[2] * 0.98**11) / 12
    for early, best in wanted.items():
        config = SamplingConfig(12, 0.0, stop_ids=(0,))
        out = beam_search(SecondOrder(), params, [[1]], Beams(2, 1.0, early), config)
        assert out.completions == [best], early
        np.testing.assert_allclose(out.scores, scores[len(best)], rtol=1e-4)


def test_beams_go_on_when_several_ends_are_likelier():
    """With 2 beams of 2 ends each, the 4 likeliest continuations end."""
    params = likelihoods((0.05, 0.05, 0.46, 0.44), (0.45, 0.44, 0.1, 0.01), (0.45, 0.44, 0.01, 0.1))
    config = SamplingConfig(3, 0.0, stop_ids=(0, 1))
    out = beam_search(SecondOrder(), params, [[1]], Beams(2, 5.0, "never", 2), config)
    assert out.completions == [[2, 2, 0], [2, 2, 1]]
    np.testing.assert_allclose(out.scores[0], np.log(0.46 * 0.1 * 0.45) / 3**5, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(num_beams=0), "num_beams must be at least 1, got 0"),
        (dict(num_beams=2, length_penalty=float("nan")), "length_penalty must be finite, got nan"),
        (dict(num_beams=2, early_stopping="no"), "True, False or \"never\", got 'no'"),
        (dict(num_beams=2, early_stopping=1), 'True, False or "never", got 1'),
        (dict(num_beams=2, num_return_sequences=3), "1..num_beams, got 3 with num_beams=2"),
        (dict(num_beams=1, length_penalty=2.0), "no effect with num_beams=1"),
        (dict(num_beams=1, early_stopping="never"), "no effect with num_beams=1"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Beams(**wrong)


def test_rules_that_beam_search_has_not_are_refused():
    search = lambda **rules: beam_search(None, None, [[1]], Beams(2), SamplingConfig(4, **rules))
    with pytest.raises(ValueError, match="temperature=0.7 samples.*set temperature=0"):
        search(temperature=0.7)
    with pytest.raises(ValueError, match="stop_strings=.*use stop_ids"):
        search(temperature=0.0, stop_strings=("END",))
