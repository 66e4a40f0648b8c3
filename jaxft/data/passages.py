"""Queries with texts that answer them and texts that do not, for embeddings; and mined negatives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxft.data.errors import BadRecords, DataError
from jaxft.data.groups import TokenisedGroup
from jaxft.data.messages import text_of
from jaxft.data.records import Record, renamed
from jaxft.data.rendering import Tokenised

# Names of public data sets: sentence-transformers', MS MARCO's, BEIR's, BGE's, NLI's.
QUERIES = ("query", "anchor", "question", "sentence1", "premise")
POSITIVES = (
    "positive",
    "pos",
    "passage",
    "answer",
    "context",
    "sentence2",
    "document",
    "entailment",
)
NEGATIVES = ("negatives", "negative", "neg", "hard_negatives", "contradiction")


def normalise_passages(raw: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> Record:
    """Returns a record with `query`, `positive` and `negatives` (a list, maybe empty); keeps the rest.

    The query is the first column of QUERIES that the row has, and so on; numbered columns such as
    `negative_1` are negatives too. `fields` maps `query`, `positive` and `negatives` to other columns.

    Raises:
        DataError: if a query or positive is absent, empty, not text or several texts, or both are the same.
    """
    row, _, _ = renamed(raw, fields)
    first = lambda names: next((name for name in names if row.get(name) is not None), None)
    names = {"query": first(QUERIES), "positive": first(POSITIVES)}
    for ours, name in names.items():
        if name is None:
            options = ", ".join(QUERIES if ours == "query" else POSITIVES)
            raise DataError(
                f"no column for the {ours} among {sorted(row)}; expected one of {options}, or map yours with "
                f"--fields {ours} COLUMN, in Python fields={{{ours!r}: COLUMN}}.",
                "schema",
            )
    query = text_of(row[names["query"]], names["query"])
    positive = _one(row[names["positive"]], names["positive"])
    numbered = [n for n in sorted(row) if n.startswith("negative_") and n[9:].isdigit()]
    negatives = []
    for name in (*NEGATIVES, *sorted(numbered, key=lambda n: int(n[9:]))):
        given = row.get(name)
        given = [] if given is None else [given] if isinstance(given, str) else given
        if not isinstance(given, (list, tuple)):
            raise DataError(
                f"{name} must be a text or a list of texts, got {given!r:.40}.", "schema"
            )
        negatives += [text_of(text, name) for text in given]
    if not query.strip() or not positive.strip() or not all(text.strip() for text in negatives):
        raise DataError("a query, its positive or a negative is empty.", "empty")
    negatives = list(dict.fromkeys(negatives))  # a text counts once
    if positive in negatives:
        raise DataError("the positive is also among the negatives.", "schema")
    used = {*names.values(), *NEGATIVES, *numbered}
    rest = {name: value for name, value in row.items() if name not in used}
    return rest | {"query": query, "positive": positive, "negatives": negatives}


def render_passages(
    records: Iterable[Record],
    tokenizer: Any,
    max_length: int,
    *,
    negatives: int = 0,
    query_prompt: str = "",
    passage_prompt: str = "",
    bad: BadRecords | None = None,
) -> list[TokenisedGroup]:
    """Tokenises records of `normalise_passages` as groups of 2 + negatives texts, for `group_batches`.

    Texts are cut to `max_length` tokens, special tokens included; `bad` counts them. Records with fewer
    negatives have empty texts in their place. The column `text_ids` is equal for equal texts.

    Args:
        tokenizer: of the model, with its special tokens.
        max_length: maximum tokens of a text.
        negatives: of each record; more are left out.
        query_prompt: put before each query.
        passage_prompt: put before each other text.
        bad: counts the texts that were cut.

    Raises:
        DataError: if there is no record, or a text has no token.
    """
    numbers: dict[str, int] = {}
    result = []
    for record in records:
        others = record["negatives"][:negatives]
        texts = [query_prompt + record["query"]]
        texts += [passage_prompt + text for text in (record["positive"], *others)]
        parts = [_tokens(text, tokenizer, max_length, bad) for text in texts]
        parts += [_NOTHING] * (negatives - len(others))
        # Queries and passages have different prompts, but a text is the same without them.
        bare = [record["query"], record["positive"], *others, *[""] * (negatives - len(others))]
        ids = np.array([numbers.setdefault(text, len(numbers)) for text in bare], np.int32)
        result.append(TokenisedGroup(tuple(parts), {"text_ids": ids}, str(record.get("id", ""))))
    if not result:
        raise DataError("render_passages: there are no records.")
    return result


def render_reranking(
    records: Iterable[Record],
    tokenizer: Any,
    max_length: int,
    *,
    negatives: int,
    bad: BadRecords | None = None,
) -> list[TokenisedGroup]:
    """Tokenises a query with its answer, and with each negative, as groups of 1 + negatives rows.

    The rows are those of the tokenizer for two texts, the longer of which is cut first; `loss_mask` is 1 from
    the first token of the second text on, as the token types of BERT are. Records with fewer negatives have
    empty rows in their place.

    Args:
        records: of `normalise_passages`.
        tokenizer: of the model.
        max_length: maximum tokens of a row.
        negatives: of each record; more are left out.
        bad: counts the rows that were cut.

    Raises:
        DataError: if no record has a negative.
    """
    result = []
    for record in records:
        texts = [record["positive"], *record["negatives"][:negatives]]
        parts = [_pair(record["query"], text, tokenizer, max_length, bad) for text in texts]
        parts += [_NOTHING] * (1 + negatives - len(parts))
        result.append(TokenisedGroup(tuple(parts), {}, str(record.get("id", ""))))
    if not any(len(part.tokens) for group in result for part in group.parts[1:]):
        raise DataError(
            "render_reranking: no record has a negative; give some, or find them with mine_negatives."
        )
    return result


def mine_negatives(
    scores: np.ndarray,
    positives: Sequence[Collection[int]],
    number: int,
    *,
    skip: int = 0,
    margin: float | None = None,
    excluded: Sequence[Collection[int]] | None = None,
) -> list[list[int]]:
    """For each query, the texts most similar to it that do not answer it: "hard" negatives.

    Args:
        scores: [N, M] similarities of queries and texts.
        positives: for each query, the texts that answer it.
        number: of negatives a query, at most.
        skip: the most similar texts that are passed over, since they may answer the query too.
        margin: texts whose similarity is above the least of the query's positives less this margin are passed
            over too; None: none.
        excluded: for each query, further texts that are not taken: its own negatives, or the query itself.

    Returns: lists of texts, most similar first; shorter than `number` if there are no more.
    """
    result, excluded = [], [()] * len(positives) if excluded is None else excluded
    for row, known, others in zip(scores, positives, excluded, strict=True):
        left = {*known, *others}
        order = [int(i) for i in np.argsort(-row, kind="stable") if i not in left]
        limit = np.inf if margin is None else min(row[list(known)]) - margin
        result.append([i for i in order[skip:] if row[i] <= limit][:number])
    return result


_NOTHING = Tokenised(np.zeros(0, np.int32), np.zeros(0, np.float32))


def _one(value, name):
    """The text of a column that may hold a list of one."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return text_of(value, name)


def _tokens(text, tokenizer, max_length, bad):
    ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    if not ids:
        raise DataError(f"render_passages: {text!r:.40} has no token.")
    _count_cut(ids, max_length, bad, lambda: tokenizer(text))
    return Tokenised(np.asarray(ids, np.int32), np.ones(len(ids), np.float32))


def _pair(query, text, tokenizer, max_length, bad):
    found = tokenizer(query, text, truncation=True, max_length=max_length)
    ids, parts = found["input_ids"], np.array([part == 1 for part in found.sequence_ids(0)])
    if not parts.any():
        raise DataError(f"render_reranking: {text!r:.40} has no token beside {query!r:.40}.")
    _count_cut(ids, max_length, bad, lambda: tokenizer(query, text))
    second = np.arange(len(ids)) >= parts.argmax()
    return Tokenised(np.asarray(ids, np.int32), second.astype(np.float32))


def _count_cut(ids, max_length, bad, whole):
    if bad is not None and len(ids) == max_length and len(whole()["input_ids"]) > max_length:
        bad.dropped["truncated"] += 1
