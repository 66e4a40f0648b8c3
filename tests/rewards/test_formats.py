"""Rewards for tags by written-out cases, and weighted sums of rewards."""

import numpy as np
import pytest

from jaxft.rewards import RewardError, tag_format_reward, weighted_rewards


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>a\nb</think>\n <answer>b</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a < b</think><answer>1 > 0</answer>", 1),
        ("<think>a<answer>b</answer>", 0),  # not closed
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a<think>a</think></think><answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think><answer>b</answer> and so on", 0),
        ("So <think>a</think><answer>b</answer>", 0),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<plan>a</plan><answer>b</answer>", 0),
        ("<think>a<answer>b</think></answer>", 0),
        ("<think>a</think>", 0),
        ("", 0),
    ],
)
def test_each_tag_once_in_order_and_nothing_else(text, wanted):
    assert tag_format_reward(("think", "answer"))([text], [{}]) == [wanted]


@pytest.mark.parametrize("tags", [(), ("a", "a"), ("a b",), ("<a>",), ("1a",), ("a.*",)])
def test_tags_are_different_words(tags):
    with pytest.raises(ValueError, match="tag"):
        tag_format_reward(tags)


def test_weighted_rewards_are_the_weighted_sum():
    right = lambda texts, records: [
        float(text == r["answer"]) for text, r in zip(texts, records, strict=True)
    ]
    form = lambda texts, records: [float(text.isdigit()) for text in texts]
    texts = ["4", "5", "four", "x"]
    records = [{"answer": "4"}, {"answer": "4"}, {"answer": "four"}, {"answer": "4"}]
    found = weighted_rewards((0.5, right), (0.25, form))(texts, records)
    np.testing.assert_allclose(found, [0.75, 0.25, 0.5, 0.0])


def test_no_verdict_of_a_part_is_none_of_the_sum():
    parts = (1.0, lambda t, r: [np.nan, 1.0]), (1.0, lambda t, r: [0.0, 1.0])
    np.testing.assert_allclose(weighted_rewards(*parts)(["a", "b"], [{}, {}]), [np.nan, 2.0])


def test_bad_weights_and_bad_parts_are_refused():
    one = lambda texts, records: [1.0]
    for weights in ([], [0.0], [-1.0, 2.0], [np.inf], [np.nan]):
        with pytest.raises(ValueError, match="weights"):
            weighted_rewards(*((w, one) for w in weights))
    with pytest.raises(RewardError, match="2 numbers"):
        weighted_rewards((1.0, one))(["a", "b"], [{}, {}])
