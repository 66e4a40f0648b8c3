"""Properties that both sides of a benchmark must share."""

import jax.numpy as jnp
import numpy as np

from benchmarks import dpo, grpo
from benchmarks.words import words, words_tokenizer


def test_rewards_on_host_and_device_are_the_same():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 12, (6, grpo.NEW))
    mask = np.arange(grpo.NEW) < rng.integers(0, grpo.NEW, (6, 1))
    texts = [grpo.Words().decode(row[m], True) for row, m in zip(tokens, mask, strict=True)]
    on_device = grpo.distinct_tokens(jnp.asarray(tokens), jnp.asarray(mask), None)
    np.testing.assert_allclose(on_device, grpo.distinct_words(texts, None))
    assert grpo.distinct_words(["w5 w5 w6", ""], None) == [2 / grpo.NEW, 0]


def test_ids_are_the_same_as_text():
    """For both trainers of TRL; and a pair ends as TRL ends it: it would put another end after any other."""
    pairs = dpo.pairs()
    assert pairs.shape == (dpo.RECORDS, 2, dpo.PROMPT + dpo.COMPLETION + 1)
    np.testing.assert_array_equal(pairs[:, 0, : dpo.PROMPT], pairs[:, 1, : dpo.PROMPT])
    for rows, size in (
        (pairs[0], dpo.MODEL["vocab_size"]),
        (grpo.questions(), grpo.MODEL["vocab_size"]),
    ):
        tokenizer = words_tokenizer(size)
        assert tokenizer([words(row) for row in rows])["input_ids"] == rows.tolist()
        assert tokenizer.eos_token_id == dpo.EOS == grpo.EOS
    assert words(pairs[0, 0]).endswith(tokenizer.eos_token)
