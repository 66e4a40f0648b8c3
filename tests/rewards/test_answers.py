"""Answers as models write them against answers as data sets have them."""

from concurrent import futures

import numpy as np
import pytest

from jaxft.data import DataError
from jaxft.rewards import (
    accepted_answers,
    mentions_answer,
    same_answer,
    stated_answer,
    verifier_for,
)
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
        ["3", "3.0", "so it is 3!", "+3", "x = 3"]
        + ["\\boxed{x=3}", "The answer is:\n\n$3$", "03", "6/2"]
        + ["\\boxed{2^2-1}", "3 apples", "about 3", "The answer is 3 because 4-1=3.", "\\[3\\]"],
        ["-3", "13", "3.1", "3 or 4", "It is not 3"]
        + ["the ratio is 2:3", "1,2,3", "2^3", "2*3", "10 - 3"]
        + ["\\boxed{3, 4}", "\\boxed{x=4, y=3}", "x3", "3x", "The answer is not 3", "2.3", "\\sqrt3", "4/3"],
    ),
    "4": (
        ["4", "2 + 2 is 4", "1 + 3 = 4", "#### 4\nCheck: 2 + 2", "<answer>4</answer> (not 5)"],
        ["4 and 5", "2 and 4", "The answer is 3/4."]
        + ["four and 5", "\\boxed{4} or \\boxed{5}", "#### 5, not 4"],
    ),
    "1234": (
        ["The answer is 1,234.", "$1,234", "1 234"]
        + ["1{,}234", "\\boxed{1{,}234}", "1\\,234", "1.234e3"],
        ["1, 234", "1,23,4", "12,34", "1,234,567", "1.234", "234"],
    ),
    "9500": ([r"\boxed{9{,}500}", "9,500", "9.5 thousand", "9500.00"], ["9,50", "9.500", "950"]),
    "1234567": (["1,234,567", "12,34,567"], ["1,234,56"]),
    "123": (["123"], ["1,2,3", "1, 2, 3"]),
    "1,2,3": (
        ["1, 2, 3", "1,2,3", "{3,1,2}", "1, 2 and 3", "(1,2,3)"],
        ["123", "1,2", "1,2,4", "[1,2,3)"],
    ),
    "15": (["between 10-15", "15"], ["-15", "\\boxed{10-15}", "15/2"]),
    "-5": ([r"the change is −5", "-5", "–5", "-$5", "$-5"], ["5", "10-5", "- 5 + 1"]),
    "-2": (["10 * 3 - 32 = -2", "−2.0"], ["2", "a-2"]),
    "0.5": (
        ["it is .5", "1/2", "½", "0.50", "50%", r"\frac{1}{2}", r"\frac12", "5e-1"],
        ["0.05", "5", "0.51"],
    ),
    "-1/2": ([r"-\frac{1}{2}", "-0.5", "−½", r"\frac{-1}{2}", r"$-\dfrac12$"], ["1/2", "-2"]),
    "3/4": (
        ["The answer is 3/4.", "0.75", "6/8", "75%", r"\tfrac{3}{4}"],
        ["4", "3", "4/3", "0.7", "1 3/4"],
    ),
    "1/3": (["0.333333", "2/6"], ["0.33", "0.3", "3"]),
    "2 1/2": (["2.5", "5/2", r"2\frac{1}{2}", "2½", "2 and 1/2"], ["21/2", "1/2", "2"]),
    "50%": (
        ["50", "50 %", "0.5", r"50\%", "50 percent", "1/2"],
        ["5", "0.05", "5000", "500%", "50 kg"],
    ),
    "10%": (["0.1", "10", "10%"], ["0.01", "1", "1000", "0.1%"]),
    "5 cm": (
        ["5", "5cm", "50 mm", "0.05 m", r"5\text{ cm}", "5 centimeters"],
        ["5 m", "50", "5 kg", "5 inches"],
    ),
    "$0.50": (["50 cents", "0.5", "$.50", r"\$0.50", "0.50 dollars"], ["50", "0.5 euros", "$50"]),
    "72 km/h": (["72", "72 km/h", "72 km per hour"], ["27"]),
    "20 students": (["20", "There are 20 students."], ["21 students"]),
    "30 degrees": ([r"30^\circ", "30°", "30", r"30^{\circ}"], ["60°", "30%"]),
    "2000000": (
        ["2 million", "2e6", "2 x 10^6", r"2 \times 10^{6}", "2,000,000", "2×10⁶"],
        ["2", "2e5"],
    ),
    "1e-9": (["0.000000001", "1 × 10^{-9}"], ["2e-9", "0"]),
    "10000000000000000": (["1e16", "10,000,000,000,000,000"], ["10000000000000001"]),
    "3.14": (["3.140", "3.14"], ["3.141593", "314", "3,14"]),
    "10-15": (
        ["10 to 15", "between 10 and 15", "10–15", "10 - 15", "from 10 to 15"],
        ["15", "10", "-5", "10-16"],
    ),
    "3:30": (["3:30"], ["30", "3:31", "3.5"]),
    "2:3": (["2:3", "The answer is 2:3."], ["3", "3:2", "2/4"]),
    "March 5, 2020": (
        ["2020-03-05", "5 March 2020", "Mar 5th, 2020"],
        ["2020", "March 6, 2020", "2020-05-03"],
    ),
    "(1,2)": (
        ["(1, 2)", "(1,2)", r"\left(1,2\right)", r"\boxed{(1, 2)}"],
        ["(2,1)", "[1,2]", "{1,2}", "2", "[1,2)"],
    ),
    "{1, 2}": (["{2,1}", r"\{1,2\}", "1, 2", "x = 1, 2"[4:]], ["{1}", "{1,2,3}", "(1,2)", "2"]),
    "[0, 1)": (["[0,1)", r"[0, \; 1)"], ["(0,1]", "[0,1]", "0, 1"]),
    "(1/2, 3)": (["(0.5, 3)", r"\left(\frac{1}{2}, 3\right)"], ["(3, 1/2)", "(1/2, 4)"]),
    "A": (
        ["A", "(A)", "A.", "A) Paris", "**A**"]
        + ["option A", "The answer is (A).", "Answer: A", r"\boxed{A}"]
        + [r"\boxed{\text{A}}", "The correct option is A because B is wrong.", "a", "I choose (A)"],
        ["B", "A or B", "A dog", "(A) or (B)"]
        + ["Option A is wrong.", "the answer is A or C", "(B)", "A, B"]
        + ["An apple", "The answer is not A"],
    ),
    "(C)": (["C", "C is correct", "c)"], ["D", "CC", "(B) and (C)"]),
    "yes": (
        ["Yes", "yes, because it is.", "True", "I looked. Yes."],
        ["no", "yes and no", "not yes", "maybe"],
    ),
    "No": (["no.", "No, it is not", "false", "The answer is no."], ["yes", "nobody", "not sure"]),
    "#### 42": (["reasoning 7 #### 42", "42", "#### 42\n"], ["#### 43", "42 #### 7"]),
    "6 * 7 = 42\n#### 42": (["It is 42."], ["6", "7"]),
    r"We get $\boxed{\frac{3}{4}}$ of it.": (["3/4", r"\boxed{\frac34}"], ["4"]),
    r"\text{Paris}": (["Paris"], ["London"]),
    "x=5": (["5", "x = 5", "$x=5$"], ["y=5", "x=6"]),
    "18": (
        ["She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"]
        + ["Answer: 18\n\nThere are 12 others.", "$18."]
        + [r"\boxed{18\text{ hours}}", r"\boxed{\$18}", "The final answer is **18**.", "18 (eighteen)"],
        ["The answer is 17, not 18", "18 is not the answer"]
        + ["2020-03-18", "192.168.1.18", "v18", "18th"]
        + ["3x+2y=18", "18 or 19", "x_18", "10^18", "isn't 18", "maybe 17 or so... or 18", r"\boxed{}"],
    ),
    "B": (
        [r"\boxed{\textbf{(B)}\ 5}", "**Answer: B**", "Answer: **B) Paris**", "The answer is: B."],
        ["(A), (B)", "B or A", "Answer: A/B", "ABC"],
    ),
    "(C) Paris": (["C"], ["B"]),
    "1024": (["2^{10}"], ["2^{9}"]),
    "1/6": ([r"0.1\overline{6}"], ["0.1"]),
    "25 cm^2": (["The area is 25 cm^2.", "25", r"25 \text{ cm}^2"], ["26 cm^2"]),
    "90 minutes": (["1.5 hours", "90"], ["1.5 days"]),
    "3, 5": (["x=3 or x=5", "5 and 3", r"\boxed{3}\text{ and }\boxed{5}"], ["3", "5", "3, 5, 7"]),
    "0": (["0.0", "-0"], ["1e-9", "1/0", "nan"]),
    "no": (["No, they are not."], ["No idea.", "yes/no", "I have no idea"]),
}  # fmt: skip
MATHEMATICS = {
    r"\frac{\sqrt{3}}{2}": (
        [r"\boxed{\frac{\sqrt3}{2}}", r"$\sqrt{3}/2$", "sqrt(3)/2"],
        [r"\sqrt{3}", "3/2"],
    ),
    "2x+1": (["1 + 2x", r"\boxed{2x + 1}", "y = 2x+1"], ["2x-1", "2x", "x+1"]),
    r"2\pi": ([r"$2 \pi$", "2π", "2*pi", r"\pi + \pi"], ["2", "6.28", r"\pi^2"]),
    "(x+1)^2": (["x^2+2x+1", r"\boxed{(1+x)^2}"], ["x^2+1", "x^2"]),
    r"(-\infty, 2) \cup (3, \infty)": (
        [r"(-\infty,2)\cup(3,\infty)"],
        [r"(-\infty,2]\cup(3,\infty)", "2"],
    ),
    r"\{\sqrt{2}, -\sqrt{2}\}": ([r"-\sqrt{2}, \sqrt{2}"], [r"\sqrt{2}"]),
    "x > 2": (["2 < x", r"x > 2"], ["x < 2", r"x \ge 2", "2"]),
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": (
        [r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"],
        [r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"],
    ),
    "10": ([r"\boxed{\binom{5}{2}}", r"\boxed{\sqrt{100}}"], [r"\boxed{\sqrt{10}}"]),
    r"\frac{1}{2}x": (["x/2", "0.5x"], ["2x", "1/(2x)"]),
    r"x \le 3": ([r"(-\infty, 3]"], [r"(-\infty, 3)"]),
    "p-q": (["p - q"], ["q - p", "-q"]),
    "(x+y)^2": (["x^2+2xy+y^2"], ["x^2+y^2"]),
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
    assert not failures(MATHEMATICS)
    record = {"answer": ["2", r"\frac{\sqrt{2}}{2}"]}
    verify = verifier_for("x", [record])
    assert verify(r"\boxed{1/\sqrt{2}}", record) and not verify(r"\sqrt{2}", record)


def test_mathematics_neither_hangs_nor_raises_in_any_thread():
    tower = "9^{9^{9^{9}}}"  # one operation of integers, which no signal handler can interrupt
    table = [(tower, "1", False), (r"\frac{1}{", "1", False), (r"1/\sqrt2", r"\sqrt{2}/2", True)]
    table += [("x" * 10_000, "x", False), ("\0", "1", False), (r"\frac{x}{0}", "x", False)]
    run = lambda row: same_mathematics(row[0], row[1], seconds=0.5)
    with futures.ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, table)) == [right for *_, right in table]


