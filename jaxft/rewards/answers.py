"""Which answer a completion states, and whether it is the wanted one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from jaxft.data import DataError
from jaxft.rewards import quantities
from jaxft.rewards.mathematics import is_mathematics, same_mathematics
from jaxft.rewards.notation import boxed, plain

_MARKER = re.compile(
    r"(?i)####|\b(?:answer|(?:correct|right|best)\s+(?:option|choice))\b"
    r"(?:[^.:=\n]{0,40}?\b(?:is|are|was|equals)\b\s*:?|[*_\s]*[:=])"
)
LONGEST = 2000  # characters beyond which a text is an answer only if it equals the wanted one
_REASON = re.compile(r"(?i),?\s+(?:because|since|as|which|so that|where)\b.*|\s+\((?!\d).*")
_POLAR = {"yes": True, "true": True, "no": False, "false": False}
_MENTION = re.compile(
    r"\b(?:[Oo]ption|[Cc]hoice|OPTION|CHOICE)\s+\(?([A-J])\b|\(([A-J])\)"
    r"|\b([A-J]) is (?:the )?(?:correct|right|best)"
)
_DENIED = re.compile(r"(?i)\bnot\b|n't\b|\bwrong\b|\bincorrect\b|\bfalse\b|\bexcept\b|\brather\b")


def same_answer(completion: str, answer: Any) -> bool:
    """Whether the completion's answer is the wanted one, or one of a list of accepted ones.

    The completion's answer is what it states last, by \\boxed{}, "####", "the answer is", "Answer:" or
    <answer> tags; otherwise the whole text or, where a number is wanted, the last number in it (GSM8K). A
    text that merely contains the answer is wrong, and so is one that offers two. A reference solution with
    "####" or \\boxed{} counts as the answer that it states. Compared are, in this order:

    - texts, without case, outer marks, articles and Markdown; dates in any order of their parts;
    - choices: "(B)", "B.", "**B**", "option B" for B; yes and true, no and false;
    - numbers and units (`quantities.same_quantity` says how percent and decimals count), ranges;
    - sets and lists in any order, tuples and intervals by their brackets;
    - mathematics, by math-verify (`mathematics.same_mathematics`).

    Raises:
        DataError: for an answer that is null, empty or no text, number or list of them.
    """
    return any(_states(completion, wanted) for wanted in accepted_answers(answer))


def needs_mathematics(answer: str) -> bool:
    """Whether comparing with the answer takes more than numbers, words and lists of them."""
    if answer.isdigit() or answer.isalpha():  # Thousands of answers are asked at once.
        return False
    gold = plain(reference_answer(answer))
    return is_mathematics(gold) and not any(read(gold) for read, _ in _KINDS[:3])


def accepted_answers(answer: Any) -> list[str]:
    """The answers, any of which is right: of a list its items; numbers and truth values as text.

    Raises:
        DataError: if there is none, or one is null, empty, or no text, number or truth value.
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
    """What the text states as its answer, on one line and without a final stop; None if it states none.

    The last of \\boxed{...}, "####", "the answer is", "Answer:" and <answer>...</answer> counts.
    """
    found = _stated(text)
    return (found[0].strip().rstrip(".") or None) if found else None


def _stated(text):
    """(the stated answer, whether it is the answer alone), or None."""
    text = text.rpartition("</think>")[2]
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


def reference_answer(answer):
    """The answer that a reference solution with "####" or \\boxed{} states, or the answer as it is."""
    found = _stated(answer) if "####" in answer or "\\boxed" in answer else None
    return found[0] if found else answer.strip()


def _states(completion, wanted):
    wanted = reference_answer(wanted)
    found = _stated(completion)
    text, alone = found if found else (completion.rpartition("</think>")[2].strip(), False)
    candidates = [text] if alone else _clauses(text)
    if any(same_value(candidate, wanted) for candidate in candidates):
        return True
    gold = plain(wanted)
    if letter := re.fullmatch(r"\(?([A-Ja-j])\)?[.:]?|\(([A-J])\)\s.+", gold):
        return _choice(plain(text), bool(found)) == (letter[1] or letter[2]).upper()
    if gold.casefold().rstrip(".") in _POLAR:
        return _polar(plain(text), bool(found)) is _POLAR[gold.casefold().rstrip(".")]
    number = None if alone else quantities.read_number(gold)
    if number is None or _offers_several(candidates[-1] if found else text):
        return False
    last = quantities.last_number(plain(candidates[-1] if found else text))
    return last is not None and quantities.same_quantity(last, number)


