"""Compares mathematics for `mathematics.py`: [found, answer, seconds] in JSON on a line, then true or false.

Started as a script in an interpreter of its own, in which sympy may hang, or fill the memory, without harm.
"""

import json
import logging
import os
import resource
import signal
import sys

MEMORY = 2 << 30  # bytes


class OutOfTime(BaseException):
    """Raised at the end of the time; not an Exception, which sympy would swallow."""


def main() -> None:
    """Answers requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # What a library prints is no answer.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # It warns that its own time limit is off; the alarm is ours.
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text):
        return parse(
            f"${text}$",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
        )

    def stop(*_):
        raise OutOfTime

    signal.signal(signal.SIGVTALRM, stop)
    answers.write("ready\n")
    for line in sys.stdin:
        found, answer, seconds = json.loads(line)
        # Both count seconds of CPU, so that a busy machine changes no verdict. The first is seen between
        # two operations of Python alone, and a long power of integers is one: the second ends the process.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds)
        try:
            gold, given = read(answer), read(found)
            same = bool(gold and given) and verify(gold, given, timeout_seconds=None)
        except (Exception, OutOfTime):
            same = False
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(same) + "\n")


if __name__ == "__main__":
    main()
