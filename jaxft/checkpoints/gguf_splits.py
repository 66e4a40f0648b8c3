"""Ways in which byte-level tokenizers split text before merging, by llama.cpp's names (`tokenizer.ggml.pre`).

Source: llama.cpp's src/llama-vocab.cpp, whose rules come from each model's tokenizer.json.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jaxft.models import CheckpointError

# A step is a regular expression whose matches become separate pieces, or one of these steps of the
# tokenizers package. Steps after WORDS get the characters that represent bytes.
WORDS, DIGITS, NUMBERS, SIGNS = "ByteLevel", "Digits", "runs of Digits", "Punctuation"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
_SEED = _QWEN2.replace(r"\p{N}|", r"\p{N}{1}|").replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}{_REST}"
)
# The letters that have cases, as in DeepSeek's file; escaped if editors would compose them.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    "ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ"
    "\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, DIGITS)
_PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", _PUNCTUATION, r"\s+$", _HAN, DIGITS)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


class Split(NamedTuple):
    """One way of splitting.

    Attributes:
        steps: applied in order.
        names: llama.cpp's; the first is written.
        ignore_merges: whether a piece that equals a token becomes this token regardless of merges.
        adds_bos: whether texts begin with BOS if the file does not say.
        composes: whether text is first normalised to Unicode's NFC, which llama.cpp leaves to its caller.
    """

    steps: tuple[str, ...]
    names: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    composes: bool = False


# "default" marks files from before 2024-05, many of which were made for GPT-2's rule.
SPLITS = (
    Split(
        (WORDS,),
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "a.x-4.0")
        + ("mellum", "granite-docling", "default"),
    ),
    Split(
        (DIGITS, WORDS),
        ("smollm", "starcoder", "refact", "codeshell", "minerva-7b", "exaone", "mellum2"),
    ),
    Split((DIGITS, WORDS), ("command-r",), composes=True),
    Split((SIGNS, WORDS, NUMBERS, "[0-9][0-9][0-9]"), ("falcon",)),
    Split(
        (_LLAMA3,),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
        + ("jina-v5-nano",),
        ignore_merges=True,
        adds_bos=True,
    ),
    Split((_LLAMA3,), ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe")),
    Split(
        (_QWEN2,),
        ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "hunyuan"),
        composes=True,
    ),
    Split((_QWEN2,), ("stablelm2", "solar-open", "grok-2")),
    Split((_QWEN35,), ("qwen35",), composes=True),
    Split((_TEKKEN,), ("tekken",), ignore_merges=True, adds_bos=True),
    Split((_GPT4O,), ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")),
    Split(_DEEPSEEK_CODER, ("deepseek-coder",)),
    Split(_DEEPSEEK_LLM, ("deepseek-llm",)),
    Split(_DEEPSEEK3, ("deepseek-v3", "hunyuan-dense", "joyai-llm")),
    Split((_SEED,), ("seed-coder",)),
    Split((_BLOOM,), ("bloom", "poro-chat", "gpt3-finnish")),
    Split((_BLOOM, DIGITS), ("viking",)),
)


def split_named(name: str) -> Split:
    """The way of splitting that `tokenizer.ggml.pre` names.

    Raises:
        CheckpointError: for a name that is not in `SPLITS`.
    """
    for split in SPLITS:
        if name in split.names:
            return split
    known = ", ".join(split.names[0] for split in SPLITS)
    raise CheckpointError(
        f"tokenizer.ggml.pre is {name!r}, known are {known} and their like; use the tokenizer files of the "
        "model that the file was made from."
    )


def split_of(tokenizer: dict[str, Any]) -> Split:
    """The way of splitting of a byte-level tokenizer.json.

    Raises:
        CheckpointError: if llama.cpp has no name for it.
    """
    steps = tuple(_steps(tokenizer["pre_tokenizer"]))
    merges = bool(tokenizer["model"].get("ignore_merges"))
    normalizer = tokenizer["normalizer"]
    composes = normalizer == {"type": "NFC"}
    if not composes and normalizer not in (None, {"type": "Sequence", "normalizers": []}):
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
        NUMBERS: lambda: pre_tokenizers.Digits(individual_digits=False),
        SIGNS: lambda: pre_tokenizers.Punctuation(behavior="contiguous"),
        WORDS: lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    regex = lambda step: pre_tokenizers.Split(Regex(step), behavior="isolated")
    steps = [known[step]() if step in known else regex(step) for step in split.steps]
    if WORDS not in split.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _steps(node):
    kind = None if node is None else node["type"]
    if kind == "Sequence":
        for inner in node["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not node["add_prefix_space"]:
        yield from (WORDS,) if node["use_regex"] else ()
    elif kind == "Digits":
        yield DIGITS if node["individual_digits"] else NUMBERS
    elif kind == "Punctuation" and node["behavior"] == "Contiguous":
        yield SIGNS
    elif kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]:
        # DeepSeek's files contain literal line ends, other files their escapes.
        yield next(iter(node["pattern"].values())).replace("\r", r"\r").replace("\n", r"\n")
    else:
        raise CheckpointError(
            f"the tokenizer's pre-tokenizer {json.dumps(node)[:120]} has no name in GGUF; save the model "
            "with save_model."
        )