def _clauses(text):
    """The text, its first sentence, and that without its reason."""
    sentence = re.split(r"(?<=[^\d.][.!?])\s|(?<=\d[.!?])\s+(?=[A-Z*])|\n", text.strip())[0]
    bare = _REASON.sub("", sentence)
    return list(dict.fromkeys(part for part in (text, sentence, bare) if part.strip()))


def _offers_several(text):
    """Whether a text is nothing but a list of numbers, or of anything in brackets."""
    items = _items(plain(text)) if len(text) < LONGEST else None
    return bool(items) and (items[0] != "" or all(map(quantities.read_number, items[2])))


def same_value(found: str, wanted: str) -> bool:
    """Whether two texts, each an answer and nothing else, are the same answer; see `same_answer`."""
    given, gold = plain(found), plain(wanted)
    if found.strip() == wanted.strip() or _key(given) == _key(gold):
        return bool(_key(gold) or found.strip() == wanted.strip())
    if not given or not gold:
        return False
    if max(len(given), len(gold)) > LONGEST:
        return False
    given, gold = _without_name(given, gold)
    for read, same in _KINDS:
        value = read(gold)
        if value is not None:
            other = read(given)
            if other is not None:
                return same(other, value)
    exact = quantities.arithmetic(given)
    number = quantities.read_number(gold)
    if exact is not None and number is not None and not quantities.read_range(given):
        return quantities.same_quantity(quantities.Quantity(exact, True, None), number)
    if "=" in given and "=" not in gold:
        return False
    if is_mathematics(given) or is_mathematics(gold):
        return _brackets_agree(given, gold) and same_mathematics(_latex(given), _latex(gold))
    return False


def _key(text):
    """The text for comparison of words."""
    text = text.casefold().strip(" .!?\"'`*_;:,")
    if (
        not re.search(r"\d", text)
        and re.fullmatch(r"[\w\s.,'\"!?;:&-]+", text)
        and re.search(r"[^\W_]{3}", text)
    ):
        text = re.sub(r"[.,'\"!?;:]", "", text.replace("-", " "))  # as SQuAD's graders do
        text = re.sub(r"^(?:the|an?) ", "", text)
    return " ".join(text.split())


def _without_name(given, gold):
    """Both without "x =", where one of them alone has it, or both have the same."""
    name = r"(?:[A-Za-z](?:_\w+)?|[A-Za-z]\([A-Za-z]\))\s*(?:=|\\in(?![A-Za-z]))\s*"
    one, other = re.match(name, given), re.match(name, gold)
    if one and other:
        same = one[0].replace(" ", "") == other[0].replace(" ", "")
        return (given[one.end() :], gold[other.end() :]) if same else (given, gold)
    if other and "=" not in given and "," not in gold:
        gold = gold[other.end() :]
    first, equals, _ = given.partition("=")
    variables = re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", first)  # 3x + 2y = 7 is no 7
    named = re.search(r"(?:^|\s)[A-Za-z](?:_\w+)?(?:\([A-Za-z]\))?\s*$", first)
    if equals and "=" not in gold and not _items(given) and (named or not variables):
        if not re.search(r"[<>!]=|\\n?eq", given):
            given = given.rpartition("=")[2].strip()
    return given, gold


def _items(text) -> tuple[str, str, list[str]] | None:
    """(opening, closing, items) of a set, tuple, interval or list of two items or more, or a set."""
    opening = closing = ""
    if text[:1] in "([{" and text[-1:] in ")]}" and _is_enclosed(text):
        opening, closing, text = text[0], text[-1], text[1:-1].strip()
    elif re.search(r"\w\s*\(", text):
        return None
    spaced = re.search(r",\s", text) and not opening == "("
    parts, depth = [""], 0
    for i, c in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(c, 0)
        if c in ",;" and depth == 0 and (not spaced or text[i + 1 : i + 2].isspace() or c == ";"):
            parts.append("")
        else:
            parts[-1] += c
    parts = [
        x
        for part in parts
        for x in re.split(r"(?i)^(?:and|or)\s+|\s+(?:and|or)\s+", part.strip())
        if x.strip()
    ]
    if len(parts) < 2 and (opening, closing) != ("{", "}"):
        return None
    if not opening and not all(len(part) <= 30 and len(part.split()) <= 3 for part in parts):
        return None  # prose
    return opening, closing, [part.strip() for part in parts]


