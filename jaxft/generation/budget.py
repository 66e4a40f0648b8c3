"""The compute of inference: tokens that a policy and a verifier process, and their FLOPs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Budget:
    """Counts of one search; they add.

    A token of a prompt or prefix is processed once: those that the search has processed or generated
    before are in a prefix cache.
    """

    prompt: int = 0  # tokens of prompts and prefixes that the policy processes
    cached: int = 0  # those that its prefix cache holds
    generated: int = 0  # tokens that the policy samples
    verified: int = 0  # tokens that the verifier processes, each once too
    attended: int = 0  # Σ over the policy's processed tokens of the tokens that each attends to
    verified_attended: int = 0  # the same of the verifier
    passes: int = 0  # forward passes that wait for one another
    seconds: float = 0.0  # wall seconds in which the search waited for models

    def __add__(self, other: Budget) -> Budget:
        """Returns the sum of each count."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Budget(*(a + b for a, b in pairs))


class Cost(NamedTuple):
    """Sizes of a model that determine the cost of a token."""

    params: int  # number of parameters
    attention: int = 0  # number of layers times the width; 0 leaves attention scores and values out


def flops(budget: Budget, policy: Cost, verifier: Cost = Cost(0)) -> float:  # noqa: B008 (a tuple)
    """2 N a processed token and 4 layers width a pair of tokens in attention, of policy and verifier.

    N is the number of parameters: Kaplan et al., 2020, arxiv.org/abs/2001.08361, table 1.
    """
    tokens = budget.prompt + budget.generated
    own = 2 * policy.params * tokens + 4 * policy.attention * budget.attended
    other = 2 * verifier.params * budget.verified
    return float(own + other + 4 * verifier.attention * budget.verified_attended)


def attended(start: int, end: int) -> int:
    """Number of pairs (token, token it attends to, itself included) of the tokens start..end - 1."""
    return (end * (end + 1) - start * (start + 1)) // 2
