"""Questions about small pictures, by a vision-language model of 0.2 M parameters.

A picture has 16 x 16 pixels in colour. Each of four skills has its own pictures, questions and reward:

    #r     how many shapes are red?                       "3"        1 - |n - n*| / n*
    @b     where is the blue rectangle?                   four locations as PaliGemma writes them    IoU
    ?      which two digits (handwritten, scikit-learn)?  "47"       1 - edit distance / length
    =gbr   which colour has most shapes: A green, B blue, C red?  "B"        1 or 0

A prompt is four image tokens, each for 8 x 8 pixels, and the question. The digits of held-out pictures are of
images that no training picture has.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.worlds import arithmetic, toy_text
from jaxft import rl
from jaxft.generation import SamplingConfig
from jaxft.models import Decoder, DecoderConfig, EncoderConfig
from jaxft.models.vision import VisionTower
from jaxft.rewards import (
    RewardFn,
    by_kind,
    choice_reward,
    count_reward,
    edit_distance_reward,
    iou_reward,
    read_boxes,
)
from jaxft.rewards.boxes import ious

SIZE, CELLS, CELL = 16, 4, 4  # pixels of a side, cells of a side, pixels of a cell
SKILLS = ("count", "box", "read", "choose")
COLOURS = {"r": (1.0, 0.2, 0.2), "g": (0.2, 1.0, 0.2), "b": (0.2, 0.2, 1.0)}
MOST = 5  # shapes of a colour, at most
LOCATIONS = [f"<loc{min(i * 256, 1023):04d}>" for i in range(CELLS + 1)]
STOP, IMAGE = "\n", "<image>"
TOKENS = [STOP, *"0123456789ABC#@?=rgb", *LOCATIONS, IMAGE]
SHOWN = 4  # image tokens of a picture
LIMIT = 5  # tokens of the longest answer with its stop
# The reward from which an answer counts as right.
RIGHT = {"count": 1.0, "box": 0.5, "read": 1.0, "choose": 1.0}
# Shapes of 3 x 3 pixels: a square, a plus, a cross.
_SHAPES = np.array(
    [
        [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]],
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]],
    ]
)


class Pictures(NamedTuple):
    """Records with `kind`, `question` and `answer`, and their pictures."""

    records: list[dict[str, str]]
    images: np.ndarray  # [N, 1, SIZE, SIZE, 3] float32


class Tokenizer:
    """The tokens of questions and answers."""

    def encode(self, parts: Sequence[str]) -> list[int]:
        """The ids of tokens."""
        return [TOKENS.index(part) for part in parts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, without image tokens."""
        return "".join(TOKENS[i] for i in ids if TOKENS[i] != IMAGE or not skip_special_tokens)


def sampling() -> SamplingConfig:
    """Sampling at temperature 1 until the stop."""
    return SamplingConfig(LIMIT, stop_ids=(TOKENS.index(STOP),))


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(images [1797, 8, 8] from 0 to 1, labels) of scikit-learn, in its order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images / 16, data.target


def draw(rng: np.random.Generator, count: int, numbers: np.ndarray) -> Pictures:
    """Draws `count` questions with pictures, the skills in turn; digits are of the images `numbers`."""
    make = {
        "count": _count,
        "box": _box,
        "read": functools.partial(_read, numbers),
        "choose": _choose,
    }
    records, images = [], np.empty((count, 1, SIZE, SIZE, 3), np.float32)
    for i in range(count):
        kind = SKILLS[i % len(SKILLS)]
        question, answer, image = make[kind](rng)
        image = image * rng.uniform(0.7, 1.0) + rng.normal(0, 0.08, image.shape)
        images[i, 0] = 2 * np.clip(image, 0, 1) - 1
        records.append({"kind": kind, "question": question, "answer": answer})
    return Pictures(records, images)


