"""Models of answers to questions: meta-trained language models, and exact Bayes of latent classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.analysis.elicitation import EMPTY, TINY, ProbsFn
from jaxft.data import Tokenised
from jaxft.generation.padding import bucket
from jaxft.generation.sampler import append, prefill, repeat_rows
from jaxft.keys import stream
from jaxft.models import Decoder

Item = tuple[Sequence[int], Sequence[int]]  # (tokens of a question, tokens of its answer)


class Questions(NamedTuple):
    """Questions and their possible answers as tokens."""

    asks: Sequence[Sequence[int]]  # of each question, up to the token before its answer
    # [question][answer]; the first token tells answers apart, the last ones end the item
    replies: Sequence[Sequence[Sequence[int]]]

    def items(self, answers: Sequence[int]) -> list[Item]:
        """The items of an entity with these answers [Q], without those that are EMPTY.

        Raises:
            ValueError: for another number of answers, or an answer that the question does not have.
        """
        if len(answers) != len(self.asks):
            raise ValueError(
                f"Questions: {len(answers)} answers to {len(self.asks)} questions; use {EMPTY} for an "
                "answer that is not known."
            )
        found = []
        for q, a in enumerate(answers):
            if not EMPTY <= a < len(self.replies[q]):
                raise ValueError(
                    f"Questions: answer {a} to question {q}; expected 0 to {len(self.replies[q]) - 1}, or "
                    f"{EMPTY} if it is not known."
                )
            if a != EMPTY:
                found.append((self.asks[q], self.replies[q][a]))
        return found

    def answer_ids(self) -> np.ndarray:
        """The first tokens [Q, A] of the answers.

        Raises:
            ValueError: if two answers to a question begin with the same token, or numbers of answers differ.
        """
        for q, replies in enumerate(self.replies):
            first = [reply[0] for reply in replies]
            twice = [a for a, token in enumerate(first) if first.index(token) != a]
            if twice:
                other = first.index(first[twice[0]])
                raise ValueError(
                    f"Questions: answers {other} and {twice[0]} to question {q} both begin with token "
                    f"{first[other]}; change their text so that the first tokens differ."
                )
        if len({len(replies) for replies in self.replies}) > 1:
            raise ValueError("Questions: questions have different numbers of answers.")
        return np.array([[reply[0] for reply in replies] for replies in self.replies])


def meta_dataset(
    entities: Mapping[Hashable, Sequence[Item]], key: jax.Array, max_length: int
) -> list[Tokenised]:
    """One record for each entity: its items in random order, as many as fit into `max_length` tokens.

    The loss counts the first token of each answer, so a model learns p(answer | earlier items, question);
    with other orders in every epoch (another key) it becomes nearly independent of the order. Wang et al.,
    2025, arxiv.org/abs/2504.04204, section 3; the authors' release cuts within an item and skips entities
    shorter than the row, where we keep whole items and pad.

    Returns:
        Records in random order.

    Raises:
        ValueError: for an entity without an item that fits.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(stream(key, "orders of items"))))
    names, records = list(entities), []
    for place in rng.permutation(len(names)):
        items, tokens, mask = entities[names[place]], [], []
        for i in rng.permutation(len(items)):
            question, answer = items[i]
            if len(tokens) + len(question) + len(answer) > max_length:
                break
            tokens += [*question, *answer]
            mask += [0.0] * len(question) + [1.0] + [0.0] * (len(answer) - 1)
        if not tokens:
            raise ValueError(
                f"meta_dataset: no item of entity {names[place]!r} fits into {max_length} tokens; leave the "
                "entity out, or raise max_length."
            )
        row = np.array(tokens, np.int32), np.array(mask, np.float32)
        records.append(Tokenised(*row, id=str(names[place])))
    return records


