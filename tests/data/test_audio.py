"""Clips: what is read, what is refused, and log-mel features beside those of transformers."""

import io
import json
import struct
import wave

import numpy as np
import pytest

from jaxft.data import DataError, LogMel, Sound, read_clip, read_log_mel
from jaxft.data.audio import read_sound
from jaxft.data.log_mel import mel_filters

RATE = 16000


def tone(seconds=0.5, rate=RATE, hertz=440.0):
    return 0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def wav(samples, rate=RATE, width=2):
    """The bytes of a WAV file of samples [N] or [N, channels] in -1..1."""
    samples = np.asarray(samples)
    samples = samples if samples.ndim == 2 else samples[:, None]
    whole = np.round(samples * (2.0 ** (8 * width - 1) - 1)).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    raw = whole.astype("<i8").tobytes()
    cut = np.frombuffer(raw, np.uint8).reshape(-1, 8)[:, :width].tobytes()
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(cut)
    return stream.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_all_widths(width, tmp_path):
    expected = tone()
    (tmp_path / "a.wav").write_bytes(wav(expected, width=width))
    for clip in (
        str(tmp_path / "a.wav"),
        {"path": str(tmp_path / "a.wav")},
        wav(expected, width=width),
    ):
        found = read_clip(clip)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2.0 ** (2 - 8 * width) + 1e-7)


def test_other_kinds_are_those_of_soundfile(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="pip install 'jaxft[audio]'")
    for name, kind in (("a.flac", "PCM_16"), ("a.wav", "FLOAT"), ("b.wav", "PCM_24")):
        soundfile.write(tmp_path / name, tone(), RATE, subtype=kind)
        expected = soundfile.read(tmp_path / name, dtype="float32")[0]
        np.testing.assert_array_equal(read_clip(str(tmp_path / name)), expected)
    (tmp_path / "c.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:60] + b"?" * 900)
    with pytest.raises(DataError, match="not a readable sound file"):
        read_clip(str(tmp_path / "c.flac"))


def test_without_soundfile_other_kinds_name_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ModuleNotFoundError, match=r"is not a WAV file of PCM.*jaxft\[audio\]"):
        read_sound(b"fLaC and more")


def test_channels_are_mixed_and_rates_converted_on_request():
    left, right = tone(rate=8000), tone(rate=8000, hertz=300.0)
    stereo = {"array": np.stack([left, right], axis=1), "sampling_rate": 8000}
    with pytest.raises(DataError, match="has 2 channels, expected one; mix them: --mix"):
        read_clip(stereo)
    with pytest.raises(DataError, match="has 8000 samples per second, expected 16000; convert it"):
        read_clip(stereo, mix=True)
    found = read_clip(stereo, mix=True, resample=True)
    expected = (tone() + tone(hertz=300.0)) / 2
    assert len(found) == len(expected)
    middle = slice(400, -400)  # the filter sees silence beyond the ends
    np.testing.assert_allclose(found[middle], expected[middle], atol=2e-3)


BROKEN = struct.pack("<4sI4s", b"RIFF", 4, b"WAVE")


@pytest.mark.parametrize(
    "clip, message",
    [
        ("no_such.wav", "No such file or directory; is the path right"),
        (b"", "the audio .* is empty: it has no bytes|is empty: it has no bytes"),
        (wav(tone()[:0]), "is empty: it has no samples"),
        (wav(tone())[:-100], "its header tells of 8000 samples, 7950 are there"),
        (BROKEN, "a damaged WAV file"),
        (Sound(np.array([0.0, np.nan]), RATE), "samples that are not finite"),
        (Sound(np.zeros(3, np.int16), RATE), "expected samples .* as floats in -1..1"),
        (Sound(np.zeros(3), None), "sampling_rate is None"),
        (Sound(np.zeros((2, 2, 2)), RATE), "expected samples"),
    ],
)
def test_clips_that_cannot_be_read_are_refused(clip, message):
    with pytest.raises(DataError, match=message) as error:
        read_clip(clip)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mel", [80, 128])
def test_features_are_those_of_transformers(mel):
    """Both of its implementations: in float32 by torch, and in NumPy."""
    hf = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    extract = hf.WhisperFeatureExtractor(feature_size=mel, chunk_length=2)
    np.testing.assert_allclose(mel_filters(mel, 400, RATE), extract.mel_filters, atol=1e-12)
    rng = np.random.default_rng(0)
    ours = LogMel(mel, seconds=2)
    for samples in (tone(1.3) + 0.01 * rng.normal(size=20800), rng.normal(size=32000), np.zeros(7)):
        samples = samples.astype(np.float32)
        theirs = extract(samples, sampling_rate=RATE, return_tensors="np")["input_features"][0]
        found = ours(samples)
        assert found.shape == (ours.frames, mel) and found.dtype == np.float32
        np.testing.assert_allclose(found.T, theirs, atol=2e-4)
        whole = np.pad(samples, (0, ours.length - len(samples)))
        exact = extract._np_extract_fbank_features(whole[None], "cpu")[0]
        np.testing.assert_allclose(found.T, exact, atol=1e-5)


def test_features_of_a_chirp_in_a_window_of_30_s_and_of_a_tone():
    hf = pytest.importorskip("transformers")
    time = np.arange(2 * RATE) / RATE
    chirp = (0.3 * np.sin(2 * np.pi * (200 + 900 * time) * time)).astype(np.float32)
    found = LogMel(128)(chirp)
    whole = np.pad(chirp, (0, 28 * RATE))[None]
    exact = hf.WhisperFeatureExtractor(feature_size=128)._np_extract_fbank_features(whole, "cpu")[0]
    assert found.shape == (3000, 128)
    np.testing.assert_allclose(found.T, exact, atol=1e-5)
    peaks = LogMel(seconds=1)(tone(1.0, hertz=440.0)).argmax(axis=1)
    centre = np.argmin(np.abs(mel_filters(80, 400, RATE).argmax(axis=0) * 40 - 440))
    peaks = peaks[1:-1]  # the outer frames see the reflected samples
    assert (peaks == peaks[0]).all() and abs(int(peaks[0]) - centre) <= 1


def test_a_clip_longer_than_the_window_is_refused():
    with pytest.raises(
        DataError, match=r"the clip lasts 1\.5 s, and the model reads 1 s at a time"
    ):
        LogMel(seconds=1)(np.zeros(24000))


def test_settings_of_a_model_s_directory(tmp_path):
    assert read_log_mel(tmp_path, 80, 1500) == LogMel()
    file = tmp_path / "preprocessor_config.json"
    given = {"feature_size": 128, "chunk_length": 30, "hop_length": 160, "sampling_rate": RATE}
    file.write_text(json.dumps(given | {"n_fft": 400, "nb_max_frames": 3000, "dither": 0.0}))
    assert read_log_mel(tmp_path, 128, 1500) == LogMel(128)
    with pytest.raises(
        DataError, match=r"features \[3000, 128\], but the model reads \[3000, 80\]"
    ):
        read_log_mel(tmp_path, 80, 1500)
    file.write_text(json.dumps(given | {"dither": 0.1}))
    with pytest.raises(
        DataError, match="dither is 0.1, which jaxft does not compute; expected 0.0"
    ):
        read_log_mel(tmp_path, 128, 1500)
    file.write_text(json.dumps(given | {"hop_length": -1}))
    with pytest.raises(DataError, match="expected positive integers"):
        read_log_mel(tmp_path, 128, 1500)
