"""Compares mathematics for `mathematics.py`: JSON lines [found, answer, seconds] in, true or false out.

It is started as a script in a separate interpreter, so that sympy may hang or fill the memory
without harm.
"""

import json
import logging
import os
import resource
import signal
import sys

MEMORY = 2 << 30  # bytes


class OutOfTime(BaseException):
    """Raised when the time is over; not an Exception, which sympy would swallow."""


def main() -> None:
    """Answers requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # Output printed by a library is not an answer.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # It would warn that its own timer is off; ours replaces it.
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
        # Both count CPU seconds, so that a busy machine does not change a verdict. Python handles
        # the first only between two operations, and a long power of integers is one operation; the
        # second ends the process.
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
