"""Decoding rules: the distribution to sample from, given logits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.kernels.largest import largest


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling.

    Rules apply in the order of transformers: repetition_penalty, no_repeat_ngram_size, bad_words,
    min_new_tokens and bad_first, which also apply to greedy decoding (`process_logits`); then temperature,
    top_k, top_p, min_p and typical_p (`transform_logits`).
    """

    max_new_tokens: int = 128
    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # keep the k likeliest tokens (and ties with the k-th)
    top_p: float | None = None  # keep the likeliest tokens until their mass reaches this
    min_p: float | None = None  # keep tokens at least this fraction as likely as the likeliest
    typical_p: float | None = (
        None  # keep the tokens nearest to the entropy until their mass reaches this
    )
    repetition_penalty: float = (
        1.0  # divides positive logits of tokens in the row, multiplies negative ones
    )
    no_repeat_ngram_size: int = 0  # no n-gram of this size occurs twice, prompt included; 0: off
    min_new_tokens: int = 0  # no stop_ids before this many tokens
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of ids never sampled: `bad_word_ids`
    bad_first: tuple[int, ...] = ()  # ids never sampled as the first token
    stop_ids: tuple[int, ...] = ()  # tokens that end a completion and are part of it
    stop_strings: tuple[str, ...] = ()  # text that ends it; searched for between chunks
    forced_end: int | None = None  # the token at place max_new_tokens; None: not forced

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        # Below, logits divided by the temperature overflow float32.
        if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise ValueError(
                f"temperature must be 0 (greedy) or finite and at least 1e-6, got {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; None turns it off.")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {value}; None turns it off.")
        if self.typical_p == 0:
            raise ValueError("typical_p must be positive, got 0; None turns it off.")
        if self.temperature == 0 and self.cuts:
            raise ValueError(
                "temperature=0 is greedy and takes the likeliest token; drop top_k, top_p, min_p and "
                "typical_p or set a temperature."
            )
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be positive and finite, got {self.repetition_penalty}; 1 turns "
                "it off."
            )
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(
                f"stop_strings must be texts with at least one character, got {self.stop_strings!r}; every "
                "completion contains an empty one."
            )
        if self.no_repeat_ngram_size < 0:
            raise ValueError(
                f"no_repeat_ngram_size must be at least 0, got {self.no_repeat_ngram_size}; 0 turns it off."
            )
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must lie in 0..max_new_tokens, got min_new_tokens={self.min_new_tokens} and "
                f"max_new_tokens={self.max_new_tokens}; lower the first or raise the second."
            )
        for word in self.bad_words:
            if isinstance(word, str) or not len(word) or any(i != int(i) or i < 0 for i in word):
                raise ValueError(
                    f"bad_words must be sequences of token ids, got {word!r}; bad_word_ids makes them."
                )
        # Hashable, as a static argument of compiled functions must be.
        words = tuple(tuple(int(i) for i in word) for word in self.bad_words)
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "bad_first", tuple(int(i) for i in self.bad_first))

    @property
    def cuts(self) -> bool:
        """Returns whether a rule truncates the distribution by probability."""
        shares = (
            (self.top_p, 1),
            (self.typical_p, 1),
            (self.min_p, 0),
        )  # each with its neutral value
        return self.top_k is not None or any(x not in (None, off) for x, off in shares)

    @property
    def looks_back(self) -> bool:
        """Returns whether a rule needs the tokens so far."""
        several = any(len(word) > 1 for word in self.bad_words)
        return several or self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


