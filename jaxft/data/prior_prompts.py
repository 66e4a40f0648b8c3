"""Prior prompts: instructions put before every question of reinforcement fine-tuning.

Taveekitworachai et al., 2025, arxiv.org/abs/2505.14157 (pPE): five styles, each with its own tag. The
paper's wording is not public; these texts are ours.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_FIELD = "{question}"
_SHARED = (
    "First {does}, within <{tag}> and </{tag}>. Then give the answer within <answer> and </answer>, with the "
    "final answer in \\boxed{}. Write nothing outside these tags.\n\n" + _FIELD
)


@dataclasses.dataclass(frozen=True)
class PriorPrompt:
    """A template that is put before a question, and the tag that its responses begin with.

    Args:
        name: name of the style.
        tag: the word between < and > of the part before the answer.
        template: text that ends with {question}, which must occur once.

    Raises:
        ValueError: for a template that does not end with {question} or has it twice, or a tag that is not
            a plain word.
    """

    name: str
    tag: str
    template: str

    def __post_init__(self):
        if self.template.count(_FIELD) != 1 or not self.template.endswith(_FIELD):
            raise ValueError(
                f"PriorPrompt {self.name}: the template must end with {_FIELD} and have it once, got "
                f"{self.template[-60:]!r}."
            )
        check_tag(self.tag)

    @property
    def tags(self) -> tuple[str, str]:
        """The tags of a response in their order."""
        return self.tag, "answer"

    def render(self, question: str) -> str:
        """Returns the template with the question at its end; nothing in the question is interpreted."""
        return self.template.removesuffix(_FIELD) + question

    def applied(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the record with the prior prompt before its question, the last user turn of its prompt.

        Raises:
            ValueError: if the prompt is neither text nor messages that end with the user's.
        """
        prompt = record.get("prompt")
        if isinstance(prompt, str):
            return {**record, "prompt": self.render(prompt)}
        if not isinstance(prompt, list) or not prompt or prompt[-1].get("role") != "user":
            raise ValueError(
                f"PriorPrompt {self.name}: the prompt must be text, or messages that end with the "
                f"user's; got {prompt!r:.80}."
            )
        asked = {**prompt[-1], "content": self.render(prompt[-1]["content"])}
        return {**record, "prompt": [*prompt[:-1], asked]}


def check_tag(tag: str) -> None:
    """Raises ValueError unless the tag is a plain word: letters, digits and _, a letter first."""
    if not re.fullmatch(r"[A-Za-z]\w*", tag):
        raise ValueError(f"a tag must be a plain word such as think, got {tag!r}.")


def _prior(name, does):
    return PriorPrompt(name, name, _SHARED.replace("{does}", does).replace("{tag}", name))


THINK = _prior("think", "reason step by step")
PLAN = _prior("plan", "make a plan and then carry it out")
CODE = _prior("code", "write code that solves the problem, as a means of reasoning")
KNOWLEDGE = _prior("knowledge", "recall the facts, definitions and formulas that matter")
EXAMPLES = _prior("examples", "give solved examples of similar questions")
PRIOR_PROMPTS = (THINK, PLAN, CODE, KNOWLEDGE, EXAMPLES)
