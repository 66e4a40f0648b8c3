"""Finds the answer that a completion states, and compares it with the wanted one."""

from __future__ import annotations

import ast
import json
import math
import re
from typing import Any

from jaxft.data import DataError
from jaxft.rewards import choices, quantities
from jaxft.rewards.comparison import LONGEST, is_expression, read_items, same_value
from jaxft.rewards.notation import boxed, plain

_MARKER = re.compile(
    r"(?i)####|\b(?:answer|(?:correct|right|best)\s+(?:option|choice))s?\b"
    r"(?:[^.:=\n]{0,40}?\b(?:is|are|was|equals|(?:must|should|would|will|has\s+to)\s+be)\b\s*:?|[*_\s]*[:=])"
)
_CORRECTED = re.compile(  # "not B, it is C", "not B but rather C"
    r"(?i)^not\s+[^\n]{1,40}?\s*(?:[,;.:-]\s*)?\b(?:but|it\s+is|it's|rather|instead)\b\s*"
    r"(?:(?:rather|instead|it\s+is|it's|is)\b\s*)*:?\s*(?=\S)"
)
_CONTRASTED = re.compile(  # "C, not B", "C rather than B"
    r"(?i)^(.{1,60}?)(?:(?:\s*[,(;]|\s+and)\s*(?:and\s+)?\bnot|\s*[,(;]?\s*\b(?:rather than|instead of))\s.*$"
)
_REASON = re.compile(
    r"(?i),?\s+(?:because|since|as|which|so that|where)\b.*|\s+\((?!\d).*|(?<=[a-z])\s+\([\d\s.,+*/×÷=$%-]+\)"
)
_SUBJECT = re.compile(  # "It is Friday", "The solutions are x = 1 and x = 2"
    r"(?i)^(?:it(?:'s|\s+is|\s+was)|(?:that|this)(?:'s|\s+is)|the\s+(?:solutions?|roots?|zeros?|statement|claim)\s+"
    r"(?:is|are):?)\s+"
)
_FENCED = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)
_INSIDE = r"(?:[^{}]|\{[^{}]*\})*"
_OBJECT = re.compile(rf"""\{{{_INSIDE}["'](?:final_?)?answer["']\s*:{_INSIDE}\}}""", re.IGNORECASE)


def same_answer(completion: str, answer: Any) -> bool:
    """True if the completion's answer is the wanted one, or one of a list of accepted ones.

    The completion's answer is the last one stated with \\boxed{}, "####", "the answer is",
    "Answer:" or <answer> tags; otherwise the whole text or, if a number is wanted, the last number
    in it (GSM8K). A text that merely contains the answer is wrong, as is one that offers two. A
    reference solution with "####" or \\boxed{} counts as the answer that it states. The comparison
    tries, in this order:

    - texts, without case, outer marks, articles and Markdown;
    - choices: "(B)", "B.", "**B**", "option B" for B, "A, C" for AC; yes and true, no and false;
    - numbers, in words too, with units (`quantities.same_quantity` says how percent and decimals count);
    - dates in any order of their parts, times of day, ranges;
    - intervals and inequalities; sets and lists in any order, tuples by brackets, values by names;
    - mathematics, by math-verify (`mathematics.same_mathematics`).

    docs/rewards.md lists where public graders disagree, and the rule used here.

    Raises:
        DataError: for an answer that is null, empty, or not a text, a number or a list of them.
    """
    return any(_states(completion, wanted) for wanted in accepted_answers(answer))


def needs_mathematics(answer: str) -> bool:
    """True if comparing with the answer takes more than numbers, words and lists of them."""
    if answer.isdigit() or answer.isalpha():  # Fast: thousands of answers are checked at once.
        return False
    return is_expression(plain(reference_answer(answer)))


def accepted_answers(answer: Any) -> list[str]:
    """The accepted answers: the items of a list; numbers and truth values as text.

    Raises:
        DataError: if there is none, or one is null, empty, or not a text, number or truth value.
    """
    answers = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    answers = [x.item() if hasattr(x, "item") else x for x in answers]  # of NumPy
    for one in answers:
        if isinstance(one, str):
            fine = bool(one.strip())
        else:
            fine = isinstance(one, (bool, int)) or (isinstance(one, float) and math.isfinite(one))
        if not fine:
            raise DataError(
                f"the answer {answer!r} cannot be compared; expected a text, a number, or a list of accepted "
                "ones, none of them null or empty."
            )
    if not answers:
        raise DataError("the answer is an empty list; expected at least one accepted answer.")
    return [str(one) for one in answers]


