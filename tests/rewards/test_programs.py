"""Programs as chains of thought: what returns is an answer, what misbehaves is none, within the limit."""

import functools
import time

import pytest

from jaxft.rewards import answer_reward, numbers_equal, run_programs, run_python, stated_answer

SOLUTION = "def solution():\n    "
ANSWERS = {
    SOLUTION + "return 6 * 7": "42",
    SOLUTION + "return True": "True",
    SOLUTION + "return ' yes '": "yes",
    "from fractions import Fraction\n" + SOLUTION + "return Fraction(2, 6)": "1/3",
    "import math, datetime, re\n"
    + SOLUTION
    + "print('no answer'); return math.comb(5, 2) / 4": "2.5",
}
NONE = {
    "syntax error": "def solution(:",
    "raises": SOLUTION + "return 1 / 0",
    "print only": "print(42)",
    "prints inside": SOLUTION + "print(42)",
    "no number": SOLUTION + "return [1]",
    "not finite": SOLUTION + "return float('inf')",
    "too long": SOLUTION + "return 10 ** 2000",
    "exits": "import os\nos._exit(0)",
    "exits inside": SOLUTION + "raise SystemExit",
    "2 GB": SOLUTION + "x = bytearray(2 << 30); return 1",
    "reads": SOLUTION + "open('/etc/hostname').read(); return 1",
    "network": SOLUTION + "import socket; socket.socket(); return 1",
    "forks": "import os\n" + SOLUTION + "os.fork(); return 1",
    "starts a shell": "import os\n" + SOLUTION + "os.system('true'); return 1",
    "signals": "import os\n" + SOLUTION + "os.kill(os.getppid(), 0); return 1",
    "lifts a limit": "import resource as r\n"
    + SOLUTION
    + "r.setrlimit(r.RLIMIT_CPU, (9, 9)); return 1",
    "empty": "",
}


def test_what_returns_is_an_answer_and_what_misbehaves_is_none():
    programs = [*ANSWERS, *NONE.values()]
    found = run_programs(programs, workers=2, seconds=10)
    assert found[: len(ANSWERS)] == list(ANSWERS.values())
    assert dict(zip(NONE, found[len(ANSWERS) :], strict=True)) == dict.fromkeys(NONE)


@pytest.mark.parametrize("body", ["while True: pass", "import time; time.sleep(60)"])
def test_what_does_not_end_is_ended(body):
    begun = time.monotonic()
    assert run_python(SOLUTION + body, seconds=0.5) is None
    assert time.monotonic() - begun < 5
    with pytest.raises(ValueError, match="must be positive, got 0"):
        run_python("", seconds=0)


def test_programs_leave_no_file_behind(tmp_path):
    mark, kept = tmp_path / "mark", tmp_path / "kept"
    kept.write_text("still here")
    for act in (
        f"open({str(mark)!r}, 'w')",
        f"os.remove({str(kept)!r})",
        f"os.mkdir({str(mark)!r})",
    ):
        assert run_python("import os\n" + SOLUTION + act + "; return 1", seconds=10) is None
    assert not mark.exists() and kept.read_text() == "still here"


def test_the_reward_of_answers():
    reward = answer_reward(stated_answer, numbers_equal)
    gold = {"answer": "1000"}
    table = {
        "2 times 500, so the answer is 1,000.": 1.0,
        "The answer is: $1000": 1.0,
        "#### 1000.0": 1.0,
        "the answer is 7. No: the answer is 1000": 1.0,
        "the answer is 999": 0.1,
        "the answer is unclear": 0.1,
        "it is 1000": 0.0,
        "the answer is": 0.0,
        "": 0.0,
    }
    assert {text: reward(text, gold) for text in table} == table
    assert answer_reward(stated_answer, numbers_equal, partial=0)("#### 1", gold) == 0
    near = functools.partial(numbers_equal, tolerance=1e-3)
    assert near("0.333", "1/3") and not numbers_equal("0.333", "1/3") and not near("0.34", "1/3")
    assert near(" Yes", "yes") and not near("yes", "1") and not near("1/0", "1")
    assert not near("inf", "1") and near("-1/2", "-0.5")
    with pytest.raises(ValueError, match="partial must lie in .0, 1., got 1.5"):
        answer_reward(stated_answer, numbers_equal, partial=1.5)
    with pytest.raises(ValueError, match="answer . . cannot be compared"):
        reward("#### 1", {"answer": " "})


def test_programs_are_rewarded_by_what_they_return():
    run = functools.partial(run_python, seconds=10)
    reward = answer_reward(run, numbers_equal)
    texts = [SOLUTION + "return 40 + 2", SOLUTION + "return 41", "print(42)"]
    assert [reward(text, {"answer": "42"}) for text in texts] == [1.0, 0.1, 0.0]
