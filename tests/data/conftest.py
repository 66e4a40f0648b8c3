"""A small tokenizer for every test here."""

import pytest

from tests.data import small_tokenizers as _small


@pytest.fixture
def small_tokenizer():
    return _small.tokenizer(_small.CHATML)
