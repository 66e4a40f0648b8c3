"""Answers as models write them against answers as data sets have them."""

import threading
import time

import numpy as np
import pytest

from jaxft.data import DataError
from jaxft.rewards import accepted_answers, same_answer, stated_answer, verifier_for
from jaxft.rewards.mathematics import same_mathematics

# answer -> (completions that give it, completions that do not)
PLAIN = {
    "Paris": (
        ["Paris.", "paris", " PARIS\n", "**Paris**", "The answer is Paris.", "Answer: Paris"]
        + ["<think>London?</think>Paris", "The answer is Paris because it is the capital."],
        ["London", "Paris and London", "I thought of Paris, but it is London.", "", "Not Paris"],
    ),
    "The Eiffel Tower": (["eiffel tower"], ["The tower"]),
    "Dr. Smith": (["The answer is Dr. Smith.", "dr. smith"], ["Dr. Jones"]),
    "12 Angry Men": (["12 angry men"], ["12"]),
    "3": (
        ["3", "3.0", "so it is 3!", "+3", "x = 3", "\\boxed{x=3}", "The answer is:\n\n$3$", "03", "6/2"]
        + ["\\boxed{2^2-1}", "3 apples", "about 3", "The answer is 3 because 4-1=3.", "\\[3\\]"],
        ["-3", "13", "3.1", "3 or 4", "It is not 3", "the ratio is 2:3", "1,2,3", "2^3", "2*3", "10 - 3"]
        + ["\\boxed{3, 4}", "\\boxed{x=4, y=3}", "x3", "3x", "The answer is not 3", "2.3", "\\sqrt3", "4/3"],
    ),
    "4": (
        ["4", "2 + 2 is 4", "1 + 3 = 4", "#### 4\nCheck: 2 + 2", "<answer>4</answer> (not 5)"],
        ["4 and 5", "2 and 4", "The answer is 3/4.", "four and 5", "\\boxed{4} or \\boxed{5}", "#### 5, not 4"],
    ),
    "1234": (
        ["The answer is 1,234.", "$1,234", "1 234", "1{,}234", "\\boxed{1{,}234}", "1\\,234", "1.234e3"],
        ["1, 234", "1,23,4", "12,34", "1,234,567", "1.234", "234"],
    ),
    "9500": ([r"\boxed{9{,}500}", "9,500", "9.5 thousand", "9500.00"], ["9,50", "9.500", "950"]),
    "1234567": (["1,234,567", "12,34,567"], ["1,234,56"]),
    "123": (["123"], ["1,2,3", "1, 2, 3"]),
    "1,2,3": (["1, 2, 3", "1,2,3", "{3,1,2}", "1, 2 and 3", "(1,2,3)"], ["123", "1,2", "1,2,4", "[1,2,3)"]),
    "15": (["between 10-15", "15"], ["-15", "\\boxed{10-15}", "15/2"]),
    "-5": ([r"the change is −5", "-5", "–5", "-$5", "$-5"], ["5", "10-5", "- 5 + 1"]),
    "-2": (["10 * 3 - 32 = -2", "−2.0"], ["2", "a-2"]),
    "0.5": (["it is .5", "1/2", "½", "0.50", "50%", r"\frac{1}{2}", r"\frac12", "5e-1"], ["0.05", "5", "0.51"]),
    "-1/2": ([r"-\frac{1}{2}", "-0.5", "−½", r"\frac{-1}{2}", r"$-\dfrac12$"], ["1/2", "-2"]),
    "3/4": (["The answer is 3/4.", "0.75", "6/8", "75%", r"\tfrac{3}{4}"], ["4", "3", "4/3", "0.7", "1 3/4"]),
    "1/3": (["0.333333", "2/6"], ["0.33", "0.3", "3"]),
    "2 1/2": (["2.5", "5/2", r"2\frac{1}{2}", "2½", "2 and 1/2"], ["21/2", "1/2", "2"]),
    "50%": (["50", "50 %", "0.5", r"50\%", "50 percent", "1/2"], ["5", "0.05", "5000", "500%", "50 kg"]),
    "10%": (["0.1", "10", "10%"], ["0.01", "1", "1000", "0.1%"]),
    "5 cm": (["5", "5cm", "50 mm", "0.05 m", r"5\text{ cm}", "5 centimeters"], ["5 m", "50", "5 kg", "5 inches"]),
    "$0.50": (["50 cents", "0.5", "$.50", r"\$0.50", "0.50 dollars"], ["50", "0.5 euros", "$50"]),
    "72 km/h": (["72", "72 km/h", "72 km per hour"], ["27"]),
    "20 students": (["20", "There are 20 students."], ["21 students"]),
    "30 degrees": ([r"30^\circ", "30°", "30", r"30^{\circ}"], ["60°", "30%"]),
    "2000000": (["2 million", "2e6", "2 x 10^6", r"2 \times 10^{6}", "2,000,000", "2×10⁶"], ["2", "2e5"]),
    "1e-9": (["0.000000001", "1 × 10^{-9}"], ["2e-9", "0"]),
    "10000000000000000": (["1e16", "10,000,000,000,000,000"], ["10000000000000001"]),
    "3.14": (["3.140", "3.14"], ["3.141593", "314", "3,14"]),
    "10-15": (["10 to 15", "between 10 and 15", "10–15", "10 - 15", "from 10 to 15"], ["15", "10", "-5", "10-16"]),
    "3:30": (["3:30"], ["30", "3:31", "3.5"]),
    "2:3": (["2:3", "The answer is 2:3."], ["3", "3:2", "2/4"]),
    "March 5, 2020": (["2020-03-05", "5 March 2020", "Mar 5th, 2020"], ["2020", "March 6, 2020", "2020-05-03"]),
    "(1,2)": (["(1, 2)", "(1,2)", r"\left(1,2\right)", r"\boxed{(1, 2)}"], ["(2,1)", "[1,2]", "{1,2}", "2", "[1,2)"]),
    "{1, 2}": (["{2,1}", r"\{1,2\}", "1, 2", "x = 1, 2"[4:]], ["{1}", "{1,2,3}", "(1,2)", "2"]),
    "[0, 1)": (["[0,1)", r"[0, \; 1)"], ["(0,1]", "[0,1]", "0, 1"]),
    "(1/2, 3)": (["(0.5, 3)", r"\left(\frac{1}{2}, 3\right)"], ["(3, 1/2)", "(1/2, 4)"]),
    "A": (
        ["A", "(A)", "A.", "A) Paris", "**A**", "option A", "The answer is (A).", "Answer: A", r"\boxed{A}"]
        + [r"\boxed{\text{A}}", "The correct option is A because B is wrong.", "a", "I choose (A)"],
        ["B", "A or B", "A dog", "(A) or (B)", "Option A is wrong.", "the answer is A or C", "(B)", "A, B"]
        + ["An apple", "The answer is not A"],
    ),
    "(C)": (["C", "C is correct", "c)"], ["D", "CC", "(B) and (C)"]),
    "yes": (["Yes", "yes, because it is.", "True", "I looked. Yes."], ["no", "yes and no", "not yes", "maybe"]),
    "No": (["no.", "No, it is not", "false", "The answer is no."], ["yes", "nobody", "not sure"]),
    "#### 42": (["reasoning 7 #### 42", "42", "#### 42\n"], ["#### 43", "42 #### 7"]),
    "6 * 7 = 42\n#### 42": (["It is 42."], ["6", "7"]),
    r"We get $\boxed{\frac{3}{4}}$ of it.": (["3/4", r"\boxed{\frac34}"], ["4"]),
    r"\text{Paris}": (["Paris"], ["London"]),
    "x=5": (["5", "x = 5", "$x=5$"], ["y=5", "x=6"]),
}  # fmt: skip
MATHEMATICS = {
    r"\frac{\sqrt{3}}{2}": ([r"\boxed{\frac{\sqrt3}{2}}", r"$\sqrt{3}/2$", "sqrt(3)/2"], [r"\sqrt{3}", "3/2"]),
    "2x+1": (["1 + 2x", r"\boxed{2x + 1}", "y = 2x+1"], ["2x-1", "2x", "x+1"]),
    r"2\pi": ([r"$2 \pi$", "2π", "2*pi", r"\pi + \pi"], ["2", "6.28", r"\pi^2"]),
    "(x+1)^2": (["x^2+2x+1", r"\boxed{(1+x)^2}"], ["x^2+1", "x^2"]),
    r"(-\infty, 2) \cup (3, \infty)": ([r"(-\infty,2)\cup(3,\infty)"], [r"(-\infty,2]\cup(3,\infty)", "2"]),
    r"\{\sqrt{2}, -\sqrt{2}\}": ([r"-\sqrt{2}, \sqrt{2}"], [r"\sqrt{2}"]),
    "x > 2": (["2 < x", r"x > 2"], ["x < 2", r"x \ge 2", "2"]),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": (
        [r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"],
        [r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"],
    ),
    "10": ([r"\boxed{\binom{5}{2}}", r"\boxed{\sqrt{100}}"], [r"\boxed{\sqrt{10}}"]),
    "abc": (["abc"], ["cab", "bca"]),
}  # fmt: skip


def failures(table):
    wrong = []
    for answer, (right, others) in table.items():
        wrong += [("no", text, answer) for text in right if not same_answer(text, answer)]
        wrong += [("wrong yes", text, answer) for text in others if same_answer(text, answer)]
    return wrong


def test_plain_answers():
    assert not failures(PLAIN)


def test_mathematics():
    pytest.importorskip("math_verify")
    assert not failures(MATHEMATICS)
