"""Pairs of answers with the verdict that holds here, and the parts that read them."""

import itertools
import pathlib
import re

import pytest

from jaxft.rewards import same_answer
from jaxft.rewards.numerals import with_digits
from jaxft.rewards.units import read_unit

# "# kind", then lines "reference == right | right <> wrong | wrong". Written after math-verify's tests,
# the rules of OpenAI's PRM800K grader, Qwen2.5-Math's math_equal (after DeepSeek-Math's), and lm-eval's
# Minerva, Hendrycks, GSM8K and DROP, and inputs that were wrong here. docs/rewards.md says what holds where
# graders disagree.
TABLE = pathlib.Path(__file__).with_name("answers.txt").read_text()
FORMS = "{}", r"\boxed{{{}}}", "The answer is ${}$."  # which an answer takes in turn


def pairs():
    kind = None
    for line in TABLE.splitlines():
        if line.startswith("# "):
            kind = line[2:]
            continue
        reference, *rest = re.split(r" (==|<>) ", line)
        for sign, answers in zip(rest[::2], rest[1::2], strict=True):
            yield from ((kind, text, reference, sign == "==") for text in answers.split(" | "))


@pytest.mark.parametrize(
    "kind, rows", [(kind, [*rows]) for kind, rows in itertools.groupby(pairs(), lambda row: row[0])]
)
def test_verdicts(kind, rows):
    wrong = []
    for i, (_, text, reference, right) in enumerate(rows):
        form = "{}" if kind == "completions" else FORMS[i % 3]
        if same_answer(form.format(text), reference) is not right:
            wrong.append((form.format(text), reference, "wrong no" if right else "wrong yes"))
    assert not wrong


def test_units_are_read_as_far_as_they_go():
    table = {
        "km/h": ("length time^-1", "5/18", 4),
        "miles per hour": ("length time^-1", "1397/3125", 14),
        "m s^{-1}": ("length time^-1", "1", 8),
        "square feet": ("length^2", "145161/1562500", 11),
        "cm^2 wide": ("length^2", "1/10000", 4),
        "dollars per apple": ("$ apple^-1", "1", 17),
        "in": ("length", "127/5000", 2),
        "degrees Celsius": ("°C", "1", 15),
    }
    for text, (dimension, factor, length) in table.items():
        unit, taken = read_unit(text)
        assert (unit.dimension, str(unit.factor), taken) == (dimension, factor, length), text
    assert read_unit("in total") == read_unit("apples") == (None, 0)


def test_numbers_in_words():
    table = {
        "one hundred and five": "105",
        "two thousand three hundred": "2300",
        "one million two hundred thousand and one": "1200001",
        "minus twenty-one": "-21",
        "three-quarters": "3/4",
        "two and a half hours": "2 1/2 hours",
        "a dozen": "12",
        "five apples": "5 apples",
    }
    same = (
        "one two",
        "twenty twenty",
        "Seven Samurai",
        "one of them",
        "tension",
        "third",
        "a",
        "hundred",
    )
    assert {text: with_digits(text) for text in table} == table
    assert [with_digits(text) for text in same] == list(same)


def test_long_and_deep_texts_are_compared_in_time():
    assert not same_answer("9" * 20_000, "5")
    nested = lambda last: "(1," * 300 + last + ")" * 300
    assert not same_answer(nested("2"), nested("3"))


def test_a_fence_around_the_whole_completion_is_no_part_of_it():
    code = "def f(x):\n    return x"
    assert same_answer(f"```python\n{code}\n```", code)
    assert same_answer('Here it is:\n```json\n{"answer": 72}\n```', "72")
    assert not same_answer("```python\ndef f(x):\n    return 2\n```", code)
