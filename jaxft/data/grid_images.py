"""Qwen2.5-VL's image processor: images keep their proportions and are cut into patches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.images import Pixels, image_size, read_image
from jaxft.data.media import Media
from jaxft.data.media_rows import Columns

_MAX_RATIO = 200  # of an image's sides


@dataclasses.dataclass(frozen=True)
class GridImages:
    """Images resized to whole blocks of s x s patches, with a token for each block.

    Wang et al., 2024, arxiv.org/abs/2409.12191, section 2.1.

    Attributes:
        patch: side of a patch in pixels.
        merge: s.
        window: side of a window in blocks.
        min_pixels, max_pixels: of the resized image.
        pixels: the settings of the values.
    """

    patch: int
    merge: int
    window: int
    min_pixels: int
    max_pixels: int
    pixels: Pixels
    placeholder: str = "<|image_pad|>"
    kind: str = "image"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The columns `patches` and `places`, with an entry for each block."""
        joined = self.merge**2
        return {"patches": (joined, 3 * self.patch**2), "places": (joined, 3)}

    def size(self, media: Media) -> tuple[int, int]:
        """(height, width) in pixels after the resize.

        Raises:
            DataError: for an image that is more than 200 times as long as wide.
        """
        width, height = image_size(media)
        if max(height, width) > _MAX_RATIO * min(height, width):
            raise DataError(
                f"the image {media} has {width} x {height} pixels; expected sides of a ratio of at most "
                f"{_MAX_RATIO}.",
                "schema",
            )
        factor = self.patch * self.merge
        near = lambda side: round(side / factor) * factor
        if near(height) * near(width) > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            below = lambda side: max(factor, math.floor(side / shrink / factor) * factor)
            return below(height), below(width)
        if near(height) * near(width) < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            above = lambda side: math.ceil(side * grow / factor) * factor
            return above(height), above(width)
        return near(height), near(width)

    def blocks(self, media: Media) -> tuple[int, int]:
        """(rows, columns) of the blocks of an image."""
        height, width = self.size(media)
        return height // self.patch // self.merge, width // self.patch // self.merge

    def text(self, media: Media) -> str:
        """A token for each block; reads the image, so that a damaged one is refused."""
        read_image(media)
        return self.placeholder * math.prod(self.blocks(media))

    def counts(self, media: Media) -> dict[str, int]:
        """The number of blocks."""
        count = math.prod(self.blocks(media))
        return {"patches": count, "places": count}

    def arrays(self, media: Media) -> Columns:
        """`patches` [blocks, s², 3 p²] float32, `places` [blocks, s², 3] int32: row, column, window."""
        (height, width), p, s = self.size(media), self.patch, self.merge
        image = read_image(media).resize((width, height), self.pixels.resample)
        values = self.pixels(np.asarray(image))
        rows, columns = height // p // s, width // p // s
        patches = values.reshape(rows, s, p, columns, s, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        row, column = np.meshgrid(np.arange(rows * s), np.arange(columns * s), indexing="ij")
        across = -(-columns // self.window)
        window = row // s // self.window * across + column // s // self.window
        places = np.stack([row, column, window], axis=-1) + 1
        places = places.reshape(rows, s, columns, s, 3).swapaxes(1, 2)
        return {
            "patches": patches.reshape(rows * columns, s * s, -1),
            "places": places.reshape(rows * columns, s * s, 3).astype(np.int32),
        }