def _is_enclosed(text):
    """Whether the first bracket closes at the end, by a bracket of any shape."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def _same_items(given, gold):
    (*ends, items), (*wanted_ends, wanted) = given, gold
    ordered = wanted_ends[0] in tuple("([") if wanted_ends[0] else ends[0] in tuple("([")
    if ends[0] and wanted_ends[0] and ends != wanted_ends:
        return False
    if (
        ends[0] != wanted_ends[0]
        and "[" in ends[0] + wanted_ends[0]
        and ends[1] + wanted_ends[1] != "]"
    ):
        return False
    if len(items) != len(wanted):
        return False
    if ordered:
        return all(map(same_value, items, wanted))
    left = list(items)
    for one in wanted:
        match = next((x for x in left if same_value(x, one)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_range(given, gold):
    return all(map(quantities.same_quantity, given, gold))


# (how a kind is read, None for another kind; how two of it are compared)
_KINDS: tuple[tuple[Callable, Callable], ...] = (
    (quantities.read_number, quantities.same_quantity),
    (quantities.read_date, lambda given, gold: given == gold),
    (quantities.read_range, _same_range),
    (_items, _same_items),
)


def _brackets_agree(given, gold):
    """False for (1, 2) beside {1, 2}: math-verify takes a tuple for an open interval, and that for a set."""
    ends = [text[:1] + text[-1:] for text in (given, gold)]
    return not any({a, b} == {"()", "{}"} for a, b in [ends] if "," in given + gold)


def _latex(text):
    """Plain notation as LaTeX, where they differ."""
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\w+)", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])|π", r"\\pi ", text)
    text = (
        text.replace("∞", r"\infty ")
        .replace("∪", r"\cup ")
        .replace("≤", r"\le ")
        .replace("≥", r"\ge ")
    )
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp)(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"<=", r"\\le ", re.sub(r">=", r"\\ge ", text))
    if text.startswith("{") and text.endswith("}"):
        text = rf"\{{{text[1:-1]}\}}"
    return text.replace("*", r"\cdot ").replace("%", r"\%")


def _choice(text, stated):
    """The letter that a text chooses, or None."""
    letter = re.match(
        r"\W*(?:(?:option|choice|answer)\s+)?\(?([A-J])\b(?=\W*$|[).:,*]|\s+(?:because|since|as|is|\())",
        text,
        0 if not stated else re.IGNORECASE if len(text.strip("()*. ")) == 1 else 0,
    ) or re.fullmatch(r"\W*(?:[Oo]ption\s+)?\(?([a-j])\W*", text)
    if letter:
        if re.match(r"\W*(?:or|and|/|&)\W*(?:[Oo]ption\s+)?\(?[A-Ja-j]\b", text[letter.end(1) :]):
            return None
        return (
            None if re.match(r"\)?\s*,\s*\(?[A-J]\b", text[letter.end(1) :]) else letter[1].upper()
        )
    found = {next(filter(None, groups)) for groups in _MENTION.findall(text)}
    return found.pop() if len(found) == 1 and not _DENIED.search(text) else None


def _polar(text, stated):
    """True or False of a yes or a no at the beginning, or alone at the end; None for neither or both."""
    words = re.split(r"(?<=[.!?:])\s+", text.casefold())
    first = re.match(
        r"\W*(\w+)\b(?=\W*$|[,.;:!*]|\s+(?:because|it|they|he|she|this|that|we|i)\b)", words[0]
    )
    last = re.fullmatch(r"\W*(?:so|therefore|thus|hence)?,?\s*(\w+)\W*", words[-1])
    said = {_POLAR[m[1]] for m in (first, None if stated else last) if m and m[1] in _POLAR}
    return said.pop() if len(said) == 1 else None
