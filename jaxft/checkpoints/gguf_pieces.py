"""SentencePiece's BPE in GGUF metadata: scores for merges, and the space before a text.

Follows llama.cpp's src/llama-vocab.cpp (llm_tokenizer_spm).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxft.models import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
SPACE = "▁"
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_DOUBLE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
# (normalizers, scheme of Metaspace) of SentencePiece's BPE -> what space_prefix returns. Metaspace adds no
# space to a text that begins with one nor, under its scheme "first", after special tokens; llama.cpp does.
_PREFIXES = {
    (json.dumps(normalizers, sort_keys=True), *scheme): meant
    for normalizers, scheme, meant in (
        ([_REPLACE], (), (False, True)),
        ([_PREPEND, _REPLACE], (), (True, True)),
        ([], ("never",), (False, True)),
        ([_REPLACE], ("never",), (False, True)),
        ([], ("always",), (True, False)),
        ([], ("first",), (True, False)),
        ([_REPLACE], ("always",), (True, False)),
        ([_REPLACE], ("first",), (True, False)),
        ([_REPLACE, _DOUBLE], ("always",), (True, True)),
    )
}


def build_pieces(
    get: Callable[[str], Any], tokens: Sequence[str], types: Sequence[int], kept: Collection[str]
) -> tuple[Any, bool]:
    """(tokenizer of the tokenizers package, whether texts begin with BOS if the file does not say).

    Args:
        get: returns the value of a metadata key, or None.
        tokens: of all rows; Gemma's runs of spaces with ▁.
        types: of the tokens.
        kept: tokens that are in the vocabulary although their type is UNUSED.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefix = get("tokenizer.ggml.add_space_prefix") is not False
    unknown, scores = (get(f"tokenizer.ggml.{key}") for key in ("unknown_token_id", "scores"))
    # Gemma's merges follow the order of its tokens, not the scores.
    scores = range(0, -len(tokens), -1) if scores is None or is_gemma(get) else scores
    pieces = {
        token: score
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind in (NORMAL, USER_DEFINED)
    }
    core = Tokenizer(
        models.BPE(
            vocabulary_of(tokens, types, kept),
            merges_of(pieces),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    steps = [normalizers.Prepend(SPACE), replace]
    core.normalizer = normalizers.Sequence(steps) if prefix else replace
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(decode + [decoders.Strip(" ", 1, 0)] * prefix)
    return core, True


def write_pieces(table: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """The metadata of a tokenizer.json, without `tokenizer.ggml.`; `tokens` has all rows."""
    # A token's score is the rank of the first merge that makes it; scores of other tokens are never used.
    scores: dict[str, float] = {}
    for rank, merge in enumerate(table["model"]["merges"]):
        scores.setdefault(
            "".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank)
        )
    return {
        "pre": "default",
        "scores": [scores.get(token, -1e6) for token in tokens],
        "add_space_prefix": space_prefix(table)[0],
    }


def space_prefix(table: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether a space is added before a text, whether llama.cpp adds it exactly as the tokenizer does).

    Raises:
        CheckpointError: if spaces do not become ▁, or text is changed or split in another way.
    """
    normalizers, cuts = _parts(table["normalizer"]), _parts(table["pre_tokenizer"])
    schemes = [cut["prepend_scheme"] for cut in cuts if _METASPACE.items() <= cut.items()]
    said = json.dumps(normalizers, sort_keys=True), *schemes
    others = {cut["type"] for cut in cuts} - {"Split"} - ({"Metaspace"} if schemes else set())
    if said not in _PREFIXES or others:
        raise CheckpointError(
            f"the tokenizer's normalizer {said[0][:100]} and pre-tokenizer "
            f"{' then '.join(cut['type'] for cut in cuts) or 'none'} cannot be written to GGUF, where "
            "spaces become ▁ with or without one in front; save the model with save_model."
        )
    return _PREFIXES[said]


def merges_of(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE, best first: every split of a piece into two, by the piece's score.

    llama.cpp joins the adjacent pair that makes the piece of the highest score; for equal pieces,
    the split with the longer first part comes first, as in transformers' conversions.
    """
    found = []
    for token, score in pieces.items():
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        found += [(-score, -len(a), -len(b), a, b) for a, b in pairs if a in pieces and b in pieces]
    return [(a, b) for *_, a, b in sorted(found, key=lambda merge: merge[:3])]


def is_gemma(get: Callable[[str], Any]) -> bool:
    """Returns whether the metadata is of a Gemma, whose tokenizers have special rules."""
    return (get("general.architecture") or "").startswith("gemma")


def vocabulary_of(
    tokens: Sequence[str], types: Sequence[int], kept: Collection[str]
) -> dict[str, int]:
    """token -> id, without the rows that pad the embeddings."""
    pairs = zip(tokens, types, strict=True)
    return {t: i for i, (t, kind) in enumerate(pairs) if kind != UNUSED or t in kept}


def _parts(node):
    """The steps of a normalizer or pre-tokenizer."""
    if node is None:
        return []
    inner = {"normalizers", "pretokenizers"} & node.keys()
    if not inner:
        return [node]
    return [step for key in inner for part in node[key] for step in _parts(part)]
