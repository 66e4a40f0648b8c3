"""Records -> tokens and loss masks. Masks come from structure, never from token ids."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jaxft.data.errors import BadRecords, DataError
from jaxft.data.records import Record, as_messages

MaskMode = Literal["completion", "last_turn", "all", "per_message"]
TooLong = Literal["drop", "truncate", "error"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """One record as tokens."""

    tokens: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] float32, weight of each token as a target
    id: str = ""


class Renderer:
    """Renders records with a tokenizer and its chat template.

    Args:
        tokenizer: a transformers tokenizer.
        template: a Jinja chat template that replaces the tokenizer's: its text, or a path.
        mask: which tokens train: those of all assistant turns and completions; of the last
            assistant turn alone; all; or of messages that say "train": true ("weight" scales).
        append_eos: end plain completions and texts with the tokenizer's EOS.

    Raises:
        DataError: at the first conversation, if there is no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        mask: MaskMode = "completion",
        append_eos: bool = True,
    ):
        self.tokenizer, self.mask, self.append_eos = tokenizer, mask, append_eos
        self.template = _read_template(template) or getattr(tokenizer, "chat_template", None)
        self.merged_boundaries = 0  # records whose prompt and completion would merge into one token
        self._unrolls = False

    def __call__(self, record: Record) -> list[Tokenised]:
        """The token sequences of a record: one, or one a turn where the template rewrites history."""
        messages = as_messages(record)
        if messages is not None:
            return self._conversation(messages, record)
        if "tokens" in record:
            tokens = np.asarray(record["tokens"], np.int32)
            return [Tokenised(tokens, np.ones(len(tokens), np.float32), str(record.get("id", "")))]
        if "text" in record:
            return [self._pieces([(record["text"], 1.0)], record, bos=True, eos=self.append_eos)]
        pieces = [
            (record["prompt"], 1.0 if self.mask == "all" else 0.0),
            (record["completion"], 1.0),
        ]
        return [self._pieces(pieces, record, bos=True, eos=self.append_eos)]

    def prompt(self, record: Record) -> list[int]:
        """The ids after which a model is to answer: the conversation up to its last assistant turn."""
        messages = as_messages(record)
        if messages is None:
            text = record["prompt"] if "prompt" in record else record["text"]
            return self._bos() + self._encode(text)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self._encode(self._render(messages, prompt=True))

    def _conversation(self, messages, record):
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns and self.mask != "all":
            raise DataError("no assistant message to learn from; see fields= to map roles.")
        if self.mask == "all":
            return [self._pieces([(self._render(messages), 1.0)], record)]
        if "generation %}" in (self.template or ""):
            return [self._by_markers(messages, record)]
        text = self._render(messages)
        spans = None if self._unrolls else self._spans(messages, turns, text)
        if spans is None:
            return self._unrolled(messages, turns, record)
        return [self._span_pieces(text, spans, messages, record)]

    def _spans(self, messages, turns, text):
        """(turn, start, end) of each assistant turn in the whole text, or None if it has no prefixes.

        A turn is what the rendering gains over that of the messages before it and the generation
        prompt, so it includes the end-of-turn token.
        """
        spans = []
        for i in turns:
            before = self._before(messages, i)
            after = text if i == len(messages) - 1 else self._render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                return None
            spans.append((i, len(before), len(after)))
        return spans

    def _unrolled(self, messages, turns, record):
        if not self._unrolls:
            self._unrolls = True
            warnings.warn(
                "the chat template rewrites earlier turns (it drops thinking, say); each assistant "
                "turn becomes a record of its own, so that training sees what the sampler will.",
                stacklevel=4,
            )
        turns = turns[-1:] if self.mask == "last_turn" else turns
        results = []
        for i in turns:
            part = messages[: i + 1]
            text, before = self._render(part), self._before(messages, i)
            if not text.startswith(before):
                raise DataError(
                    f"the chat template renders the prompt of turn {i} otherwise with its answer than "
                    "without; pass a template with {% generation %} markers."
                )
            spans = [(i, len(before), len(text))]
            results.append(self._span_pieces(text, spans, part, record))
        return results

    def _before(self, messages, i):
        """The text after which turn i is generated."""
        if i:
            return self._render(messages[:i], prompt=True)
        # Templates refuse an empty conversation: the turn begins where its content does.
        text = self._render(messages[:1])
        return text[: text.find(messages[0]["content"])]

    def _span_pieces(self, text, spans, messages, record):
        pieces, position = [], 0
        for i, start, end in spans:
            pieces.append((text[position:start], 0.0))
            pieces.append((text[start:end], self._weight(messages, i, spans)))
            position = end
        pieces.append((text[position:], 0.0))
        return self._pieces(pieces, record)

    def _weight(self, messages, i, spans):
        if self.mask == "last_turn":
            return float(i == spans[-1][0])
        if self.mask == "per_message":
            message = messages[i]
            return float(message.get("train", True)) * float(message.get("weight", 1.0))
        return 1.0

    def _by_markers(self, messages, record):
        encoded = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tools=record.get("tools"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = np.asarray(encoded["assistant_masks"], np.float32)
        if self.mask == "last_turn":
            starts = np.flatnonzero(np.diff(mask, prepend=0.0) > 0)
            mask[: starts[-1] if len(starts) else 0] = 0.0
        tokens = np.asarray(encoded["input_ids"], np.int32)
        return Tokenised(tokens, mask, str(record.get("id", "")))

    def _pieces(self, pieces, record, bos=False, eos=False):
        """Tokens of texts side by side, each encoded alone, as the sampler sees prompt and answer."""
        tokens = self._bos() if bos else []
        mask = [0.0] * len(tokens)
        pieces = [piece for piece in pieces if piece[0]]
        for text, weight in pieces:
            ids = self._encode(text)
            tokens += ids
            mask += self._without_trailing_space(ids, weight) if not eos else [weight] * len(ids)
        if eos:
            if self.tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no EOS token; pass append_eos=False.")
            tokens.append(self.tokenizer.eos_token_id)
            mask.append(pieces[-1][1])
        elif self._encode("".join(text for text, _ in pieces)) != tokens:
            self.merged_boundaries += 1
        mask = np.asarray(mask, np.float32)
        tokens = np.asarray(tokens, np.int32)
        double = self.tokenizer.bos_token_id is not None and len(tokens) > 1
        if double and tokens[0] == tokens[1] == self.tokenizer.bos_token_id != tokens[-1]:
            tokens, mask = tokens[1:], mask[1:]
        return Tokenised(tokens, mask, str(record.get("id", "")))

    def _without_trailing_space(self, ids, weight):
        """The mask of a turn: what the template puts after its end-of-turn token does not train."""
        special = set(self.tokenizer.all_special_ids)
        last = max((i for i, token in enumerate(ids) if token in special), default=None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            return [weight] * len(ids)
        return [weight] * (last + 1) + [0.0] * (len(ids) - last - 1)

    def _render(self, messages, prompt=False) -> str:
        if not self.template:
            raise DataError(
                "the tokenizer has no chat template; use an instruct model, pass --template with "
                "the path of a Jinja template, or give records with text prompt and completion."
            )
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _bos(self) -> list[int]:
        """The BOS that the tokenizer itself would put before a text, if any."""
        bos = self.tokenizer.bos_token_id
        ids = self.tokenizer("a")["input_ids"]
        return [bos] if bos is not None and ids[:1] == [bos] else []


def render(
    records: Iterable[Record],
    renderer: Renderer,
    max_length: int,
    *,
    too_long: TooLong = "drop",
    bad: BadRecords | None = None,
) -> list[Tokenised]:
    """All records as tokens, with what cannot be used reported or counted, never in silence.

    Args:
        max_length: in tokens.
        too_long: drop and count; truncate on the right and count (the stop token is lost, so the
            model is not taught to stop there); or an error.
        bad: policy for records that cannot be rendered; also takes the counts.

    Raises:
        DataError: if nothing is left, or by the policies.
    """
    bad = BadRecords() if bad is None else bad
    result, total = [], 0
    for record in records:
        total += 1
        where = str(record.get("where", record.get("id", f"record {total - 1}")))
        try:
            parts = renderer(record)
        except DataError as error:
            bad.add(where, "template", str(error))
            continue
        for part in parts:
            part = _fit(part, max_length, too_long, bad, where)
            if part is not None and not part.loss_mask[1:].any():
                # The first token has nothing before it to be predicted from.
                bad.add(where, "no_loss_tokens", "its loss mask is all zero; nothing would train.")
            elif part is not None:
                result.append(part)
    bad.check(total)
    if not result:
        dropped = f" ({bad.summary()})" if bad.summary() else ""
        raise DataError(f"no usable record is left of {total}{dropped}; see max_length.")
    return result


def _fit(part, max_length, too_long, bad, where):
    if len(part.tokens) <= max_length:
        return part
    message = f"{len(part.tokens)} tokens, more than max_length={max_length}"
    if too_long == "error":
        raise DataError(f"{where}: {message}; raise it, or choose too_long='drop' or 'truncate'.")
    cut = part.loss_mask[:max_length]
    if too_long == "drop" or not cut[1:].any():
        bad.dropped["too_long"] += 1
        return None
    bad.dropped["truncated"] += 1
    return dataclasses.replace(part, tokens=part.tokens[:max_length], loss_mask=cut)


def explain(part: Tokenised, tokenizer: Any, *, color: bool = True) -> str:
    """The decoded record with what trains in green, or in ⟦brackets⟧ without colour."""
    begin, end = ("\033[32m", "\033[0m") if color else ("⟦", "⟧")
    text, run, trains = "", [], False
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


def _read_template(template: str | None) -> str | None:
    if template is None or "{" in template:
        return template
    named = {"chatml": CHATML, "plain": PLAIN}
    if template in named:
        return named[template]
    try:
        with open(template, encoding="utf-8") as stream:
            return stream.read()
    except OSError:
        raise DataError(
            f"template {template!r} is neither Jinja text, a file, nor one of {', '.join(named)}."
        ) from None


def render_prompts(records: Sequence[Record], renderer: Renderer) -> list[list[int]]:
    """The prompt ids of each record, for generation."""
    return [renderer.prompt(record) for record in records]
