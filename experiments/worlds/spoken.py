"""Questions about spoken words, which the program espeak-ng makes: a more natural set beside `sounds`.

A clip is one digit in English, with one of four voices, at a speed and a pitch, and noise 10 to 20 dB below
it. Each of four skills names four classes in random order after the clip:

    d4170    the digit
    vmfwc    the voice: male, female, whispering, croaking
    ssmfq    the speed: slow, medium, fast, quick
    hlmhx    the pitch: low, medium, high, extreme
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

from experiments.worlds import sounds
from jaxft.data import read_clip
from jaxft.train import MissingDependencyError

WORDS = "zero one two three four five six seven eight nine".split()
VOICES = {"m": "m3", "f": "f2", "w": "whisper", "c": "croak"}  # espeak-ng's variants
SPEEDS = {"s": (100, 120), "m": (150, 175), "f": (210, 240), "q": (300, 350)}  # words per minute
PITCHES = {"l": (0, 12), "m": (30, 42), "h": (58, 70), "x": (88, 99)}  # espeak-ng's 0 to 99
SKILLS = {"d": "0123456789", "v": "".join(VOICES), "s": "".join(SPEEDS), "h": "".join(PITCHES)}
PROGRAM = "espeak-ng"
FRAMES = sounds.FEATURES.frames  # of a clip, at most


def check() -> None:
    """Raises MissingDependencyError if the program is not on PATH."""
    if shutil.which(PROGRAM) is None:
        raise MissingDependencyError(
            f"--world spoken needs the program {PROGRAM}, which is not on PATH: apt-get install {PROGRAM} "
            "(Debian, Ubuntu), or take --world tones."
        )


def draw(rng: np.random.Generator, count: int, skills: str = "dvsh") -> sounds.Clips:
    """Draws `count` questions about spoken digits, the skills in turn.

    Raises:
        MissingDependencyError: if espeak-ng is not installed.
    """
    check()
    kinds = [skills[i % len(skills)] for i in range(count)]
    records = [sounds.question(rng, kind, SKILLS[kind]) for kind in kinds]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.wav"
        waves = [_wave(rng, record, path) for record in records]
    return sounds.clips_of(records, waves, FRAMES)


def command(
    rng: np.random.Generator, kind: str, answer: str, path: str | pathlib.Path
) -> list[str]:
    """The command that writes a clip of a skill's class; what the skill does not ask for is random."""
    # A whisper has no pitch.
    voices = "mfc" if kind == "h" else SKILLS["v"]
    among = SKILLS | {"v": voices}
    one = {name: among[name][rng.integers(len(among[name]))] for name in SKILLS} | {kind: answer}
    between = lambda ends: str(int(rng.integers(ends[0], ends[1] + 1)))
    return [
        PROGRAM, "-v", f"en+{VOICES[one['v']]}", "-s", between(SPEEDS[one["s"]]),
        "-p", between(PITCHES[one["h"]]), "-w", str(path), WORDS[int(one["d"])],
    ]  # fmt: skip


def _wave(rng, record, path):
    """Samples [N] of a clip: its first second, without the silence at its end, and noise."""
    given = command(rng, record["kind"], record["answer"], path)
    subprocess.run(given, check=True, capture_output=True, timeout=60)
    sound = read_clip(str(path), sounds.RATE, resample=True)[: sounds.FEATURES.length]
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    sound = sound[: loud[-1] + 1]
    return sounds.noisy(rng, sound * rng.uniform(0.2, 0.8))
