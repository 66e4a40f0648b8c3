"""Renders all records of a data set, counts unusable ones, and shows a rendered record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxft.data.errors import BadRecords, DataError
from jaxft.data.length import TooLong, longest, shorten
from jaxft.data.records import Record
from jaxft.data.rendering import Renderer, Tokenised
from jaxft.data.source_rendering import SourceRenderer


def render(
    records: Iterable[Record],
    renderer: Renderer | SourceRenderer,
    max_length: int,
    *,
    too_long: TooLong = "drop",
    bad: BadRecords | None = None,
) -> list[Tokenised]:
    """Renders all records as tokens; reports or counts unusable ones, never silently.

    Args:
        max_length: maximum length in tokens; of an encoder-decoder's record, of source and answer each.
        too_long: handling of longer records, counted in `bad`: "drop"; "truncate" on the right
            (the stop token is lost, so the model is not taught to stop there);
            "truncate_left_prompt", which keeps the answer and the BOS; "split" into pieces of
            max_length, for plain text; or "error". A piece without trained tokens is dropped.
        bad: policy for records that cannot be rendered; also receives the counts.

    Raises:
        DataError: if nothing remains, or by the policies.
    """
    bad = BadRecords(loud=True) if bad is None else bad
    result, total = [], 0
    for record in records:
        total += 1
        where = str(record.get("_where", record.get("id", f"record {total - 1}")))
        try:
            parts = renderer(record)
        except DataError as error:
            if error.code is None:
                raise  # A wrong setting fails every record: skipping would hide it.
            bad.add(where, error.code, str(error))
            continue
        for part in parts:
            if not part.loss_mask[1:].any():  # The first token has nothing before it.
                bad.add(where, "no_loss_tokens", "its loss mask is all zero; nothing would train.")
            elif (length := longest(part)) <= max_length:
                result.append(part)
            elif too_long == "error":
                raise DataError(
                    f"{where}: {length} tokens, more than max_length={max_length}; raise "
                    "it, or choose too_long='drop' or 'truncate'.",
                    "too_long",
                )
            else:
                pieces = shorten(part, max_length, too_long)
                bad.dropped["truncated" if pieces else "too_long"] += 1
                result += pieces
    bad.finish(total, len(result))
    return result


def explain(part: Tokenised, tokenizer: Any, *, color: bool = True) -> str:
    """Decodes the record with trained tokens in green, or in ⟦brackets⟧ without colour."""
    begin, end = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    source = "" if part.source is None else tokenizer.decode(part.source.tolist()) + "\n"
    text, run, trains = source, [], False
    for token, weight in [
        *zip(part.tokens.tolist(), part.loss_mask > 0, strict=True),
        (None, None),
    ]:
        if weight != trains or token is None:
            piece = tokenizer.decode(run) if run else ""
            text += f"{begin}{piece}{end}" if trains and piece else piece
            run, trains = [], weight
        run.append(token)
    share = part.loss_mask.astype(bool).mean()
    return f"{text}\n[{len(part.tokens)} tokens, {share:.0%} of them train]"


def render_prompts(
    records: Sequence[Record], renderer: Renderer | SourceRenderer
) -> list[list[int]]:
    """Returns the prompt ids of each record; DataError names a record that cannot be rendered."""
    prompts = []
    for record in records:
        try:
            prompts.append(renderer.prompt(record))
        except DataError as error:
            if error.code is None:
                raise
            raise DataError(
                f"{record.get('_where', record.get('id'))}: {error}", error.code
            ) from error
    return prompts