def stated_answer(text: str) -> str | None:
    """The answer that the text states, on one line and without a final stop; None if it states none.

    The last of \\boxed{...}, "####", "the answer is", "Answer:" and <answer>...</answer> counts.
    """
    found = _stated(text)
    return (found[0].strip().rstrip(".") or None) if found else None


def _stated(text):
    """(the stated answer, whether it is only the answer), or None."""
    text = text.rpartition("</think>")[2]
    if (value := _object_answer(text)) is not None:
        return _stated(value) or (value, True)
    before, tag, _ = text.rpartition("</answer>")
    if tag and "<answer>" in before:
        inside = before.rpartition("<answer>")[2]
        return _stated(inside) or (inside.strip(), True)
    box, markers = boxed(text), list(_MARKER.finditer(text))
    if box and (
        not markers or box[0] > markers[-1].start() or not text[markers[-1].end() :].strip()
    ):
        return box[1].strip(), True
    if not markers:
        return None
    rest = text[markers[-1].end() :].lstrip(" \t\r\n:*_>")
    line = rest.partition("\n")[0].strip()
    if line in ("$$", "\\[", "["):  # displayed mathematics
        line = rest.partition("\n")[2].strip().partition("\n")[0].strip()
    return (line, False) if line else None


def _object_answer(text):
    """The value of "answer" in the last JSON object (or Python dict) of the text; None without one."""
    found = _OBJECT.findall(text)
    for read in (json.loads, ast.literal_eval) if found else ():
        try:
            values = {str(k).lower().replace("_", ""): v for k, v in read(found[-1]).items()}
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        value = values.get("finalanswer", values.get("answer"))
        if isinstance(value, list) and value:
            value = ", ".join(map(str, value))
        return None if value is None or isinstance(value, (dict, list)) else str(value).strip()
    return None


def reference_answer(answer):
    """The answer that a reference solution with "####" or \\boxed{} states, or the answer unchanged."""
    found = _stated(answer) if "####" in answer or "\\boxed" in answer else None
    return found[0] if found else answer.strip()


def _states(completion, wanted):
    wanted = reference_answer(wanted)
    if completion.strip() == wanted:  # also an object with "answer" that is wanted as a whole
        return True
    fenced = _FENCED.fullmatch(completion.strip())
    completion = fenced[1] if fenced else completion
    found = _stated(completion)
    text, alone = found if found else (completion.rpartition("</think>")[2].strip(), False)
    whole, text = text, text if alone else _affirmed(text)
    candidates = [text] if alone else [whole, *_clauses(text)]
    if any(same_value(candidate, wanted) for candidate in candidates):
        return True
    gold = plain(wanted)
    option = choices.labelled(gold)
    if option or (letter := re.fullmatch(r"\(?([A-Ja-j])\)?[.:]?", gold)):
        given = choices.labelled(plain(candidates[-1]))
        if option and given and not plain(given[1]).casefold().startswith(option[1].casefold()):
            return False
        chosen = choices.read_choice(plain(text), bool(found))
        return chosen == (option[0] if option else letter[1].upper())
    if (polar := choices.POLAR.get(gold.casefold().rstrip("."))) is not None:
        return choices.read_polar(plain(text), bool(found)) is polar
    number = None if alone else quantities.read_number(gold)
    if number is None or _offers_several(candidates[-1] if found else text):
        return False
    last = quantities.last_number(plain(candidates[-1] if found else text))
    return last is not None and quantities.same_quantity(last, number)


def _affirmed(text):
    """The text without what it denies: C for "not B, it is C" and for "C, not B"."""
    text = _CORRECTED.sub("", text.strip())
    return _CONTRASTED.sub(r"\1", text) if "\n" not in text else text


def _clauses(text):
    """The text, its first sentence, and the first sentence without its reason."""
    sentence = re.split(r"(?<=[^\d.][.!?])\s|(?<=\d[.!?])\s+(?=[A-Z*])|\n", text.strip())[0]
    if sentence.endswith("?") and sentence != text.strip():  # "B? No, C."
        return [text]
    bare = _REASON.sub("", sentence)
    parts = (text, sentence, _SUBJECT.sub("", bare), bare)
    return list(dict.fromkeys(part for part in parts if part.strip()))


def _offers_several(text):
    """True if a text is only a range or a list of numbers, or of anything in brackets."""
    if text[:1].isdigit() and quantities.read_range(plain(text)):
        return True
    items = read_items(plain(text)) if len(text) < LONGEST else None
    return bool(items) and (items[0] != "" or all(map(quantities.read_number, items[2])))