def bad_word_ids(tokenizer: Any, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Encodes texts for `bad_words`: the ids of each at the beginning of a text and after a space.

    Raises:
        ValueError: if a word has no tokens.
    """
    encode = lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
    found = [encode(text) for word in words for text in (word, f" {word.lstrip()}")]
    if not all(found):
        raise ValueError(f"bad_words: each needs at least one token, got {list(words)}.")
    return tuple(dict.fromkeys(found))


def process_logits(
    logits: jax.Array,
    config: SamplingConfig,
    history: jax.Array | None,
    position: jax.Array,
    short: jax.Array | None = None,
    last: jax.Array | None = None,
    first: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, V] after the rules that depend on tokens, not probabilities: float32, -inf if banned.

    The rules are transformers' processors of the same names, in their order, except that padding does not
    count as a token. If every token is banned, nothing is left to sample, as in transformers.

    Args:
        history: [B, W] int32, the token at each position of a row, prompt included; required if
            `config.looks_back`.
        position: [B], the number of tokens of a row.
        short: [] or [B], whether there are fewer than `min_new_tokens` so far; None: False.
        last: [] or [B], whether this is the token at place `max_new_tokens`; None: False.
        first: [] or [B], whether this is the first token, which is none of `bad_first`; None: False.
    """
    logits = logits.astype(jnp.float32)
    size = logits.shape[-1]
    # In a row of `history`, entries from `position` on are uninitialised.
    before = None if history is None else jnp.arange(history.shape[1])[None] < position[:, None]
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        seen = _marked(history, before, size)
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if config.no_repeat_ngram_size:
        logits = jnp.where(_repeats(history, position, config, size), -jnp.inf, logits)
    words = [word for word in config.bad_words if word not in {(i,) for i in config.stop_ids}]
    if words:
        logits = jnp.where(_bad(history, position, words, size), -jnp.inf, logits)
    if short is not None and config.stop_ids:
        stops = np.isin(np.arange(size), config.stop_ids)[None]
        logits = jnp.where(jnp.reshape(short, (-1, 1)) & stops, -jnp.inf, logits)
    if first is not None and config.bad_first:
        begins = np.isin(np.arange(size), config.bad_first)[None]
        logits = jnp.where(jnp.reshape(first, (-1, 1)) & begins, -jnp.inf, logits)
    if last is not None and config.forced_end is not None:
        forced = jnp.where(jnp.arange(size)[None] == config.forced_end, 0.0, -jnp.inf)
        logits = jnp.where(jnp.reshape(last, (-1, 1)), forced, logits)
    return logits


def _marked(ids, mask, size):
    """[B, V] bool: True at the ids [B, N] where the mask [B, N] is True; ids outside of V are dropped."""
    rows = jnp.arange(ids.shape[0])[:, None]
    blank = jnp.zeros((ids.shape[0], size), bool)
    return blank.at[rows, jnp.where(mask & (ids >= 0), ids, size)].set(True, mode="drop")


def _last(history, position, count):
    """[B, count]: the last tokens of each row; arbitrary for shorter rows."""
    places = position[:, None] + jnp.arange(-count, 0)[None]
    return jnp.take_along_axis(history, jnp.maximum(places, 0), axis=1)


def _repeats(history, position, config, size):
    """[B, V] bool: tokens that would complete an n-gram that the row already has."""
    n = config.no_repeat_ngram_size
    suffix = _last(history, position, n - 1)
    ends = jnp.arange(history.shape[1])[
        None
    ]  # ends of earlier n-grams whose beginning is the suffix
    match = (ends >= n - 1) & (ends < position[:, None])

    def equal(
        k, match
    ):  # a loop, as a program with n copies takes minutes to compile for a large n
        return match & (
            jnp.roll(history, n - 1 - k, axis=1) == jnp.take(suffix, k, axis=1)[:, None]
        )

    if n > 1:
        match = jax.lax.fori_loop(0, min(n - 1, history.shape[1]), equal, match)
    return _marked(history, match, size)


def _bad(history, position, words, size):
    """[B, V] bool: tokens that would complete a bad word."""
    if wrong := sorted({i for word in words for i in word if i >= size}):
        raise ValueError(f"bad_words: ids {wrong} lie outside of the vocabulary of {size}.")
    single = np.isin(np.arange(size), [word[0] for word in words if len(word) == 1])
    banned = jnp.broadcast_to(single[None], (position.shape[0], size))
    longer = sorted((word for word in words if len(word) > 1), key=len)
    for length, group in itertools.groupby(longer, key=len):
        table = np.array(list(group), np.int32)  # [words, length]
        begins = _last(history, position, length - 1)[:, None] == table[None, :, :-1]
        match = jnp.all(begins, axis=-1) & (position >= length - 1)[:, None]
        ends = jnp.broadcast_to(table[None, :, -1], match.shape)
        banned |= _marked(ends, match, size)
    return banned


def transform_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits [..., V] of the distribution to sample from: float32, -inf where truncated.

    At least one token remains: the likeliest, unless typical_p is set. Logits are sorted only if a rule
    needs it.
    """
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        chosen = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) == best
        return jnp.where(chosen, 0.0, -jnp.inf)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        lowest = largest(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if config.top_p is not None and config.top_p < 1:
        logits = _top_p(logits, config.top_p)
    if config.min_p is not None and config.min_p > 0:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(config.min_p), -jnp.inf, logits)
    if config.typical_p is not None and config.typical_p < 1:
        logits = _typical_p(logits, config.typical_p)
    return logits


def _top_p(logits, top_p):
    """Keeps the likeliest tokens until their mass is top_p; on ties the later token, as in transformers."""
    # Only the values are sorted: sorting their numbers too, to undo it, takes several times as long.
    ascending = jnp.sort(logits, axis=-1)
    mass = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    # The likeliest token always remains, also for top_p = 0.
    keep = (mass > 1 - top_p).at[..., -1].set(True)
    lowest = jnp.min(jnp.where(keep, ascending, jnp.inf), axis=-1, keepdims=True)
    equal = logits == lowest
    count = jnp.sum(keep & (ascending == lowest), axis=-1, keepdims=True)
    following = jnp.cumsum(equal[..., ::-1], axis=-1)[..., ::-1]  # equal ones from here on
    return jnp.where((logits > lowest) | (equal & (following <= count)), logits, -jnp.inf)


def _typical_p(logits, typical_p):
    """Keeps the tokens whose surprise is nearest to its mean, the entropy, until their mass is typical_p.

    Locally typical sampling: Meister et al., 2023, arxiv.org/abs/2202.00666. Tokens that tie with the
    last one are kept too, as in transformers.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, log_probs * probs, 0.0), axis=-1, keepdims=True)
    distance = jnp.abs(-log_probs - entropy)
    order = jnp.argsort(distance, axis=-1, stable=True)
    mass = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
    last = jnp.sum(mass < typical_p, axis=-1, keepdims=True)
    last = jnp.minimum(last, logits.shape[-1] - 1)
    farthest = jnp.take_along_axis(jnp.take_along_axis(distance, order, axis=-1), last, axis=-1)
    return jnp.where(distance > farthest, -jnp.inf, logits)
