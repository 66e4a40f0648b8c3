"""Boxes and points in texts about images: reading them, overlaps, and matching of several boxes.

A box is (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2; x grows to the right, y downwards. All boxes of one
comparison have the same unit: pixels, grid cells, or thousandths of the image.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MOST = 1000  # boxes that are read from one text; what follows is ignored


class Box(NamedTuple):
    """Corners of a box: left, top, right, bottom."""

    x1: float
    y1: float
    x2: float
    y2: float


Form = Callable[[Sequence[float]], Box]  # four numbers of a text -> a box

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_COMMA = r"\s*[,;\s]\s*"
_FOUR = re.compile(
    rf"[\[(]\s*({_NUMBER}){_COMMA}({_NUMBER}){_COMMA}({_NUMBER}){_COMMA}({_NUMBER})\s*[\])]"
)
_TWO_POINTS = re.compile(
    rf"\(\s*({_NUMBER}){_COMMA}({_NUMBER})\s*\)\s*,?\s*\(\s*({_NUMBER}){_COMMA}({_NUMBER})\s*\)"
)
_BARE = re.compile(
    rf"\s*({_NUMBER}){_COMMA}({_NUMBER}){_COMMA}({_NUMBER}){_COMMA}({_NUMBER})\s*\.?\s*"
)
_POINT = re.compile(rf"[\[(]\s*({_NUMBER}){_COMMA}({_NUMBER})\s*[\])]")
_BARE_POINT = re.compile(rf"\s*({_NUMBER}){_COMMA}({_NUMBER})\s*\.?\s*")
_LOCATIONS = re.compile(r"<loc(\d{4})>" * 4)
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
_POINT_KEYS = ("point_2d", "point", "coordinate", "click")


def from_corners(numbers: Sequence[float]) -> Box:
    """Box of (x1, y1, x2, y2): Qwen2.5-VL's, InternVL's and most others' form."""
    return _ordered(Box(*map(float, numbers)))


def from_width(numbers: Sequence[float]) -> Box:
    """Box of (x1, y1, width, height): COCO's form."""
    x, y, width, height = map(float, numbers)
    return _ordered(Box(x, y, x + width, y + height))


def from_centre(numbers: Sequence[float]) -> Box:
    """Box of (x, y, width, height) with the centre (x, y): DETR's and YOLO's form."""
    x, y, width, height = map(float, numbers)
    return _ordered(Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2))


def from_rows(numbers: Sequence[float]) -> Box:
    """Box of (y1, x1, y2, x2): Gemini's form, and the order of PaliGemma's locations."""
    y1, x1, y2, x2 = map(float, numbers)
    return _ordered(Box(x1, y1, x2, y2))


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """|A ∩ B| / |A ∪ B| of two boxes in [0, 1]; 0 if both have no area.

    Raises:
        ValueError: for a box whose corners are in the wrong order or not finite.
    """
    return float(ious([a], [b])[0, 0])


