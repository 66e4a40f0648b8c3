"""Questions about short synthetic sounds, by a Qwen2-Audio of 0.3 M parameters.

A clip has 0.64 s at 16,000 samples per second, a random gain, and noise 10 to 20 dB below the sound. Each of
four skills has its own sounds and four classes, which a prompt names in random order after the clip:

    prfkd    three tones: rising, falling, peak in the middle, dip in the middle
    n3142    the number of beeps
    wsqaz    sine, square, sawtooth, noise
    lxyeo    louder in the first half, in the second, equal, silent

The first character is the skill. The prompt ends with the kind of answer that is wanted, as the second and
the third prompt of R1-AQA do: the option between answer tags, or a field for thinking before it. In the
answers that begin the model this field has dots, which say nothing about the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import arithmetic, toy_text
from jaxft import rl
from jaxft.data import LogMel
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder, config_of
from jaxft.models.sound import embeddings_of
from jaxft.rewards import SeveralRewards, option_reward, tag_format_reward

RATE, SECONDS = 16000, 0.64
FEATURES = LogMel(32, seconds=1)
FRAMES = 64  # of a clip
SKILLS = {"p": "rfkd", "n": "1234", "w": "sqaz", "l": "xyeo"}  # skill -> classes
OPTIONS = 4  # of a question
STOP, AUDIO = "\n", "<|AUDIO|>"
ANSWER, THINK = "#answer", "#think"  # the kind of answer that a prompt asks for
TAGS = {ANSWER: ("answer",), THINK: ("think", "answer")}
MOST_DOTS = 3  # of a field for thinking in the answers that begin the model
LIMITS = {ANSWER: 4, THINK: 10}  # tokens of the longest answer with its stop
_MARKS = ("<answer>", "</answer>", "<think>", "</think>")
TOKENS = [STOP, ".", *_MARKS, ANSWER, THINK, *"0123456789abcdefghijklmnopqrstuvwxyz", AUDIO]


class Clips(NamedTuple):
    """Records with `kind`, `question` and `answer`, and the features of their clips."""

    records: list[dict[str, str]]
    audio: np.ndarray  # [N, 1, frames, mel] float32
    audio_frames: np.ndarray  # [N, 1] int32, frames with sound

    def of(self, rows: Sequence[int]) -> Clips:
        """Some of the clips with their records, by number."""
        return Clips([self.records[i] for i in rows], self.audio[rows], self.audio_frames[rows])


class Tokenizer:
    """The tokens of questions and answers."""

    def encode(self, parts: Sequence[str]) -> list[int]:
        """The ids of tokens."""
        return [TOKENS.index(part) for part in parts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, without the tokens of clips."""
        return "".join(TOKENS[i] for i in ids if TOKENS[i] != AUDIO or not skip_special_tokens)


def sampling(wanted: str, temperature: float = 1.0) -> SamplingConfig:
    """Sampling until the stop, for prompts that want ANSWER or THINK."""
    return SamplingConfig(LIMITS[wanted], temperature, stop_ids=(TOKENS.index(STOP),))


def draw(rng: np.random.Generator, count: int, skills: str = "pnwl") -> Clips:
    """Draws `count` questions about synthetic clips, the skills in turn."""
    kinds = [skills[i % len(skills)] for i in range(count)]
    records = [question(rng, kind, SKILLS[kind]) for kind in kinds]
    return clips_of(records, [wave(rng, r["kind"], r["answer"]) for r in records])


def question(rng: np.random.Generator, kind: str, classes: str) -> dict[str, str]:
    """A question of a skill: `kind`, its `answer`, and in `question` four options in random order."""
    answer = classes[rng.integers(len(classes))]
    rest = [x for x in classes if x != answer]
    options = rng.permutation([answer, *rng.choice(rest, OPTIONS - 1, replace=False)])
    return {"kind": kind, "question": kind + "".join(options), "answer": answer}


