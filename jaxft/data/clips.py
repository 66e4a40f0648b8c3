"""The processor of a model that hears: the log-mel features of a clip as a column of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxft.data.audio import read_clip
from jaxft.data.log_mel import LogMel
from jaxft.data.media import MARKERS, Media
from jaxft.data.media_rows import Columns


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """A `MediaReader` of clips, whose features [frames, mel] are an entry of a column."""

    features: LogMel
    column: str = "source"
    resample: bool = False  # convert clips of another rate
    mix: bool = False  # average the channels of clips
    placeholder: str = MARKERS["audio"]
    kind: str = "audio"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Column -> the shape of one of its entries."""
        return {self.column: (self.features.frames, self.features.mel)}

    def text(self, media: Media) -> str:
        """The text that stands for a clip: none, the encoder reads it.

        Raises:
            DataError: see `read_clip`; or for a clip that is longer than the features.
        """
        self._samples(media)
        return ""

    def counts(self, media: Media) -> dict[str, int]:
        """Column -> the number of its entries of a clip."""
        del media
        return {self.column: 1}

    def arrays(self, media: Media) -> Columns:
        """Column -> entries [1, frames, mel]."""
        return {self.column: self.features(self._samples(media), str(media))[None]}

    def _samples(self, media) -> np.ndarray:
        options = {"resample": self.resample, "mix": self.mix}
        samples = read_clip(media, self.features.rate, **options)
        self.features.check_length(len(samples), str(media))
        return samples
