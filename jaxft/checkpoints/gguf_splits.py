"""How byte-level tokenizers cut text before merging, by llama.cpp's names (`tokenizer.ggml.pre`).

From llama.cpp's src/llama-vocab.cpp, whose rules are those of the tokenizer.json that each was made from.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jaxft.models import CheckpointError

# A step is a regular expression whose matches stand alone, or one of these two of the tokenizers package.
WORDS, DIGITS = "ByteLevel", "Digits"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_REST}"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS)


class Split(NamedTuple):
    """One way of cutting.

    Attributes:
        steps: one after the other.
        names: llama.cpp's; the first is written.
        ignore_merges: whether a piece that is a token is one, whatever the merges say.
        adds_bos: whether a file that does not say so puts the beginning of a text before each.
        composes: whether text is put into Unicode's form NFC first, which llama.cpp leaves to its caller.
    """

    steps: tuple[str, ...]
    names: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    composes: bool = False


# "default", the mark of files from before 2024-05, of which many were made for GPT-2's rule.
SPLITS = (
    Split((WORDS,), ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "default")),
    Split(
        (DIGITS, WORDS), ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b")
    ),
    Split(
        (_LLAMA3,),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"),
        ignore_merges=True,
        adds_bos=True,
    ),
    Split((_LLAMA3,), ("dbrx", "smaug-bpe")),
    Split((_QWEN2,), ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "hunyuan"), composes=True),
    Split((_QWEN2,), ("stablelm2",)),
    Split((_TEKKEN,), ("tekken",), ignore_merges=True, adds_bos=True),
    Split((_GPT4O,), ("gpt-4o", "llama4", "kanana2")),
    Split(_DEEPSEEK_CODER, ("deepseek-coder",)),
)


def split_named(name: str) -> Split:
    """The way of cutting that `tokenizer.ggml.pre` names.

    Raises:
        CheckpointError: for a name that is not in `SPLITS`.
    """
    for split in SPLITS:
        if name in split.names:
            return split
    known = ", ".join(split.names[0] for split in SPLITS)
    raise CheckpointError(
        f"tokenizer.ggml.pre is {name!r}, known are {known} and their like; take the tokenizer files of the "
        "model that the file was made from."
    )


def split_of(tokenizer: dict[str, Any]) -> Split:
    """The way of cutting of a byte-level tokenizer.json.

    Raises:
        CheckpointError: if llama.cpp has no name for it.
    """
    steps = tuple(_steps(tokenizer["pre_tokenizer"]))
    merges = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = tokenizer["normalizer"]
    composes = normalizer == {"type": "NFC"}
    if normalizer is not None and not composes:
        raise CheckpointError(
            f"the tokenizer's normalizer {normalizer['type']} has no name in GGUF; save the model "
            "with save_model."
        )
    for split in SPLITS:
        if (steps, merges, composes) == (split.steps, split.ignore_merges, split.composes):
            return split
    raise CheckpointError(
        f"the tokenizer cuts text by {' then '.join(steps)} (ignore_merges {merges}, NFC {composes}), for "
        "which GGUF has no name here; save the model with save_model."
    )


def pre_tokenizer(split: Split) -> Any:
    """The pre-tokenizer of the tokenizers package."""
    from tokenizers import Regex, pre_tokenizers

    known = {
        DIGITS: lambda: pre_tokenizers.Digits(individual_digits=True),
        WORDS: lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    regex = lambda step: pre_tokenizers.Split(Regex(step), behavior="isolated")
    steps = [known[step]() if step in known else regex(step) for step in split.steps]
    if split.steps[-1] != WORDS:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _steps(node):
    kind = None if node is None else node["type"]
    if kind == "Sequence":
        for inner in node["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not node["add_prefix_space"]:
        yield from (WORDS,) if node["use_regex"] else ()
    elif kind == "Digits" and node["individual_digits"]:
        yield DIGITS
    elif kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        yield next(iter(node["pattern"].values()))
    else:
        raise CheckpointError(
            f"the tokenizer's pre-tokenizer {json.dumps(node)[:120]} has no name in GGUF; save the model "
            "with save_model."
        )