def test_any_of_several_accepted_answers_counts():
    record = {"answer": ["4", "four", 4.5], "source": "x"}
    verify = verifier_for("x", [record])
    right = ["four", "It is 4", "4.5"]
    assert [verify(text, record) for text in [*right, "['4', 'four']", "5"]] == [True] * 3 + [
        False
    ] * 2
    assert same_answer("yes", True) and same_answer("3", 3.0) and same_answer("4", np.float32(4))
    assert accepted_answers((1, "a")) == ["1", "a"]
    assert mentions_answer("it is four!", record) and not mentions_answer("fourteen", record)


@pytest.mark.parametrize(
    "answer", [None, "", "  ", [], [None], ["4", ""], {"a": 1}, float("nan"), [[1]]]
)
def test_an_answer_that_cannot_be_compared_is_an_error_of_its_record(answer):
    records = [{"answer": "1"}, {"answer": answer, "_where": "qa.jsonl, line 2"}]
    with pytest.raises(DataError, match="^qa.jsonl, line 2: the answer"):
        verifier_for("qa.jsonl", records)
    with pytest.raises(DataError, match="the answer"):
        same_answer("None", answer)


def test_stated_answers():
    table = {
        r"so \boxed{\frac{1}{2}}.": r"\frac{1}{2}",
        r"\boxed{1} and \boxed{2}": "1, 2",
        "The answer is 5.\n\nDone": "5",
        "**Answer:** Paris": "Paris",
        "#### 7": "7",
        "<answer> 8 </answer>": "8",
        "no statement": None,
        "the answer is": None,
        r"\boxed{": None,
    }
    assert {text: stated_answer(text) for text in table} == table


def test_an_answer_of_a_reference_solution_is_mentioned():
    """GSM8K's and MATH's solutions state it last."""
    record = {"answer": "6+9 = <<6+9=15>>15\n#### 15", "question": "6+9?"}
    assert mentions_answer("I think it is 15 apples.", record)
    assert not mentions_answer("I think it is 69.", record)