def ious(given: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> np.ndarray:
    """`iou` of every box of `given` with every box of `wanted`, [len(given), len(wanted)].

    Raises:
        ValueError: as `iou`.
    """
    a, b = (
        np.array([_ordered(Box(*box)) for box in x], float).reshape(-1, 4) for x in (given, wanted)
    )
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0.0), axis=-1)
    area = lambda x: np.prod(x[:, 2:] - x[:, :2], axis=-1)
    union = area(a)[:, None] + area(b)[None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def matched(scores: np.ndarray) -> np.ndarray:
    """The scores of the one-to-one matching of rows and columns that has the largest sum.

    Kuhn, 1955, doi.org/10.1002/nav.3800020109, as detectors are trained with: Carion et al., 2020,
    arxiv.org/abs/2005.12872, section 3.1.

    Args:
        scores: [N, M], at least 0.

    Returns:
        min(N, M) scores.
    """
    from scipy.optimize import linear_sum_assignment  # half a second of each process of verifiers

    rows, columns = linear_sum_assignment(scores, maximize=True)
    return scores[rows, columns]


def holds(box: Sequence[float], point: Sequence[float]) -> bool:
    """True if the point lies in the box, its border included."""
    x1, y1, x2, y2 = box
    return x1 <= point[0] <= x2 and y1 <= point[1] <= y2


def in_mask(mask: np.ndarray, point: Sequence[float]) -> bool:
    """True if the pixel of the point (x, y) is set in a mask [height, width]; False outside the image."""
    x, y = (math.floor(value) for value in point)
    height, width = np.shape(mask)
    return 0 <= x < width and 0 <= y < height and bool(np.asarray(mask)[y, x])


def dice(given: np.ndarray, wanted: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two masks of one shape; 1 if both are empty. Dice, 1945.

    Raises:
        ValueError: for masks of different shapes.
    """
    a, b = np.asarray(given, bool), np.asarray(wanted, bool)
    if a.shape != b.shape:
        raise ValueError(f"dice: masks of the shapes {a.shape} and {b.shape}; they must be equal.")
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def read_boxes(text: str, form: Form = from_corners) -> list[Box]:
    """The boxes of an answer, in order; empty if it states none.

    Read are, in this order: JSON with "bbox_2d", "bbox", "box_2d" or "box" (in a fence or not), PaliGemma's
    <loc0000> in fours (rows first, in 1024ths, whatever `form` says), pairs of corners (x1,y1),(x2,y2) as in
    Qwen-VL's <box>, four numbers in brackets, and four numbers without. Only the first of these forms that
    occurs counts. The answer is what follows </think>, and within it the last <answer>. A box whose corners
    are in the wrong order is left out: no image has it.

    Args:
        form: what four numbers mean; (x1,y1),(x2,y2) are always corners.
    """
    text = answer_part(text)
    if values := list(_values_of(text, _BOX_KEYS, 4)):
        return _boxes(values, form)
    if found := _LOCATIONS.findall(text):
        return _boxes([[int(x) / 1024 for x in four] for four in found], from_rows)
    if found := _TWO_POINTS.findall(text):
        return _boxes(found, from_corners)
    if found := _FOUR.findall(text):
        return _boxes(found, form)
    bare = _BARE.fullmatch(text)
    return _boxes([bare.groups()], form) if bare else []


def read_point(text: str) -> tuple[float, float] | None:
    """The point (x, y) of an answer: the last one that it states, or None.

    Read are JSON with "point_2d", "point", "coordinate" or "click", two numbers in brackets, and two numbers
    without. The answer is what follows </think>, and within it the last <answer>.
    """
    text = answer_part(text)
    found = list(_values_of(text, _POINT_KEYS, 2)) or _POINT.findall(text)
    if not found and (bare := _BARE_POINT.fullmatch(text)):
        found = [bare.groups()]
    return (float(found[-1][0]), float(found[-1][1])) if found else None


def answer_part(text: str) -> str:
    """Returns what follows the last </think>, and within it the last <answer>...</answer>, if any."""
    text = text.rpartition("</think>")[2]
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[-1] if found else text


def _boxes(rows, form):
    found = []
    for row in rows[:MOST]:
        try:
            found.append(form([float(x) for x in row]))
        except ValueError:
            continue
    return found


def _ordered(box):
    finite = all(map(math.isfinite, box))
    if not finite or box.x1 > box.x2 or box.y1 > box.y2:
        raise ValueError(
            f"a box ({', '.join(f'{x:g}' for x in box)}): expected x1 <= x2 and y1 <= y2, finite; "
            "give the corner at the left and top first."
        )
    return box


def _values_of(text, keys, size):
    """Yields the lists of `size` numbers under these keys in the JSON of a text; whole lists of them too."""
    for found in re.finditer(rf'"(?:{"|".join(keys)})"\s*:\s*', text):
        yield from _lists(_json_at(text, found.end()), size)


def _json_at(text: str, place: int) -> Any:
    """The JSON value that begins at a place of a text; None if it is broken."""
    try:
        return json.JSONDecoder().raw_decode(text, place)[0]
    except (ValueError, RecursionError):
        return None


def _lists(value, size):
    """Yields `value`, or its items, if they are lists of `size` finite numbers."""
    number = lambda x: type(x) in (int, float) and math.isfinite(x)
    if isinstance(value, list) and len(value) == size and all(map(number, value)):
        yield value
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, list) and len(one) == size and all(map(number, one)):
                yield one
