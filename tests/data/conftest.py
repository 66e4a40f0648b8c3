"""A small tokenizer for every test here."""

import importlib.util
import pathlib

import pytest

_spec = importlib.util.spec_from_file_location(
    "small_tokenizers", pathlib.Path(__file__).with_name("small_tokenizers.py")
)
_small = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_small)


@pytest.fixture
def small_tokenizer():
    return _small.tokenizer(_small.CHATML)
