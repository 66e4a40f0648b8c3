"""Plain text from Unicode, Markdown and LaTeX notation, for the comparison of answers."""

from __future__ import annotations

import re
import unicodedata

_MONEY = "\ue000"  # stands for a dollar sign of money while those of LaTeX are removed
_CHARACTERS = str.maketrans(
    dict.fromkeys("−‒–—﹣‐‑", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\ufeff\u2061\u2062", "")
    | dict(zip("×∙⋅·✕⁄÷’‘“”，", ["*"] * 5 + ["/"] * 2 + ["'"] * 2 + ['"'] * 2 + [","], strict=True))
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF10, 0xFF5B)}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_WORDS = r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*"
_NUMBER = r"\s*([-+]?\d+(?:\.\d+)?)\s*"

# (pattern, replacement), in this order.
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$", _MONEY),
        (r"\$\$|\\[\[\]()]", " "),
        (r"\$([^$]*)\$", r" \1 "),
        (r"\$", _MONEY),
        (r"\{,\}|(?<=\d)\\[,!](?=\d{3})", ","),
        (r"\\(?:left|right|displaystyle|textstyle|big|Big|bigg|Bigg)(?![A-Za-z])|\\!", ""),
        (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
        (_WORDS + r"\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°", " degrees "),
        (r"\\([%#&_])", r"\1"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{" + _NUMBER + r"\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
        (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\[lr]brace(?![A-Za-z])|\\(?=[{}])", ""),
        (r"(?<=[\d)])\*\*(?=[\d(-])", "^"),  # Python's power, before Markdown's bold face
        (r"\*\*|__|`", ""),
        (r"-\s+(?=\d+/\d)", "-"),  # what a replaced \frac left behind its sign
    )
)


def plain(text: str) -> str:
    """The text in one notation and on one line: `$-\\frac{1}{2}$` and `−½` are both -1/2.

    Numbers, simple fractions, percent, money, degrees and words become plain; other LaTeX stays as it is.
    """
    text = "".join(
        " " + unicodedata.normalize("NFKC", c) if unicodedata.decomposition(c)[:10] == "<fraction>" else c
        for c in text
    ).translate(_CHARACTERS)
    text = re.sub(r"[⁰¹²³⁴-⁹⁻⁺]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.replace(_MONEY, "$").replace("- 1/", "-1/")
    return " ".join(text.split())


def boxed(text: str) -> tuple[int, str] | None:
    """(where it begins, content) of the last \\boxed{...} or \\fbox{...}, braces nested; None without one.

    Boxes with nothing but "and", "or" or a comma between them are one answer, their contents joined by commas.
    """
    found = []  # (begin, end, content)
    for match in re.finditer(r"\\(?:boxed|fbox)\s*(?:\{|(\w))", text):
        if match[1] is not None:  # \boxed 5
            found.append((match.start(), match.end(), match[1]))
            continue
        depth, place = 1, match.end()
        while place < len(text) and depth:
            escaped = text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if not depth:
            found.append((match.start(), place, text[match.end() : place - 1]))
    if not found:
        return None
    begin, _, content = found.pop()
    while found and re.fullmatch(r"(?i)[\s$,\\]*(?:and|or|,)?[\s$,\\]*", text[found[-1][1] : begin]):
        begin, _, earlier = found.pop()
        if earlier.strip() != content.strip():
            content = f"{earlier}, {content}"
    return begin, content
