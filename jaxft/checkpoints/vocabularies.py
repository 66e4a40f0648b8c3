"""Checks that a directory holds the vocabulary of its tokenizer, and that the files can be read here."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

from jaxft.models import CheckpointError

# Vocabularies as transformers names them; other files beside them hold settings.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",  # T5
    "sentencepiece.bpe.model",  # mBART, XLM-RoBERTa
    "source.spm",  # Marian
    "vocab.json",
    "vocab.txt",
)
_SETTINGS = {"tokenizer_config.json", "target_vocab.json"}  # in a class's list, and not needed
# Other names under which transformers finds a vocabulary: Mistral's, tiktoken's, versions of a file.
_OTHERS = re.compile(r"tekken\.json|.*\.tiktoken|tiktoken\.model|tokenizer\.model\..*")
_VERSION = re.compile(r"tokenizer\..+\.json")
_PACKAGES = ("sentencepiece", "protobuf", "tiktoken", "mistral_common", "sacremoses")


def has_tokenizer(path: pathlib.Path) -> bool:
    """Returns whether a directory holds a vocabulary, or settings that may need none (ByT5)."""
    return any((path / name).exists() for name in (*VOCABULARIES, "tokenizer_config.json"))


def readable(path: pathlib.Path) -> bool:
    """Returns whether a directory holds a tokenizer for which no package is missing."""
    return has_tokenizer(path) and not _needs_sentencepiece(path)


def check_packages(path: pathlib.Path) -> None:
    """Raises ModuleNotFoundError for a SentencePiece file without the package that reads it.

    transformers would ask for tiktoken instead, or read Marian's vocabulary as if it were another kind's.
    """
    if file := _needs_sentencepiece(path):
        raise ModuleNotFoundError(
            f"{path}: its tokenizer is a SentencePiece file ({file}) without a tokenizer.json; to read it, "
            "pip install sentencepiece protobuf"
        )


def missing_package(path: pathlib.Path, error: ImportError) -> ModuleNotFoundError:
    """The error, of one line, for a tokenizer whose class asked for a package that is not installed."""
    text = str(error)
    names = [name for name in _PACKAGES if name.replace("_", "") in _letters(text)]
    first = next(filter(None, map(str.strip, text.splitlines())), type(error).__name__)
    install = " ".join(names) or getattr(error, "name", None) or "the package that it names"
    return ModuleNotFoundError(
        f"{path}: its tokenizer cannot be read: {first.split('. ')[0]}; pip install {install}"
    )


def check_vocabulary(path: pathlib.Path, tokenizer: Any) -> None:
    """Checks that the vocabulary of a loaded tokenizer came from a file of its directory.

    Without one, classes of transformers 5 (those of T5, mBART, Llama) make a vocabulary of a few special
    tokens: no error is raised, and every word of a text is unknown. Classes that need no file,
    such as ByT5's, name none.

    Raises:
        CheckpointError: with the names of the files that are missing.
    """
    names = set((getattr(type(tokenizer), "vocab_files_names", None) or {}).values()) - _SETTINGS
    if not names or _serialised(path) or any(_OTHERS.fullmatch(f.name) for f in path.iterdir()):
        return
    absent = sorted(name for name in names - {"tokenizer.json"} if not (path / name).exists())
    if not absent and names != {"tokenizer.json"}:
        return
    needed = ["tokenizer.json"] * ("tokenizer.json" in names) + [" and ".join(absent)]
    raise CheckpointError(
        f"{path}: the vocabulary of its tokenizer is missing; a {type(tokenizer).__name__} needs "
        f"{', or '.join(filter(None, needed))}: copy it there from the model's repository."
    )


def _needs_sentencepiece(path):
    """The name of a SentencePiece file that only its package, which is missing, could read; None: none."""
    if _serialised(path) or importlib.util.find_spec("sentencepiece") is not None:
        return None
    names = [name for name in VOCABULARIES if name.endswith((".model", ".spm"))]
    return next((name for name in names if _is_sentencepiece(path / name)), None)


def _is_sentencepiece(file):
    """Returns whether it is a SentencePiece file; those of tiktoken, which may have its name, are text."""
    if not file.exists():
        return False
    with file.open("rb") as stream:
        return stream.read(1) == b"\n"


def _serialised(path):
    return any(
        file.name == "tokenizer.json" or _VERSION.fullmatch(file.name)
        for file in path.glob("tokenizer*.json")
    )


def _letters(text):
    return re.sub("[^a-z]", "", text.lower())
