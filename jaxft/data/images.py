"""Image processors in NumPy and Pillow, with the pixels of transformers' own ones (their Pillow backend)."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.media import ORIENTATION, Media
from jaxft.data.media_rows import Columns

MAX_PIXELS = 1 << 26  # of one image; more are taken for a decompression bomb
_LONGEST_SIDE = 4096  # of Idefics3's first resize
_PLAIN = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # formats whose header has the size of the pixels
# Modes of Pillow that have values other than 0 to 255.
_WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N", "LAB", "HSV")


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The settings that all processors have.

    Attributes:
        resample: Pillow's filter: 1 Lanczos, 2 bilinear, 3 bicubic.
        scale: factor of the values 0 to 255, applied first; None: none.
        mean, std: of each channel, applied next: (x - mean) / std; None: none.
    """

    resample: int
    scale: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """[..., H, W, 3] float32 of an image in uint8."""
        if self.scale is not None:
            image = (image.astype(np.float64) * self.scale).astype(np.float32)
        image = image.astype(np.float32)
        if self.mean is None:
            return image
        return (image - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


@dataclasses.dataclass(frozen=True)
class SquareImages:
    """Images resized to one square without regard to their proportions: SigLIP, PaliGemma.

    Attributes:
        size: of the square in pixels.
        pixels: the settings of the values.
        replacement: the text of an image.
        template: the chat template of models whose files have none.
    """

    size: int
    pixels: Pixels
    replacement: str
    placeholder: str = "<image>"
    kind: str = "image"
    template: str | None = None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The column `images` of squares."""
        return {"images": (self.size, self.size, 3)}

    def text(self, media: Media) -> str:
        """The same text for every image; reads the image, so that a damaged one is refused."""
        read_image(media)
        return self.replacement

    def counts(self, media: Media) -> dict[str, int]:
        """One square."""
        return {"images": 1}

    def arrays(self, media: Media) -> Columns:
        """`images` [1, size, size, 3] float32."""
        image = read_image(media).resize((self.size, self.size), self.pixels.resample)
        return {"images": self.pixels(np.asarray(image))[None]}


@dataclasses.dataclass(frozen=True)
class CroppedImages:
    """Images resized by their shorter side, of which the square in the middle is read: CLIP, LLaVA.

    Attributes:
        shortest: the shorter side in pixels after the resize.
        size: of the square, at most `shortest`.
        pixels, replacement, template: as for `SquareImages`.
        adds_bos: see `MediaReader`.
    """

    shortest: int
    size: int
    pixels: Pixels
    replacement: str
    placeholder: str = "<image>"
    kind: str = "image"
    template: str | None = None
    adds_bos: bool = False

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The column `images` of squares."""
        return {"images": (self.size, self.size, 3)}

    def text(self, media: Media) -> str:
        """The same text for every image; reads the image, so that one that cannot be is refused."""
        self._sides(media, read_image(media))
        return self.replacement

    def counts(self, media: Media) -> dict[str, int]:
        """One square."""
        return {"images": 1}

    def arrays(self, media: Media) -> Columns:
        """`images` [1, size, size, 3] float32."""
        image = read_image(media)
        width, height = self._sides(media, image)
        image = np.asarray(image.resize((width, height), self.pixels.resample))
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return {"images": self.pixels(image[top : top + self.size, left : left + self.size])[None]}

    def _sides(self, media, image):
        """(width, height) after the resize."""
        longer = int(self.shortest * max(image.size) / min(image.size))
        if longer * self.shortest > MAX_PIXELS:
            raise DataError(
                f"the image {media} of {image.size[0]} x {image.size[1]} pixels would be resized to "
                f"{longer} x {self.shortest}, expected at most {MAX_PIXELS} pixels; cut it.",
                "schema",
            )
        return (
            (self.shortest, longer) if image.size[0] <= image.size[1] else (longer, self.shortest)
        )


@dataclasses.dataclass(frozen=True)
class TiledImages:
    """Idefics3's and SmolVLM's images: resized, split into squares, and the whole image as one more square.

    Laurençon et al., 2024, arxiv.org/abs/2408.12637, section 3.

    Attributes:
        size: of a square in pixels.
        longest: the longest side of an image before it is split.
        tokens: of a square.
        split: whether images are split; otherwise each is one square.
        pixels: the settings of the values.
    """

    size: int
    longest: int
    tokens: int
    pixels: Pixels
    split: bool = True
    placeholder: str = "<image>"
    kind: str = "image"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The column `images` of squares."""
        return {"images": (self.size, self.size, 3)}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the squares of an image; (0, 0): it is one square."""
        height, width = self._first_size(height, width)
        if not self.split:
            return 0, 0
        height, width = self._second_size(height, width)
        if height <= self.size and width <= self.size:
            return 0, 0
        return height // self.size, width // self.size

    def text(self, media: Media) -> str:
        """The tokens of each square, row by row, with its place, and those of the whole image."""
        width, height = read_image(media).size
        rows, columns = self.grid(height, width)
        square = lambda name: f"<fake_token_around_image>{name}{self.placeholder * self.tokens}"
        place = lambda i, j: square(f"<row_{i + 1}_col_{j + 1}>")
        lines = ["".join(place(i, j) for j in range(columns)) + "\n" for i in range(rows)]
        whole = "\n" * bool(rows) + square("<global-img>")
        return "".join(lines) + whole + "<fake_token_around_image>"

    def counts(self, media: Media) -> dict[str, int]:
        """The number of squares."""
        width, height = image_size(media)
        rows, columns = self.grid(height, width)
        return {"images": rows * columns + 1}

    def arrays(self, media: Media) -> Columns:
        """`images` [squares, size, size, 3] float32."""
        image, size = read_image(media), self.size
        resized = lambda image, sides: image.resize(sides[::-1], self.pixels.resample)
        image = resized(image, self._first_size(*image.size[::-1]))
        if not self.split:
            return {"images": self.pixels(np.asarray(resized(image, (size, size))))[None]}
        image = resized(image, self._second_size(*image.size[::-1]))
        whole, (width, height) = np.asarray(image), image.size
        if height <= size and width <= size:
            return {"images": self.pixels(whole)[None]}
        tiles = whole.reshape(height // size, size, width // size, size, 3).swapaxes(1, 2)
        last = np.asarray(resized(image, (size, size)))
        return {"images": self.pixels(np.stack([*tiles.reshape(-1, size, size, 3), last]))}

    def _first_size(self, height, width):
        """(height, width) with the longest side `longest`; the other is even."""
        ratio, longest = width / height, self.longest
        if width >= height:
            width, height = longest, int(longest / ratio)
            height += height % 2
        else:
            height, width = longest, int(longest * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > _LONGEST_SIDE:
            width, height = _LONGEST_SIDE, int(_LONGEST_SIDE / ratio)
        elif height > width and height > _LONGEST_SIDE:
            height, width = _LONGEST_SIDE, int(_LONGEST_SIDE * ratio)
        return max(height, 1), max(width, 1)

    def _second_size(self, height, width):
        """(height, width) in whole squares."""
        whole = lambda side: math.ceil(side / self.size) * self.size
        ratio = width / height
        if width >= height:
            width = whole(width)
            return whole(int(width / ratio)), width
        height = whole(height)
        return height, whole(int(height * ratio))


def image_size(media: Media) -> tuple[int, int]:
    """(width, height) in pixels, as `read_image` has them; from the file's header where it has them."""
    if not isinstance(media.value, (str, bytes)):
        return read_image(media).size
    with _opened(media) as image:
        # Pillow turns some kinds of files itself, at once or when they are loaded.
        if image.format in _PLAIN and image.getexif().get(ORIENTATION, 1) == 1:
            return image.size
    return read_image(media).size


def read_image(media: Media) -> Any:
    """The image as a Pillow image in RGB, turned as its camera says, on white where it is transparent.

    Raises:
        DataError: if it is missing, damaged or of another kind; if it has more than MAX_PIXELS, or values
            other than 0 to 255.
    """
    from PIL import Image, ImageOps

    value = media.value
    if not isinstance(value, (str, bytes)) and not hasattr(value, "getbands"):
        return _from_array(media, np.asarray(value))
    with _opened(media) as image:
        if image.mode in _WIDE:
            raise DataError(
                f"the image {media} has the mode {image.mode}, whose values are not 0 to 255; save it in "
                "RGB or in grey of 8 bits.",
                "schema",
            )
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(media, error) from None
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _opened(media):
    """The Pillow image of a file, whose header has been read and checked."""
    from PIL import Image, UnidentifiedImageError

    if hasattr(media.value, "getbands"):
        return _checked(media, media.value.copy())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(media.path if media.path else io.BytesIO(media.value))
    except Image.DecompressionBombError as error:
        raise DataError(f"the image {media}: {error}; reduce it.", "schema") from None
    except FileNotFoundError:
        raise DataError(f"the image {media.path!s:.200}: no such file.", "schema") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise _damaged(media, error) from None
    return _checked(media, image)


def _checked(media, image):
    width, height = image.size
    if width * height > MAX_PIXELS or width * height < 1:
        raise DataError(
            f"the image {media} has {width} x {height} pixels, expected 1 to {MAX_PIXELS}; reduce it.",
            "schema",
        )
    return image


def _damaged(media, error):
    reason = " ".join(str(error).split())[:80]
    return DataError(
        f"the image {media} cannot be read ({reason}); save it again as PNG or JPEG.", "schema"
    )


def _from_array(media, array):
    from PIL import Image

    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    integers = array.dtype.kind in "ui" and array.size and 0 <= array.min() and array.max() <= 255
    if not fits or not integers:
        raise DataError(
            f"an image of the shape {array.shape} and type {array.dtype}; expected [height, width] or "
            "[height, width, 1, 3 or 4] of whole numbers from 0 to 255.",
            "schema",
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise DataError(
            f"an image of {array.shape[:2]} pixels, expected at most {MAX_PIXELS}.", "schema"
        )
    array = array.astype(np.uint8)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    return read_image(Media("image", Image.fromarray(array)))
