"""Prior prompts: the question is at their end, unchanged, in text, messages and a chat template."""

import pytest

from jaxft.data import Renderer, render_prompts
from jaxft.data.prior_prompts import PRIOR_PROMPTS, THINK, PriorPrompt

QUESTIONS = ["What is 1 + 1?", "{question} {0} %s %d {{x}}", "\\boxed{2} </think>", "a\n\nb"]


@pytest.mark.parametrize("prior", PRIOR_PROMPTS, ids=lambda prior: prior.name)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_question_is_at_the_end_unchanged(prior, question):
    text = prior.render(question)
    assert text.endswith("\n\n" + question)
    instruction = text.removesuffix(question)
    assert f"<{prior.tag}>" in instruction and "</answer>" in instruction
    assert "{" not in instruction.replace("\\boxed{}", "")
    assert prior.applied({"prompt": question, "answer": "2"}) == {"prompt": text, "answer": "2"}


def test_five_styles_differ_by_name_and_tag():
    assert [prior.name for prior in PRIOR_PROMPTS] == "think plan code knowledge examples".split()
    assert len({prior.render("") for prior in PRIOR_PROMPTS}) == 5
    assert THINK.tags == ("think", "answer")


def test_only_the_last_user_turn_changes(small_tokenizer):
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"}
    record = {"prompt": [system, user], "answer": "2"}
    made = THINK.applied(record)
    assert made["prompt"] == [system, user | {"content": THINK.render("1 + 1?")}]
    assert record["prompt"][1] is user and user["content"] == "1 + 1?"
    renderer = Renderer(small_tokenizer)
    (ids,) = render_prompts([made], renderer)
    assert small_tokenizer.decode(ids).count(THINK.render("1 + 1?")) == 1


@pytest.mark.parametrize(
    "given", [("x", "x", "no field"), ("x", "x", "{question} first"), ("x", "a b", "{question}"),
              ("x", "x", "{question}{question}")],
)  # fmt: skip
def test_bad_templates_and_tags_are_refused(given):
    with pytest.raises(ValueError, match="template must end|plain word"):
        PriorPrompt(*given)


@pytest.mark.parametrize("prompt", [None, [], [{"role": "assistant", "content": "x"}], 3])
def test_a_prompt_without_a_user_s_turn_is_refused(prompt):
    with pytest.raises(ValueError, match="end with the user's"):
        THINK.applied({"prompt": prompt})
