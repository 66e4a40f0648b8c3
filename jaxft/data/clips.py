"""The processor of a model that hears: the log-mel features of a clip as a column of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxft.data.audio import read_clip
from jaxft.data.errors import DataError
from jaxft.data.log_mel import LogMel
from jaxft.data.media import MARKERS, Media
from jaxft.data.media_rows import Columns
from jaxft.models.sound import embeddings_of


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """A `MediaReader` of clips, whose features [frames, mel] are an entry of a column.

    Attributes:
        features: of the model.
        column: the column of the batch.
        resample: convert clips of another rate.
        mix: average the channels of clips.
        placeholder: what stands for a clip in a rendered text.
        token: the text of an embedding, of models that have as many in a text as a clip has embeddings;
            "": only the encoder reads the clip.
        lengths: the column of the frames of each clip, of such models.
    """

    features: LogMel
    column: str = "source"
    resample: bool = False
    mix: bool = False
    placeholder: str = MARKERS["audio"]
    token: str = ""
    lengths: str = ""
    kind: str = "audio"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Column -> the shape of one of its entries."""
        shape = {self.column: (self.features.frames, self.features.mel)}
        return shape | ({self.lengths: ()} if self.lengths else {})

    def text(self, media: Media) -> str:
        """The text that stands for a clip: a token for each of its embeddings, or none.

        Raises:
            DataError: see `read_clip`; or for a clip that is longer than the features, or too short for any.
        """
        count = embeddings_of(self._frames(self._samples(media)))
        if self.token and not count:
            raise DataError(
                f"{media} is too short: the model hears nothing of it; remove it.", "audio"
            )
        return self.token * count

    def counts(self, media: Media) -> dict[str, int]:
        """Column -> the number of its entries of a clip."""
        del media
        return dict.fromkeys(self.shapes, 1)

    def arrays(self, media: Media) -> Columns:
        """Column -> entries [1, frames, mel]."""
        samples = self._samples(media)
        found = {self.column: self.features(samples, str(media))[None]}
        frames = np.array([self._frames(samples)], np.int32)
        return found | ({self.lengths: frames} if self.lengths else {})

    def _frames(self, samples):
        return -(-len(samples) // self.features.hop)

    def _samples(self, media) -> np.ndarray:
        options = {"resample": self.resample, "mix": self.mix}
        samples = read_clip(media, self.features.rate, **options)
        self.features.check_length(len(samples), str(media))
        return samples
