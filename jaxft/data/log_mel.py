"""Log-mel features of sound, those of Whisper and Qwen2-Audio."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.processor_files import processor_settings

_LOUDEST, _RANGE = 1e-10, 8.0  # the smallest power, and decades below the largest that are kept
# Settings of preprocessor_config.json with an effect, and the only value that is computed.
_FIXED = {"padding_value": 0.0, "dither": 0.0, "do_normalize": False, "padding_side": "right"}
_READS = {
    "feature_size": "mel",
    "sampling_rate": "rate",
    "hop_length": "hop",
    "n_fft": "window",
    "chunk_length": "seconds",
}


@dataclasses.dataclass(frozen=True)
class LogMel:
    """Log-mel features of windows of a fixed length, as transformers' WhisperFeatureExtractor computes them.

    Radford et al., 2022, arxiv.org/abs/2212.04356, section 2.2: 25 ms windows every 10 ms, Slaney's mel
    scale, decimal logarithms, at most 8 below the largest, divided by 4 and shifted by 1.
    """

    mel: int = (
        80  # features of a frame: 80 for Whisper up to large-v2, 128 for large-v3 and Qwen2-Audio
    )
    rate: int = 16000  # samples per second
    hop: int = 160  # samples between frames
    window: int = 400  # samples of a frame
    seconds: int = 30  # length of the window; shorter clips are padded with silence

    @property
    def length(self) -> int:
        """Samples of the window."""
        return self.rate * self.seconds

    @property
    def frames(self) -> int:
        """Frames of the window."""
        return self.length // self.hop

    def __call__(self, samples: np.ndarray, name: str = "the clip") -> np.ndarray:
        """Returns the features [frames, mel] float32 of samples [N].

        Raises:
            DataError: for a clip that is longer than the window.
        """
        samples = np.asarray(samples, np.float32)
        self.check_length(len(samples), name)
        samples = np.pad(samples, (0, self.length - len(samples)))
        around = np.pad(samples, self.window // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(around, self.window)[:: self.hop]
        # Whisper drops the last frame.
        frames = frames[: self.frames] * np.hanning(self.window + 1)[:-1]
        power = np.abs(np.fft.rfft(frames)) ** 2
        filters = mel_filters(self.mel, self.window, self.rate)
        logs = np.log10(np.maximum(power @ filters, _LOUDEST))
        return ((np.maximum(logs, logs.max() - _RANGE) + 4) / 4).astype(np.float32)

    def check_length(self, samples: int, name: str = "the clip") -> None:
        """Raises DataError if a clip of so many samples is longer than the window."""
        if samples > self.length:
            raise DataError(
                f"{name} lasts {samples / self.rate:.1f} s, and the model reads {self.seconds} s at a time; "
                "cut it into shorter clips.",
                "too_long",
            )


@functools.lru_cache
def mel_filters(mel: int, window: int, rate: int) -> np.ndarray:
    """Returns the triangular filters [window / 2 + 1, mel] float64 from 0 to 8000 Hz, of equal areas.

    Their corners are equidistant on Slaney's mel scale (1998, Auditory Toolbox): linear up to 1000 Hz,
    logarithmic above. Each filter is divided by half its width in Hz.
    """
    low, high = _to_mel(0.0), _to_mel(8000.0)
    corners = _to_hertz(np.linspace(low, high, mel + 2))
    bins = np.linspace(0, rate // 2, window // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - bins) / np.diff(corners)[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return triangles * 2.0 / (corners[2:] - corners[:-2])


_LINEAR = 200 / 3  # Hz of a mel below 1000 Hz
_STEP = np.log(6.4) / 27  # natural logarithm of the ratio of frequencies one mel apart above it


def _to_mel(hertz):
    return hertz / _LINEAR if hertz < 1000 else 1000 / _LINEAR + np.log(hertz / 1000) / _STEP


def _to_hertz(mel):
    knee = 1000 / _LINEAR
    above = 1000 * np.exp(_STEP * (np.maximum(mel, knee) - knee))
    return np.where(mel < knee, mel * _LINEAR, above)


def read_log_mel(path: str | os.PathLike, mel: int, places: int) -> LogMel:
    """The features that a model's directory asks for by its processor's settings, if it has some.

    Args:
        path: the directory.
        mel: features that the model reads; without the file, Whisper's settings are taken.
        places: positions of the model's encoder.

    Raises:
        DataError: for settings that jaxft does not compute, or that do not fit the model.
    """
    file, given = processor_settings(pathlib.Path(path), "feature_extractor")
    for name, value in _FIXED.items():
        if given.get(name, value) not in (value, None):
            raise DataError(
                f"{file}: {name} is {given[name]!r}, which jaxft does not compute; expected {value!r}."
            )
    fields = {ours: given[theirs] for theirs, ours in _READS.items() if given.get(theirs)}
    wrong = {name: value for name, value in fields.items() if type(value) is not int or value < 1}
    if wrong:
        raise DataError(f"{file}: {wrong}, expected positive integers; correct the file.")
    if "seconds" not in fields:  # a model of another length
        fields["seconds"] = max(1, 2 * places * fields.get("hop", 160) // fields.get("rate", 16000))
    found = LogMel(**({"mel": mel} | fields))
    if found.mel != mel or found.frames != 2 * places:
        raise DataError(
            f"{file}: features [{found.frames}, {found.mel}], but the model reads [{2 * places}, {mel}]; "
            "copy the file from the model's repository."
        )
    return found
