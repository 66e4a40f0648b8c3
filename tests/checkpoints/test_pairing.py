"""Tokenizers of two models: equal ones pass, and each kind of difference is named."""

import pytest

from jaxft.checkpoints import CheckpointError, check_same_tokenizer


class Tokenizer:
    """A vocabulary, and the ids that every text gets."""

    def __init__(self, vocabulary, ids=(1, 2)):
        self.vocabulary, self.ids = vocabulary, list(ids)

    def get_vocab(self):
        return self.vocabulary

    def encode(self, text):
        return self.ids


WORDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    "other, message",
    [
        (
            Tokenizer(WORDS | {"b": 2, "c": 1}),
            "2 tokens differ, such as 'b', which has id 1 in the",
        ),
        (Tokenizer(WORDS | {"<tool>": 3}), "1 tokens differ, such as '<tool>', which has no id in"),
        (
            Tokenizer({"a": 0, "b": 1}),
            "such as 'c', which has id 2 in the one and no id in the other",
        ),
        (Tokenizer(WORDS, [0, 1, 2]), r"begin a text in other ways: \[1, 2\]... and \[0, 1, 2\]"),
    ],
)
def test_tokenizers_that_differ_are_refused(other, message):
    check_same_tokenizer(Tokenizer(WORDS), Tokenizer(dict(WORDS)), ("student", "teacher"))
    with pytest.raises(CheckpointError, match=f"student and teacher have .*{message}"):
        check_same_tokenizer(Tokenizer(WORDS), other, ("student", "teacher"))
