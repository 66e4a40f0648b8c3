"""Clips of sound: reading of WAV, FLAC and arrays, checks, resampling."""

from __future__ import annotations

import io
import math
import wave
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.errors import DataError
from jaxft.data.media import read_media

_RATES = (1000, 1 << 20)  # samples per second that a clip may have
_LOUDEST = 16.0  # decoders of lossy files exceed 1 a little, whole numbers as floats by far
# Values of PCM are divided by these, as soundfile does; 8 bits are unsigned around 128.
_PCM = {1: ("u1", 2.0**7), 2: ("<i2", 2.0**15), 4: ("<i4", 2.0**31)}


class Sound(NamedTuple):
    """Samples in -1..1."""

    samples: np.ndarray  # [N] or [N, channels] float32
    rate: int  # samples per second


def read_clip(
    clip: Any, rate: int = 16000, *, resample: bool = False, mix: bool = False
) -> np.ndarray:
    """Returns the samples [N] float32 of a clip of one channel at `rate` samples per second.

    Args:
        clip: a `Sound`, a `Media`, or what `read_media` reads: the path of a WAV or FLAC file (or of another
            kind that soundfile reads), its bytes, or a dict of `datasets` such as {"array", "sampling_rate"}.
        rate: that of the features.
        resample: converts another rate, by a polyphase filter; without it, another rate is an error.
        mix: averages the channels; without it, more than one is an error.

    Raises:
        DataError: for a missing, damaged or empty file, another rate, several channels, or values that are
            not finite.
        ModuleNotFoundError: for a file that only soundfile reads, which is not installed.
    """
    name, (samples, found) = read_sound(clip)
    if not _RATES[0] <= found <= _RATES[1]:
        raise _bad(
            f"{name} has {found} samples per second, expected {_RATES[0]} to {_RATES[1]}; correct its rate."
        )
    if samples.ndim == 2 and samples.shape[1] > 1:
        if not mix:
            raise _bad(
                f"{name} has {samples.shape[1]} channels, expected one; mix them: --mix, in Python mix=True."
            )
        samples = samples.mean(axis=1)
    samples = samples.reshape(-1)
    if not samples.size:
        raise _bad(f"{name} is empty: it has no samples; remove it.")
    if not np.isfinite(samples).all():
        raise _bad(f"{name} has samples that are not finite; record or convert it again.")
    if (loudest := float(np.abs(samples).max())) > _LOUDEST:
        raise _bad(
            f"{name} has samples up to {loudest:.6g}, expected -1..1; divide those of 16 bits by 32768."
        )
    if found == rate:
        return samples
    if not resample:
        raise _bad(
            f"{name} has {found} samples per second, expected {rate}; convert it: --resample, in Python "
            "resample=True."
        )
    from scipy.signal import resample_poly

    common = math.gcd(rate, found)
    return resample_poly(samples, rate // common, found // common).astype(np.float32)


def read_sound(clip: Any) -> tuple[str, Sound]:
    """Returns (name for messages, the sound) of a clip as it is stored; see `read_clip`."""
    if isinstance(clip, Sound):
        return "the clip", _checked("the clip", *clip)
    media = read_media("audio", clip)
    name, value = str(media), media.value
    if media.kind != "audio" or hasattr(value, "getbands"):
        raise _bad(f"{name} is an {media.kind}, expected a clip of sound.")
    if isinstance(value, bytes):
        return name, _decoded(name, value)
    if media.path is None:
        return name, _checked(name, value, media.rate)
    try:
        return name, _decoded(name, media.path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _bad(f"{media.path!s:.200}: {reason}; is the path right?") from None


def _decoded(name, content):
    if not content:
        raise _bad(f"{name} is empty: it has no bytes; remove it.")
    if content[:4] == b"RIFF" and (found := _wave(name, content)) is not None:
        return found
    try:
        import soundfile
    except ImportError:
        raise ModuleNotFoundError(
            f"{name} is not a WAV file of PCM; other kinds need the package soundfile: pip install "
            "'jaxft[audio]'"
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    except (soundfile.SoundFileError, TypeError) as error:
        raise _bad(f"{name}: not a readable sound file ({error}); convert it to WAV.") from None
    return Sound(samples, int(rate))


def _wave(name, content):
    """The sound of a WAV file of PCM; None for other encodings, such as floats."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            rate, count = file.getframerate(), file.getnframes()
            raw = file.readframes(count)
        at = content.find(b"fmt ") + 20  # of the bytes of a frame
        block = int.from_bytes(content[at : at + 2], "little")
    except wave.Error as error:
        if "unknown format" in str(error):
            return None
        raise _bad(f"{name}: a damaged WAV file ({error}); record or convert it again.") from None
    except EOFError:
        raise _bad(
            f"{name}: a damaged WAV file (it ends too early); record or convert it again."
        ) from None
    # Such as 24 bits in 4 bytes, which no reader here takes apart.
    if block != channels * width:
        raise _bad(
            f"{name}: a damaged WAV file ({block} bytes for {channels} samples of {8 * width} bits); "
            "convert it again."
        )
    if len(raw) != count * channels * width:
        raise _bad(
            f"{name}: a damaged WAV file (its header tells of {count} samples, "
            f"{len(raw) // (channels * width)} are there); record or convert it again."
        )
    if width == 3:  # as the upper bytes of 32 bits
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw = np.concatenate([np.zeros_like(parts[:, :1]), parts], axis=1).tobytes()
        width = 4
    if width not in _PCM:
        return None
    kind, scale = _PCM[width]
    values = np.frombuffer(raw, kind).astype(np.float64) - (128 if width == 1 else 0)
    samples = (values / scale).astype(np.float32).reshape(-1, channels)
    return Sound(samples[:, 0] if channels == 1 else samples, rate)


def _checked(name, samples, rate):
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
        raise _bad(
            f"{name}: an array {samples.shape} of {samples.dtype}; expected samples [N] or [N, channels] as "
            "floats in -1..1."
        )
    if samples.ndim == 2 and samples.shape[1] > max(samples.shape[0], 1):
        raise _bad(
            f"{name}: an array {samples.shape}, expected [N, channels]; transpose it if its first axis is "
            "that of the channels."
        )
    whole = isinstance(rate, (int, np.integer)) or (isinstance(rate, float) and rate.is_integer())
    if not whole or isinstance(rate, bool) or rate < 1:
        raise _bad(f"{name}: sampling_rate is {rate!r}, expected samples per second.")
    return Sound(samples.astype(np.float32), int(rate))


def _bad(message):
    return DataError(message, "audio")