def split(seed: int, known: int, held_out: int) -> tuple[Pictures, Pictures]:
    """(pictures to train on, held-out pictures); two thirds of the digits' images are for training."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits()[1]))
    first = len(order) * 2 // 3
    return draw(rng, known, order[:first]), draw(rng, held_out, order[first:])


def small_model(key: jax.Array, width: int = 80, vision: int = 64) -> tuple[Decoder, Any]:
    """(model, params) of SmolVLM's architecture: SigLIP, a pixel shuffle of 2, a Llama decoder.

    Args:
        width: features of the decoder.
        vision: features of the vision transformer.
    """
    encoder = EncoderConfig(
        hidden_size=vision, intermediate_size=2 * vision, num_layers=2, num_heads=4,
        num_positions=CELLS**2, norm_eps=1e-6, activation="gelu_tanh", pre_norm=True, pooler=False,
        class_token=False, image_size=SIZE, patch_size=CELL, family="siglip_vision_model",
    )  # fmt: skip
    tower = VisionTower(encoder, token=TOKENS.index(IMAGE), width=width, shuffle=2)
    config = DecoderConfig(
        vocab_size=len(TOKENS), hidden_size=width, intermediate_size=8 * width // 3, num_layers=2,
        num_heads=4, num_kv_heads=4, head_dim=width // 4, max_length=64, towers=(tower,), family="smolvlm",
    )  # fmt: skip
    model = Decoder(config)
    params = jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return model, arithmetic.rescaled(params)


def asked(pictures: Pictures, images: np.ndarray | None = None) -> rl.Asked:
    """The prompts of pictures, or of other `images` in their places."""
    shown = [TOKENS.index(IMAGE)] * SHOWN
    ids = [shown + Tokenizer().encode(record["question"]) for record in pictures.records]
    return rl.Asked(
        ids, pictures.records, {"images": pictures.images if images is None else images}
    )


def rows_of(pictures: Pictures) -> dict[str, np.ndarray]:
    """Rows of prompts and answers for supervised training, padded at both ends as rollouts are."""
    ids = asked(pictures).ids
    given = [Tokenizer().encode([*tokens_of(r["answer"]), STOP]) for r in pictures.records]
    return toy_text.answered_rows(ids, given, LIMIT) | {"images": pictures.images}


def tokens_of(answer: str) -> list[str]:
    """The tokens of an answer: locations of boxes, or characters."""
    size = len(LOCATIONS[0])
    if answer.startswith("<loc"):
        return [answer[i : i + size] for i in range(0, len(answer), size)]
    return list(answer)


def rewards(records: Sequence[Mapping[str, Any]]) -> RewardFn:
    """The reward of each record's skill, in [0, 1]; the records' answers are checked."""
    make = {"count": count_reward, "box": iou_reward, "read": edit_distance_reward}
    make |= {"choose": functools.partial(choice_reward, options="ABC")}
    kinds = {record["kind"] for record in records}
    return by_kind({k: make[k]([r for r in records if r["kind"] == k]) for k in sorted(kinds)})


def right(given: np.ndarray, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Which rewards are those of right answers; `records` are one for each."""
    return np.asarray(given) >= np.array([RIGHT[record["kind"]] for record in records])


def others(pictures: Pictures) -> np.ndarray:
    """Pictures of other records of the same skill, in turn."""
    images = pictures.images.copy()
    for kind in SKILLS:
        rows = [i for i, record in enumerate(pictures.records) if record["kind"] == kind]
        images[rows] = pictures.images[np.roll(rows, 1)]
    return images


def text_prior(known: Pictures, held_out: Pictures) -> dict[str, float]:
    """The accuracy in each skill of the best constant answer to each question, which sees no picture."""
    found: dict[str, list[float]] = {kind: [] for kind in SKILLS}
    group = lambda pictures, key: [
        r["answer"] for r in pictures.records if (r["kind"], r["question"]) == key
    ]
    for key in sorted({(r["kind"], r["question"]) for r in held_out.records}):
        ours, theirs = group(known, key), group(held_out, key)
        options = sorted(set(ours)) or [""]
        best = _fits(key[0], options, ours).mean(axis=1).argmax() if ours else 0
        found[key[0]] += _fits(key[0], options[best : best + 1], theirs)[0].tolist()
    return {kind: float(np.mean(hits)) for kind, hits in found.items()}


def _fits(kind, options, answers):
    """[options, answers] bool: which options are right for questions with these answers."""
    if kind != "box":
        return np.array([[a == b for b in answers] for a in options])
    boxes = lambda texts: [box for text in texts for box in read_boxes(text)]
    return ious(boxes(options), boxes(answers)) >= RIGHT["box"]


def _shapes(rng, counts):
    """The picture of so many shapes of each colour, in different cells."""
    image = np.zeros((SIZE, SIZE, 3))
    cells = iter(rng.permutation(CELLS**2))
    for colour, number in zip(COLOURS.values(), counts, strict=True):
        for _ in range(number):
            row, column = np.divmod(next(cells), CELLS) * np.array(CELL) + rng.integers(0, 2, 2)
            shape = _SHAPES[rng.integers(len(_SHAPES))]
            image[row : row + 3, column : column + 3] += shape[..., None] * colour
    return image


def _count(rng):
    counts = rng.integers(0, MOST + 1, len(COLOURS))
    place = int(rng.integers(len(COLOURS)))
    return "#" + [*COLOURS][place], str(counts[place]), _shapes(rng, counts)


def _choose(rng):
    counts = rng.integers(0, MOST + 1, len(COLOURS))
    while np.sum(counts == counts.max()) > 1:
        counts = rng.integers(0, MOST + 1, len(COLOURS))
    order = rng.permutation(len(COLOURS))
    answer = "ABC"[int(np.flatnonzero(order == counts.argmax())[0])]
    return "=" + "".join([*COLOURS][i] for i in order), answer, _shapes(rng, counts)


def _box(rng):
    image = np.zeros((SIZE, SIZE, 3))
    for place in rng.permutation(len(COLOURS))[:2]:  # The last one is asked for, and on top.
        sides = rng.integers(1, 4, 2)
        start = np.array([rng.integers(0, CELLS - side + 1) for side in sides])
        (y1, x1), (y2, x2) = start, start + sides
        image[y1 * CELL : y2 * CELL, x1 * CELL : x2 * CELL] = [*COLOURS.values()][place]
    answer = "".join(LOCATIONS[i] for i in (y1, x1, y2, x2))
    return "@" + [*COLOURS][place], answer, image


def _read(numbers, rng):
    images, labels = digits()
    pair = rng.choice(numbers, 2)
    row = 8 * int(rng.integers(2))
    image = np.zeros((SIZE, SIZE, 3))
    image[row : row + 8] = np.concatenate([images[i] for i in pair], axis=1)[..., None]
    return "?", "".join(str(labels[i]) for i in pair), image