def answer_probs(
    model: Decoder,
    params: Any,
    history: jax.Array,
    history_valid: jax.Array,
    questions: jax.Array,
    questions_valid: jax.Array,
    answer_ids: jax.Array,
) -> jax.Array:
    """The softmax over the answers' first tokens [N, Q, A] after history and question, in float32.

    Keys and values of a history are computed once, for all of its questions.

    Args:
        model: a Decoder, or another model that `jaxft.generation.generate` takes.
        history: [N, L] tokens, left-padded where `history_valid` [N, L] is False; at least 1 in each row.
        questions: [N, Q, S] tokens, left-padded where `questions_valid` is False.
        answer_ids: [N, Q, A].
    """
    rows, number, length = questions.shape
    slots = history.shape[1] + length
    state = repeat_rows(prefill(model, params, history, history_valid, None, slots), number)
    flat = lambda x: x.reshape(rows * number, length)
    state = append(model, params, state, flat(questions), flat(questions_valid))
    logits = state.logits.reshape(rows, number, -1)
    return jax.nn.softmax(jnp.take_along_axis(logits, answer_ids, axis=-1), axis=-1)


_answer_probs = jax.jit(answer_probs, static_argnames=("model",))


def model_probs(model: Decoder, params: Any, questions: Questions, *, chunk: int = 512) -> ProbsFn:
    """`answer_probs` as a `ProbsFn`, for histories with at least one item.

    Rows are padded to one width for each length of a history, so that few programs are compiled.

    Args:
        chunk: histories that are computed at a time.

    Raises:
        ValueError: see `Questions.answer_ids`; when called, for an empty history, or a history and a question
            that exceed the model's positions.
    """
    ids = questions.answer_ids()
    asks, asks_valid = _left_padded(questions.asks, max(map(len, questions.asks)))
    items = [
        [[*ask, *reply] for reply in replies]
        for ask, replies in zip(questions.asks, questions.replies, strict=True)
    ]
    longest = max(len(item) for row in items for item in row)

    def probs(history, asked):
        rows = [[t for q, a in row if q != EMPTY for t in items[q][a]] for row in history.tolist()]
        _check_lengths(rows, asks.shape[1], model.config.max_length)
        table = *_left_padded(rows, longest * history.shape[1]), np.asarray(asked)
        size = min(chunk, bucket(len(rows), 1))
        found = []
        for start in range(0, len(rows), size):
            part = [x[start : start + size] for x in table]
            short = size - len(part[0])
            tokens, valid, which = (np.pad(x, ((0, short), (0, 0)), "edge") for x in part)
            whole = (tokens, valid, asks[which], asks_valid[which], ids[which])
            found.append(np.asarray(_answer_probs(model, params, *whole))[: size - short])
        return np.concatenate(found)

    return probs


def latent_class_probs(prior: np.ndarray, table: np.ndarray) -> ProbsFn:
    """Exact Bayes for a latent class k ~ prior whose answers are independent: p(a | k, q) = table[k, q, a].

    p(a | h, q) = Σ_k p(k | h) table[k, q, a], p(k | h) ∝ prior_k Π_(q, a) in h table[k, q, a].

    Args:
        prior: [K].
        table: [K, Q, A].
    """
    log_prior, log_table = (np.log(np.maximum(x, TINY)) for x in (prior, table))

    def probs(history, questions):
        known = history[..., 0] != EMPTY
        q, a = (np.where(known, history[..., i], 0) for i in (0, 1))
        joint = log_prior[:, None] + np.sum(log_table[:, q, a] * known, axis=-1)  # [K, N]
        posterior = np.exp(joint - joint.max(axis=0))
        posterior /= posterior.sum(axis=0)
        return np.einsum("kn,knqa->nqa", posterior, table[:, questions])

    return probs


def _left_padded(rows, width):
    tokens, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        valid[i, width - len(row) :] = True
    return tokens, valid


def _check_lengths(rows, question, most):
    lengths = list(map(len, rows))
    if min(lengths) < 1 or max(lengths) + question > most:
        raise ValueError(
            f"model_probs: histories of {min(lengths)} to {max(lengths)} tokens and questions of {question}; "
            f"expected at least 1, and together at most the model's {most} positions."
        )
