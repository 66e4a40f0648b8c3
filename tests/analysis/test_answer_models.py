"""Answers' probabilities by a cache are those of whole rows; a loss counts one token of each item."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.analysis import Questions, latent_class_probs, meta_dataset, model_probs
from jaxft.analysis.elicitation import EMPTY
from jaxft.data import finite_batches
from jaxft.models import Decoder
from jaxft.models.config import tiny_config
from jaxft.objectives import supervised

KEY = jax.random.key(0)
# Three questions of 1 to 3 tokens, with answers of 2 tokens, of which the second ends an item.
TABLE = Questions(
    asks=[[5], [6, 7], [8, 9, 10]],
    replies=[[[20, 1], [21, 1], [22, 1]], [[21, 1], [20, 1], [23, 1]], [[30, 1], [31, 1], [32, 1]]],
)


@pytest.fixture(scope="module")
def tiny():
    model = Decoder(tiny_config(40, max_length=64))
    params = model.init(KEY, jnp.zeros((1, 1), jnp.int32))["params"]
    # Larger than at init, so that answers differ in probability.
    return model, jax.tree.map(lambda x: 3 * x, params)


def plain(model, params, items, question):
    """p(answer) by one forward pass over the whole row, without a cache or padding."""
    row = [t for q, a in items for t in (*TABLE.asks[q], *TABLE.replies[q][a])]
    row += TABLE.asks[question]
    logits = model.apply({"params": params}, jnp.array([row])).logits[0, -1]
    return jax.nn.softmax(logits[np.array([r[0] for r in TABLE.replies[question]])])


def test_probabilities_with_a_cache_and_padding_are_those_of_whole_rows(tiny):
    model, params = tiny
    blank = (EMPTY, EMPTY)
    history = np.array(
        [[(0, 1), blank, blank], [(1, 2), (2, 0), blank], [(2, 2), (0, 0), (1, 1)]] * 2
    )
    questions = np.array([[1, 2], [0, 0], [2, 1]] * 2)
    # Six rows in parts of four: the last part is padded.
    found = model_probs(model, params, TABLE, chunk=4)(history, questions)
    assert found.shape == (6, 2, 3)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-6)
    for row, asked, probs in zip(history.tolist(), questions, found, strict=True):
        items = [(q, a) for q, a in row if q != EMPTY]
        for q, p in zip(asked, probs, strict=True):
            np.testing.assert_allclose(p, plain(model, params, items, q), atol=1e-5)
    assert found.std(axis=0).max() > 0.02  # The history matters.


def test_a_record_counts_the_first_token_of_each_answer_once():
    entities = {"a": TABLE.items([0, 1, 2]), "b": TABLE.items([2, EMPTY, 0])}
    (first, second) = sorted(meta_dataset(entities, KEY, 64), key=lambda r: r.id)
    assert (first.id, second.id) == ("a", "b")
    assert first.loss_mask.sum() == 3 and second.loss_mask.sum() == 2
    assert sorted(first.tokens[first.loss_mask > 0]) == [20, 20, 32]
    assert sorted(second.tokens[second.loss_mask > 0]) == [22, 30]
    assert len(first.tokens) == 6 + 3 * 2
    # Whole items only: 5 tokens hold the items of 3 and 4 tokens, or of 5, but no two.
    short = [meta_dataset({"a": entities["a"]}, jax.random.key(i), 5)[0] for i in range(9)]
    assert {len(r.tokens) for r in short} == {3, 4, 5}
    assert all(r.loss_mask.sum() == 1 for r in short)


def test_orders_differ_by_key_and_are_repeated_by_it():
    entities = {i: TABLE.items([0, 1, 2]) for i in range(50)}
    rows = lambda key: [(r.id, *r.tokens.tolist()) for r in meta_dataset(entities, key, 64)]
    assert rows(KEY) == rows(KEY) != rows(jax.random.key(1))
    orders = {row[1:] for row in rows(KEY)}
    assert len(orders) == 6  # all permutations of three items
    assert [row[0] for row in rows(KEY)] != sorted(row[0] for row in rows(KEY))


def test_the_loss_is_that_of_answers_after_history_and_question(tiny):
    model, params = tiny
    record = meta_dataset({"a": TABLE.items([0, 1, 2])}, KEY, 64)[0]
    batch = finite_batches([record], batch_size=1, max_length=16)[0]
    loss, _ = supervised(model.forward)(params, batch, KEY)
    logits = model.apply({"params": params}, jnp.array([record.tokens])).logits[0]
    logs = jax.nn.log_softmax(logits)
    places = np.flatnonzero(record.loss_mask)
    expected = -np.mean([logs[p - 1, record.tokens[p]] for p in places])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    # An answer is not visible where it is predicted: the last one can be any.
    other = record.tokens.copy()
    other[places[-1]] = 39
    again = model.apply({"params": params}, jnp.array([other])).logits[0]
    np.testing.assert_array_equal(again[: places[-1]], logits[: places[-1]])


def test_exact_bayes_worked():
    # Two classes, one reliable question: p(yes) = .9, .2; prior .5. After a yes: .9 / 1.1.
    probs = latent_class_probs(np.full(2, 0.5), np.array([[[0.1, 0.9]] * 2, [[0.8, 0.2]] * 2]))
    after = probs(np.array([[(0, 1), (EMPTY, EMPTY)]]), np.array([[1]]))[0, 0, 1]
    assert after == pytest.approx((0.9 * 0.9 + 0.2 * 0.2) / 1.1)
    before = probs(np.full((1, 2, 2), EMPTY), np.array([[1]]))[0, 0, 1]
    assert before == pytest.approx(0.55)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: TABLE.items([0, 3, 1]), "answer 3 to question 1; expected 0 to 2"),
        (lambda: TABLE.items([0, 1]), "2 answers to 3 questions"),
        (
            lambda: Questions([[1]], [[[4, 5], [6], [4]]]).answer_ids(),
            "answers 0 and 2 to question 0 both begin with token 4",
        ),
        (lambda: Questions([[1], [2]], [[[4], [6]], [[4]]]).answer_ids(), "different numbers"),
        (lambda: meta_dataset({"e": []}, KEY, 9), "no item of entity 'e' fits into 9"),
        (lambda: meta_dataset({"e": TABLE.items([0, 1, 2])}, KEY, 2), "raise max_length"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_histories_have_items_and_fit(tiny):
    model, params = tiny
    probs = model_probs(model, params, TABLE)
    for history in (np.full((1, 2, 2), EMPTY), np.array([[(2, 0)] * 13])):
        with pytest.raises(ValueError, match="at most the model's 64 positions"):
            probs(history, np.array([[0]]))
