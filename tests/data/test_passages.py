"""Records of queries and passages: columns of public data sets, tokens, mined negatives; and their ranks."""

import numpy as np
import pytest

from jaxft import data
from jaxft.metrics import ranked, retrieval_metrics

WANTED = {"query": "q", "positive": "p", "negatives": ["n", "m"]}


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "pos": ["p"], "neg": ["n", "m"]},
        {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m"},
        {"question": "q", "answer": "p", "negative": "n", "hard_negatives": ["m"]},
        {"query": "q", "positive": "p", "negatives": ("n", "m"), "answer": None},
    ],
)
def test_columns_of_public_data_sets(row):
    found = data.normalise_passages(row)
    found["negatives"] = sorted(found["negatives"], reverse=True)
    assert {name: found[name] for name in WANTED} == WANTED


def test_ten_numbered_negatives_keep_their_order():
    row = {"query": "q", "positive": "p"} | {f"negative_{i}": f"n{i}" for i in range(1, 12)}
    assert data.normalise_passages(row)["negatives"] == [f"n{i}" for i in range(1, 12)]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "q", "positive": "p"}, "no column for the query among .*--fields query COLUMN"),
        ({"query": "q", "pos": ["p", "o"]}, "pos must be text, got a list of 2 texts"),
        ({"query": "q", "positive": " "}, "is empty"),
        ({"query": "q", "positive": 3}, "positive must be text, got int"),
        ({"query": "q", "positive": "p", "negatives": {"a": 1}}, "negatives must be a text or a list"),
        ({"query": "q", "positive": "p", "negatives": ["p"]}, "also among the negatives"),
    ],
)  # fmt: skip
def test_what_is_no_such_record_is_an_error(row, message):
    with pytest.raises(data.DataError, match=message):
        data.normalise_passages(row)


def test_fields_map_columns():
    row = {"title": "q", "body": "p", "others": ["n"]}
    fields = {"query": "title", "positive": "body", "negatives": "others"}
    found = data.normalise_passages(row, fields)
    assert found == {"query": "q", "positive": "p", "negatives": ["n"]}


class Letters:
    """A tokenizer of letters between 1 and 2."""

    def __call__(self, text, truncation=False, max_length=None):
        ids = [ord(c) for c in text]
        return {"input_ids": [1, *(ids[: max_length - 2] if truncation else ids), 2]}


def test_groups_have_equal_sizes_and_ids_of_equal_texts():
    records = [
        {"query": "ab", "positive": "cde", "negatives": ["f", "g"]},
        {"query": "f", "positive": "cde", "negatives": []},
    ]
    bad = data.BadRecords()
    found = data.render_passages(
        records, Letters(), 4, negatives=1, query_prompt="?", passage_prompt="", bad=bad
    )
    assert [[part.tokens.tolist() for part in group.parts] for group in found] == [
        [[1, ord("?"), ord("a"), 2], [1, ord("c"), ord("d"), 2], [1, ord("f"), 2]],
        [[1, ord("?"), ord("f"), 2], [1, ord("c"), ord("d"), 2], []],
    ]
    first, second = (group.columns["text_ids"] for group in found)
    assert first[1] == second[1] and first[2] == second[0] and len({*first, *second}) == 4
    assert bad.dropped["truncated"] == 3
    (batch,) = data.finite_group_batches(found, batch_size=3, max_length=4)
    assert batch["tokens"].shape[:2] == (3, 3) and batch["text_ids"].shape == (3, 3)
    with pytest.raises(data.DataError, match="no records"):
        data.render_passages([], Letters(), 4)


def test_mined_negatives_are_similar_and_no_answers():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.1], [0.2, 0.5, 0.5, 0.4, 0.9]])
    mine = lambda **options: data.mine_negatives(scores, [{1}, {4, 3}], 2, **options)
    assert mine() == [[0, 2], [1, 2]]
    assert mine(skip=1) == [[2, 3], [2, 0]]
    assert mine(margin=0.05) == [[2, 3], [0]]


def test_ranks_by_hand():
    queries, corpus = np.eye(3), np.array([[0, 0, 1], [1, 0, 0], [0.9, 0, 0.5], [0.8, 1, 0]])
    ranking = ranked(queries, corpus, 3, rows=2)
    assert ranking.tolist() == [[1, 2, 3], [3, 0, 1], [0, 2, 1]]
    found = retrieval_metrics(ranking, [{2}, {3, 1}, {3}], at=(1, 3))
    assert found["recall@1"] == pytest.approx((0 + 0.5 + 0) / 3)
    assert found["recall@3"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["mrr@3"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    best = 1 + 1 / np.log2(3)
    assert found["ndcg@3"] == pytest.approx((1 / np.log2(3) + (1 + 1 / 2) / best) / 3)
    assert found["ndcg@1"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="expected one set, not empty"):
        retrieval_metrics(ranking, [{2}, set(), {3}])