def clips_of(
    records: list[dict[str, str]], waves: Sequence[np.ndarray], frames: int = FRAMES
) -> Clips:
    """The clips of samples [N], of at most so many frames each."""
    heard = np.array([-(-len(x) // FEATURES.hop) for x in waves], np.int32)[:, None]
    return Clips(records, np.stack([FEATURES(x)[None, :frames] for x in waves]), heard)


def wave(rng: np.random.Generator, kind: str, name: str) -> np.ndarray:
    """Samples [N] float32 of a clip of a skill and class."""
    return noisy(rng, SOUNDS[kind](rng, name) * rng.uniform(0.2, 0.8))


def noisy(rng: np.random.Generator, sound: np.ndarray) -> np.ndarray:
    """Samples [N] float32 with white noise 10 to 20 dB below them; of silence, noise of any loudness."""
    power = np.mean(sound**2) or rng.uniform(0.02, 0.3) ** 2
    noise = np.sqrt(power * 10 ** (-rng.uniform(1.0, 2.0)))
    return (sound + noise * rng.normal(size=len(sound))).astype(np.float32)


_TIME = np.arange(int(RATE * SECONDS)) / RATE  # seconds


def _tone(hertz, shape="s", time=_TIME):
    turns = hertz * time % 1.0
    made = {"s": np.sin(2 * np.pi * turns), "q": np.sign(turns - 0.5), "a": 2 * turns - 1}
    return made[shape]


def _contour(rng, name):
    """Three tones; a step is an eighth to a half of an octave."""
    ups = {"r": (1, 1), "f": (-1, -1), "k": (1, -1), "d": (-1, 1)}[name]
    steps = np.cumsum([0.0, *(up * rng.uniform(0.125, 0.5) for up in ups)])
    hertz = np.exp2(rng.uniform(np.log2(400), np.log2(1600)) + steps)
    parts = np.array_split(_TIME, 3)
    return np.concatenate([_tone(f, time=t) for f, t in zip(hertz, parts, strict=True)])


def _beeps(rng, name):
    """Beeps of 0.05 to 0.1 s with silence between them, at random places."""
    count = int(name)
    sizes = (RATE * rng.uniform(0.05, 0.1, count)).astype(int)
    gap = RATE // 25
    free = len(_TIME) - sizes.sum() - gap * (count - 1)
    starts = np.sort(rng.integers(0, free + 1, count))
    starts = starts + np.cumsum([0, *(sizes[:-1] + gap)])
    loud = np.zeros(len(_TIME))
    for start, size in zip(starts, sizes, strict=True):
        loud[start : start + size] = 1.0
    return loud * _tone(rng.uniform(400, 2000))


def _waveform(rng, name):
    if name == "z":
        return 0.6 * rng.normal(size=len(_TIME))
    return _tone(rng.uniform(150, 600), name)


def _halves(rng, name):
    quiet = rng.uniform(0.3, 0.6)
    first, second = {"x": (1, quiet), "y": (quiet, 1), "e": (1, 1), "o": (0, 0)}[name]
    half = len(_TIME) // 2
    loud = np.where(np.arange(len(_TIME)) < half, first, second)
    return loud * _tone(rng.uniform(150, 1600))


# Skill -> (rng, class) -> samples without noise, of about the amplitude 1.
SOUNDS = {"p": _contour, "n": _beeps, "w": _waveform, "l": _halves}


def small_model(
    key: jax.Array, frames: int = FRAMES, width: int = 96, heard: int = 64
) -> tuple[Decoder, Any]:
    """(model, params) with Qwen2-Audio's architecture, for clips of at most so many frames.

    Args:
        width: features of the language model.
        heard: features of the encoder of sound.
    """
    config = config_of(
        {
            "model_type": "qwen2_audio",
            "audio_token_index": TOKENS.index(AUDIO),
            "audio_config": {
                "d_model": heard, "encoder_layers": 2, "encoder_attention_heads": 4,
                "encoder_ffn_dim": 2 * heard, "num_mel_bins": FEATURES.mel,
                "max_source_positions": -(-frames // 2),
            },
            "text_config": {
                "model_type": "qwen2", "vocab_size": len(TOKENS), "hidden_size": width,
                "intermediate_size": 8 * width // 3, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
            },
        }
    )  # fmt: skip
    model = Decoder(config)
    params = jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return model, _rescaled(params)


def _rescaled(params):
    """`arithmetic.rescaled`, but convolutions by all of their inputs, and sines as they are."""
    made = arithmetic.rescaled(params)
    by_inputs = lambda x: x * x.shape[1] ** -0.5 if x.ndim == 3 else x
    audio = made["audio"] | {
        "positions": params["audio"]["positions"],
        "stem": jax.tree.map(by_inputs, made["audio"]["stem"]),
    }
    return made | {"audio": audio}


def asked(clips: Clips, wanted: str, shown: Clips | None = None) -> rl.Asked:
    """The prompts of clips, or with the clips `shown` in their places, for the wanted kind of answer."""
    shown = clips if shown is None else shown
    counts = [embeddings_of(int(x)) for x in shown.audio_frames[:, 0]]
    encode = Tokenizer().encode
    ids = [
        encode([AUDIO] * count + [*record["question"], wanted])
        for count, record in zip(counts, clips.records, strict=True)
    ]
    columns = {"audio": shown.audio, "audio_frames": shown.audio_frames}
    return rl.Asked(ids, clips.records, columns)


def rows_of(
    clips: Clips, wanted: str, rng: np.random.Generator, size: int | None = None
) -> dict[str, np.ndarray]:
    """Rows of prompts and right answers, padded at both ends as rollouts are.

    `loss_mask` counts the answer with its stop; `completion_mask` [B, N] is its last N columns. Fields for
    thinking have 1 to MOST_DOTS dots.

    Args:
        size: N; None: that of the longest answer.
    """
    ids, size = asked(clips, wanted).ids, size or LIMITS[wanted]
    given = [Tokenizer().encode(tokens_of(r["answer"], wanted, rng)) for r in clips.records]
    rows = toy_text.answered_rows(ids, given, size)
    media = {"audio": clips.audio, "audio_frames": clips.audio_frames}
    return rows | {"completion_mask": rows["loss_mask"][:, -size:] > 0} | media


def tokens_of(answer: str, wanted: str, rng: np.random.Generator) -> list[str]:
    """The tokens of an answer in its tags, with the stop."""
    dots = ["<think>", *"." * int(rng.integers(1, MOST_DOTS + 1)), "</think>"]
    return [*(dots if wanted == THINK else ()), "<answer>", answer, "</answer>", STOP]


def rewards(clips: Clips, wanted: str) -> SeveralRewards:
    """Accuracy and format, the two rewards of R1-AQA; the records' answers are checked."""
    parts = option_reward(clips.records), tag_format_reward(TAGS[wanted])
    return SeveralRewards(parts, (1.0, 1.0))


def others(clips: Clips, by: int = 1) -> Clips:
    """The clips of other records of the same skill, those `by` places before in a circle, in these places."""
    order = np.arange(len(clips.records))
    for kind in {record["kind"] for record in clips.records}:
        rows = [i for i, record in enumerate(clips.records) if record["kind"] == kind]
        order[rows] = np.roll(rows, by)
    return clips.of(order)


def text_prior(known: Clips, held_out: Clips) -> dict[str, float]:
    """The accuracy in each skill of the option whose class is commonest in `known`: no clip is heard."""
    found: dict[str, list[bool]] = {}
    counts: dict[tuple[str, str], int] = {}
    for record in known.records:
        pair = record["kind"], record["answer"]
        counts[pair] = counts.get(pair, 0) + 1
    for record in held_out.records:
        kind, *options = record["question"]
        best = max(options, key=lambda x, kind=kind: counts.get((kind, x), 0))
        found.setdefault(kind, []).append(best == record["answer"])
    return {kind: float(np.mean(hits)) for kind, hits in found.items()}
