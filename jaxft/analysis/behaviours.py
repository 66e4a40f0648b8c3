"""Behaviours of responses by rules, and distances between distributions of them.

The nine of Taveekitworachai et al., 2025, arxiv.org/abs/2505.14157: four cognitive behaviours (Gandhi et al.,
2025, arxiv.org/abs/2503.01307) and five that prior prompts ask for. The paper asks a language model; these
rules are ours, and any function from a text to {behaviour: bool} can replace them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_ANY = lambda *patterns: re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE)
_RULES: Mapping[str, re.Pattern[str]] = {
    "verification": _ANY(
        r"\b(?:double[- ]|re-?)?check(?:s|ed|ing)?\b", r"\bverif(?:y|ies|ied|ication)\b",
        r"\b(?:plug|substitut)\w*\b[^.\n]{0,40}\bback\b",
    ),
    "backtracking": _ANY(
        r"\bwait\b", r"\btry (?:again|another|a different)\b", r"\bmistake\b", r"\bstart over\b",
        r"\b(?:this|that) (?:is wrong|does(?:n't| not) work)\b",
    ),
    "subgoal setting": _ANY(
        r"^\s*step \d", r"^\s*\d+[.)]\s+[A-Za-z]", r"\bfirst\b[^\n]{0,200}\b(?:then|next|second)\b",
    ),
    "backward chaining": _ANY(
        r"\bwork(?:ing)? backwards?\b", r"\bto (?:get|obtain|reach)\b[^.\n]{1,40}\bwe (?:need|must)\b",
    ),
    "reasoning": _ANY(
        r"<think>", r"\b(?:therefore|because|hence|thus|so that|it follows)\b", r"\bsince\b",
    ),
    "planning": _ANY(r"<plan>", r"\b(?:the|my|our|a) plan\b", r"\bwe will (?:first|start)\b"),
    "code use": _ANY(
        r"<code>", r"```", r"^\s*(?:def \w+\(|import \w+|return\b|for \w+ in\b)",
        r"^\s*[a-z_]\w* = [^=\n]*[a-z_]\w*\(", r"\bprint\(",
    ),
    "knowledge recall": _ANY(
        r"<knowledge>", r"\b(?:recall|by definition|is defined as|the formula for|known (?:fact|as))\b",
        r"\btheorem\b",
    ),
    "example use": _ANY(r"<examples?>", r"\b(?:for example|for instance|example \d|e\.g\.)"),
}  # fmt: skip
BEHAVIOURS = tuple(_RULES)


def classify(response: str) -> dict[str, bool]:
    """Returns which of BEHAVIOURS the response shows; several may be true."""
    return {name: bool(rule.search(response)) for name, rule in _RULES.items()}


def behaviour_rates(
    responses: Sequence[str], judge: Callable[[str], Mapping[str, bool]] = classify
) -> dict[str, float]:
    """Returns the fraction of responses that show each behaviour.

    Raises:
        ValueError: for no responses.
    """
    if not responses:
        raise ValueError("behaviour_rates: needs at least one response.")
    found = [judge(response) for response in responses]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def js_divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """Returns the Jensen-Shannon divergence of two distributions, 0 to log 2 nats.

    ½ KL(p || m) + ½ KL(q || m) with m = (p + q) / 2: Lin, 1991.

    Raises:
        ValueError: for distributions of different sizes, with negative parts, or that do not sum to 1.
    """
    p, q = np.asarray(p, float), np.asarray(q, float)
    if p.shape != q.shape or p.ndim != 1:
        raise ValueError(
            f"js_divergence: needs two vectors of one size, got {p.shape} and {q.shape}."
        )
    for x in (p, q):
        if (x < 0).any() or abs(x.sum() - 1) > 1e-6:
            raise ValueError(f"js_divergence: parts must be at least 0 and sum to 1, got {x}.")
    middle = (p + q) / 2
    part = lambda x: np.sum(x[x > 0] * np.log(x[x > 0] / middle[x > 0]))
    return float(part(p) / 2 + part(q) / 2)
