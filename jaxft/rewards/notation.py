"""Plain text from Unicode, Markdown and LaTeX notation, for the comparison of answers."""

from __future__ import annotations

import re
import unicodedata

_MONEY = "\ue000"  # replaces the dollar sign of money while those of LaTeX are removed
_CHARACTERS = str.maketrans(
    dict.fromkeys("−‒–—﹣‐‑", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\ufeff\u2061\u2062", "")
    | dict(zip("×∙⋅·✕⁄÷’‘“”，", ["*"] * 5 + ["/"] * 2 + ["'"] * 2 + ['"'] * 2 + [","], strict=True))
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B)}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_WORDS = r"\\(?:text|textbf|textit|textrm|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*"
_JOINS = re.compile(r"(?i)[\s$,\\]*(?:\\text\s*\{\s*)?(?:and|or|,)?[\s}$,\\]*")
_NUMBER = r"\s*([-+]?\d+(?:\.\d+)?)\s*"

# (pattern, replacement), in this order.
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", _MONEY),
        (r"\$\$|\\[\[\]()]", " "),
        (r"\$([^$]*)\$", r" \1 "),
        (r"\$", _MONEY),
        (r"\{,\}|,\\!\s*(?=\d{3})|(?<=\d)\\[,!](?=\d{3})", ","),
        (r"(?<=\w)_\{(\d+)\}", r"_\1"),
        (r"\\(?:left|right|displaystyle|textstyle|big|Big|bigg|Bigg)(?![A-Za-z])|(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (_WORDS + r"\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°", " degrees "),
        (r"(?<!\\)\\([%#&_])", r"\1"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        # Not before a variable: 1/2 x could be 1/(2x).
        (
            r"\\frac\s*\{"
            + _NUMBER
            + r"\}\s*\{\s*(\d+)\s*\}(?!\s*(?:\\[a-z]|[A-Za-z](?![A-Za-z])|[(^]))",
            r" \1/\2 ",
        ),
        (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\s*\\colon(?![A-Za-z])\s*|\{:\}", ":"),
        (r"(?<![A-Za-z\\])[Ii]nfinity\b|∞", r"\\infty "),
        (r"(?<=\d)\s+:\s+(?=\d)", ":"),
        (r"\\langle(?![A-Za-z])|⟨", "("),
        (r"\\rangle(?![A-Za-z])|⟩", ")"),
        (r"\\varnothing(?![A-Za-z])|∅", r"\\emptyset"),
        (r"\\[lr]brace(?![A-Za-z])|\\(?=[{}])", ""),
        (
            r"(?<=[\d)])\*\*(?=[\d(-])|(?<!\*\*)(?<![A-Za-z])([a-z])\*\*(?=\d|\([\d-])",
            r"\1^",
        ),  # Python's power, before Markdown's bold face
        (r"\\sqrt\s*\[\s*(\d+)\s*\]\s*(\w)", r"\\sqrt[\1]{\2}"),
        (r"∛\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt[3]{\1\2}"),
        (r"\{\s*([^{}\\]+?)\s*\\choose\s+([^{}\\]+?)\s*\}", r"\\binom{\1}{\2}"),
        (r"(?i)^\s*(?:the\s+)?empty\s+set\s*\.?\s*$", r"\\emptyset"),
        (r"\*\*|__|`", ""),
        (r"-\s+(?=\d+/\d)", "-"),  # the space that a replaced \frac left after its sign
    )
)


def plain(text: str) -> str:
    """The text in one notation and on one line: `$-\\frac{1}{2}$` and `−½` are both -1/2.

    Numbers, simple fractions, percent, money, degrees and words become plain; other LaTeX does not
    change.
    """
    text = "".join(
        " " + unicodedata.normalize("NFKC", c)
        if unicodedata.decomposition(c)[:10] == "<fraction>"
        else c
        for c in text
    ).translate(_CHARACTERS)
    text = re.sub(r"[₀-₉]+", lambda m: f"_{unicodedata.normalize('NFKC', m[0])}", text)
    text = re.sub(r"[⁰¹²³⁴-⁹⁻⁺]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?", _repeating, text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.replace(_MONEY, "$").replace("- 1/", "-1/")
    return re.sub(r"(?<![.\s])\s*\.$", "", " ".join(text.split()))


def _repeating(match):
    """0.1\\overline{6} as a fraction."""
    whole, first, repeated = match[1] or "0", match[2], match[3]
    scale = 10 ** len(first)
    denominator = scale * (10 ** len(repeated) - 1)
    numerator = int(whole + first + repeated) - int(whole + first)
    return f"{numerator}/{denominator}"


def boxed(text: str) -> tuple[int, str] | None:
    """(start, content) of the last \\boxed{...} or \\fbox{...}; None without one.

    Boxes with only "and", "or" or a comma between them are one answer, joined by commas.
    """
    open_braces, found = (
        [],
        [],
    )  # start of each open box, None for another brace; (begin, end, content)
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(?:(\{)|(\w))|\\.|[{}]", text):
        if match[2]:  # \boxed 5
            found.append((match.start(), match.end(), match[2]))
        elif match[1] or match[0] == "{":
            open_braces.append((match.start(), match.end()) if match[1] else None)
        elif match[0] == "}" and open_braces and (box := open_braces.pop()):
            found.append((box[0], match.end(), text[box[1] : match.start()]))
    if not found:
        return None
    begin, _, content = found.pop()
    while found and _JOINS.fullmatch(text[found[-1][1] : begin]):
        begin, _, earlier = found.pop()
        if earlier.strip() != content.strip():
            content = f"{earlier}, {content}"
    return begin, content
