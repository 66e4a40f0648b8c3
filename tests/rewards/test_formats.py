"""Rewards for tags by written-out cases."""

import pytest

from jaxft.rewards import tag_format_reward


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
