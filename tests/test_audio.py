"""Sound from files and arrays: kinds of samples, channels, rates, and what is refused."""

import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile
from scipy.signal import resample_poly

from equigemma._wav import read_header, read_samples
from equigemma.audio import as_mono


RATE = 16_000


def sound(length: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (length,) if channels is None else (length, channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_wav_files_equal_those_of_scipy(dtype, channels, tmp_path):
    samples = sound(97, channels)
    match dtype:
        case "uint8":
            stored = np.round(128 * samples + 128).clip(0, 255).astype(dtype)
        case "int16" | "int32":
            stored = np.round(samples * np.iinfo(dtype).max).astype(dtype)
        case _:
            stored = samples.astype(dtype)
    path = tmp_path / "a.wav"
    wavfile.write(path, RATE, stored)
    header = read_header(path)
    assert (header.sample_rate, header.channels, header.samples) == (RATE, channels, 97)
    ours = read_samples(path, header)
    assert ours.dtype == np.float32 and ours.shape == (97, channels)
    # A byte's step is 1/128, and 1 is beyond its largest; all other steps are finer.
    np.testing.assert_allclose(ours, samples, rtol=0, atol=1 / 128 if dtype == "uint8" else 1e-4)
    rate, theirs = wavfile.read(path)
    expected = as_mono(theirs, RATE)
    np.testing.assert_array_equal(as_mono(path, RATE), expected)
    np.testing.assert_array_equal(as_mono((theirs, rate), RATE), expected)


def test_wav_files_of_24_bits(tmp_path):
    path = tmp_path / "a.wav"
    numbers = np.array([0, 1, -1, 2**23 - 1, -(2**23), 12345, -54321])
    data = b"".join(int(number).to_bytes(3, "little", signed=True) for number in numbers)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(3)
        file.setframerate(RATE)
        file.writeframes(data)
    np.testing.assert_allclose(as_mono(path, RATE), numbers / 2**23, rtol=0, atol=1e-7)


def chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def wav(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def form(*numbers: int) -> bytes:
    """Kind, channels, rate, bytes per second, bytes of a frame, bits."""
    return chunk(b"fmt ", struct.pack("<HHIIHH", *numbers))


FORM = form(1, 1, RATE, 2 * RATE, 2, 16)
SAMPLES = np.array([0, 16384, -16384, 8192], np.int16).tobytes()


def test_headers_of_all_kinds(tmp_path):
    extensible = struct.pack("<HHIIHH", 0xFFFE, 1, RATE, 2 * RATE, 2, 16)
    extensible += struct.pack("<HHIH", 22, 16, 4, 1) + bytes(14)
    piped = b"data" + struct.pack("<I", 0xFFFFFFFF) + SAMPLES
    for content in (
        wav(FORM, chunk(b"data", SAMPLES)),
        wav(chunk(b"LIST", b"odd"), FORM, chunk(b"data", SAMPLES)),
        wav(chunk(b"fmt ", extensible), chunk(b"data", SAMPLES)),
        wav(FORM, piped),
        wav(FORM, chunk(b"data", SAMPLES), chunk(b"id3 ", b"tags")),
    ):
        path = tmp_path / "a.wav"
        path.write_bytes(content)
        assert as_mono(path, RATE).tolist() == [0, 0.5, -0.5, 0.25]


@pytest.mark.parametrize(
    "content, message",
    [
        (wav(), "it has no samples"),
        (wav(FORM), "it has no samples"),
        (wav(FORM, chunk(b"data", SAMPLES))[:-2], "it is cut off: 8 bytes"),
        (
            wav(form(85, 1, RATE, 1, 1, 0), chunk(b"data", b"mp3")),
            "kind 85 with 0 bits, which is not supported",
        ),
        (
            wav(form(1, 0, RATE, 1, 2, 16), chunk(b"data", b"ab")),
            "contradicts itself",
        ),
        (
            wav(form(1, 1, RATE, 1, 7, 16), chunk(b"data", b"ab")),
            "contradicts itself",
        ),
        (
            wav(form(1, 1, 10, 20, 2, 16), chunk(b"data", b"ab")),
            "samples per second, from 1000 to 768000; got 10",
        ),
        (wav(FORM, chunk(b"data", b"")), "has no samples"),
        (
            wav(
                form(3, 1, RATE, 4 * RATE, 4, 32),
                chunk(b"data", np.array([0, np.nan], np.float32).tobytes()),
            ),
            "samples that are not finite",
        ),
    ],
)
def test_damaged_wav_files(content, message, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        as_mono(path, RATE)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(place=st.integers(0, 60), byte=st.integers(0, 255), end=st.integers(0, 300))
def test_any_damage_is_one_sentence(tmp_path_factory, place, byte, end):
    pytest.importorskip("soundfile", reason="what is no longer WAV goes there")
    content = bytearray(wav(FORM, chunk(b"data", SAMPLES * 20)))
    content[min(place, len(content) - 1)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.wav"
    path.write_bytes(bytes(content[:end]))
    try:
        samples = as_mono(path, RATE, max_seconds=30)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert samples.dtype == np.float32 and samples.ndim == 1 and len(samples) <= 30 * RATE


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3", "aiff"])
def test_other_formats(kind, tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio`")
    path, time = tmp_path / f"a.{kind}", np.arange(8000) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(path, np.stack([tone, -0.5 * tone], axis=1), RATE)
    ours = as_mono(path, RATE)
    # Lossy formats keep a tone, delayed by a few samples.
    assert abs(np.abs(ours[1000:7000]).max() - 0.125) < 0.02
    if kind in ("flac", "aiff"):
        np.testing.assert_allclose(ours, tone / 4, rtol=0, atol=1e-4)


def test_without_the_library_of_other_formats(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC")
    with pytest.raises(ImportError, match=r'needs soundfile, .* pip install "equigemma\[audio\]"'):
        as_mono(path, RATE)


def test_files_that_are_not_sound(tmp_path):
    pytest.importorskip("soundfile", reason="else the library is asked for")
    text = tmp_path / "notes.txt"
    text.write_text("This is not sound.")
    with pytest.raises(ValueError, match="notes.txt cannot be read as sound: its format is not"):
        as_mono(text, RATE)
    for path in (tmp_path / "nowhere.wav", tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            as_mono(path, RATE)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_other_rates(rate):
    samples = sound(rate // 3, 2)
    expected = resample_poly(samples.astype(np.float32).mean(axis=1), RATE, rate)
    ours = as_mono((samples, rate), RATE)
    assert ours.dtype == np.float32 and abs(len(ours) - RATE / 3) <= 2
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_a_tone_keeps_its_pitch():
    time = np.arange(44_100) / 44_100
    ours = as_mono((np.sin(2 * np.pi * 1000 * time), 44_100), RATE)
    expected = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    # Away from the ends, where the filter hangs over.
    np.testing.assert_allclose(ours[500:-500], expected[500:-500], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros(0, np.float32), "The sound has no samples"),
        (np.zeros((0, 2), np.float32), "The sound has no samples"),
        (np.array([0.0, np.nan]), "samples that are not finite"),
        (np.array([0.0, -np.inf]), "samples that are not finite"),
        (np.zeros((2, 16_000), np.float32), r"transpose an array \[channels, samples\]"),
        (np.zeros((2, 3, 4), np.float32), r"got float32\[2, 3, 4\]"),
        (np.zeros(3, bool), r"got bool\[3\]"),
        (np.zeros(3, np.int64), "must be float, int16, int32 or uint8, got int64"),
        (np.array(["a"]), "must be samples: a path, or an array"),
        (None, "must be samples: a path, or an array"),
        ((np.zeros(3), 44_100.5), "whole number of samples per second, .* got 44100.5"),
        ((np.zeros(3), 0), "from 1000 to 768000; got 0"),
        ((np.zeros(3), float("nan")), "got nan"),
        ((np.zeros(3), float("inf")), "got inf"),
        ((np.zeros(3), "16000"), "got 16000"),
    ],
    ids=str,
)
def test_arrays_that_are_not_sound(given, message):
    with pytest.raises(ValueError, match=message):
        as_mono(given, RATE)


def test_sound_that_is_too_long(tmp_path):
    path = tmp_path / "a.wav"
    wavfile.write(path, 8_000, np.zeros(31 * 8_000, np.int16))
    for long in (path, (np.zeros(31 * 8_000, np.float32), 8_000)):
        with pytest.raises(ValueError, match="is 31 seconds long, .* at most 30 seconds"):
            as_mono(long, RATE, max_seconds=30)
    assert len(as_mono(path, RATE, max_seconds=31)) == 31 * RATE


def test_compressed_sound_that_is_too_long(tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio`")
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(40 * RATE, np.int16), RATE)
    with pytest.raises(ValueError, match="is 40 seconds long"):
        as_mono(path, RATE, max_seconds=30)
