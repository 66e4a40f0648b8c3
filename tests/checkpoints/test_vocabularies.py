"""Tokenizers whose vocabulary, or the package that reads it, is missing: refused in one line, not made up."""

import json

import pytest

from jaxft.checkpoints import CheckpointError, load_tokenizer, vocabularies

pytest.importorskip("transformers")
T5 = {"model_type": "t5", "vocab_size": 400, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"model_type": "llama", "vocab_size": 40, "eos_token_id": 2}
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "eos_token_id": 0}
MARIAN = {"model_type": "marian", "vocab_size": 40, "eos_token_id": 0}
PIECES = (
    b"\n\x0e\n\x05<pad>\x15\x00\x00\x00\x00\x18\x03"  # a SentencePiece file begins with a piece
)
WORDS = json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}).encode()


def directory(path, config, tokenizer_class, **files):
    (path / "config.json").write_text(json.dumps(config))
    if tokenizer_class is not None:
        settings = {"tokenizer_class": tokenizer_class}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


@pytest.mark.parametrize(
    "config, kind, files, needed",
    [
        (T5, "T5Tokenizer", {}, "a T5Tokenizer needs tokenizer.json, or spiece.model: copy"),
        (LLAMA, "LlamaTokenizer", {}, "needs tokenizer.json, or tokenizer.model: copy"),
        (LLAMA, "PreTrainedTokenizerFast", {}, "tokenizer"),
        (GPT2, "GPT2Tokenizer", {"vocab__json": WORDS}, "cannot be read .*merges.*download"),
        (GPT2, None, {"vocab__json": WORDS}, "merges.*download"),
    ],
    ids=["t5", "llama", "fast", "gpt2", "gpt2, bare"],
)  # fmt: skip
def test_a_missing_vocabulary_is_named(config, kind, files, needed, tmp_path):
    """transformers makes vocabularies of special tokens, in which every word is unknown, and says nothing."""
    with pytest.raises(CheckpointError, match=needed):
        load_tokenizer(directory(tmp_path, config, kind, **files))


@pytest.mark.parametrize(
    "config, kind, file",
    [
        (T5, None, "spiece.model"),
        (T5, "T5Tokenizer", "spiece.model"),
        (LLAMA, "LlamaTokenizer", "tokenizer.model"),
        (MARIAN, None, "source.spm"),
        (MARIAN, "MarianTokenizer", "source.spm"),
    ],
)
def test_a_missing_package_is_named(config, kind, file, tmp_path, monkeypatch):
    path = directory(tmp_path, config, kind, vocab__json=WORDS, **{file: PIECES})
    monkeypatch.setattr(vocabularies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=f"{file}.*; to read it, pip install sentencepiece"
    ):
        load_tokenizer(path)
    assert not vocabularies.readable(path)
    (path / file).write_bytes(b"IQ== 0\n")  # tiktoken's, which may have the same name
    assert vocabularies.readable(path)


def test_the_error_of_a_class_becomes_one_line(tmp_path):
    text = "\nMarianTokenizer requires the SentencePiece library but it was not found. Check\nthe page.\n"
    error = vocabularies.missing_package(tmp_path, ImportError(text))
    assert isinstance(error, ModuleNotFoundError)
    assert str(error).endswith("but it was not found; pip install sentencepiece")


def test_a_tokenizer_of_bytes_needs_no_vocabulary(tmp_path):
    tokenizer = load_tokenizer(directory(tmp_path, T5, "ByT5Tokenizer"))
    assert tokenizer("ab")["input_ids"] == [100, 101, 1]
