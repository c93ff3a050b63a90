"""Sound as arrays: files and arrays of any kind become mono samples at the rate of a model.

What a model hears in them is decided in `nn`. WAV files need no library, other formats the extra
`audio`.
"""

from math import gcd
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from equigemma._wav import is_wav, read_header, read_samples


Sound = Any
"""A path, an array of samples at the rate of the model, or such an array and its own rate.

Arrays are `[samples]` or `[samples, channels]`: floats from −1 to 1, `int16`, `int32` or `uint8`.
"""

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
MAX_CHANNELS = 32
BLOCK = 1 << 20
"""Samples of each channel that are read at once."""


def as_mono(sound: Sound, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """`float32[samples]` at `sample_rate`: the mean of all channels, resampled.

    Resampling is by a polyphase filter, a windowed sinc (Kaiser, β = 5) that cuts off at half of
    the lower rate: `scipy.signal.resample_poly` with its default window.

    ```python
    >>> import numpy as np
    >>> from equigemma.audio import as_mono
    >>> as_mono(np.array([[0, 16384], [8192, 8192]], np.int16), 16_000).tolist()  # stereo
    [0.25, 0.25]
    >>> as_mono((np.zeros(44_100, np.float32), 44_100), 16_000).shape  # a second
    (16000,)

    ```

    **Arguments:**

    - `sound`: a WAV file (or one that `soundfile` reads), an array `[samples]` or
      `[samples channels]` that is taken to be at `sample_rate`, or a pair of such an array and its
      rate.
    - `sample_rate`: samples per second of the result.
    - `max_seconds`: a longer sound is refused, before it is read where the file says how long it
      is.

    **Returns:** `float32[samples]`.

    **Raises:** `ValueError` for anything else than sound, no samples, or samples that are not
    finite; `ImportError` for a file that is not WAV, if `soundfile` is not installed.
    """
    if isinstance(sound, str | PathLike):
        path = Path(sound).expanduser()
        samples, rate = _read(path, max_seconds)
        name = str(path)
    else:
        samples, rate = sound if _has_rate(sound) else (sound, sample_rate)
        name = "The sound"
    samples = _as_floats(np.asarray(samples), name)
    rate = _checked_rate(rate, name)
    if max_seconds is not None:
        _check_length(len(samples) / rate, max_seconds, name)
    mono = samples if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(_resampled(mono, rate, sample_rate))


def _has_rate(sound: Sound) -> bool:
    return isinstance(sound, tuple) and len(sound) == 2 and np.ndim(sound[1]) == 0


def _as_floats(samples: np.ndarray, name: str) -> np.ndarray:
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} must be samples: a path, or an array [samples] or [samples, channels] of "
            f"numbers; got {samples.dtype}{list(samples.shape)}."
        )
    if samples.ndim == 2 and samples.shape[1] > MAX_CHANNELS:
        raise ValueError(
            f"{name} has {samples.shape[1]} channels, got {samples.dtype}{list(samples.shape)}. "
            "Channels are the last axis: transpose an array [channels, samples]."
        )
    if not samples.size:
        raise ValueError(f"{name} has no samples.")
    match samples.dtype.name:
        case "int16" | "int32":
            return (samples / 2.0 ** (8 * samples.dtype.itemsize - 1)).astype(np.float32)
        case "uint8":
            return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind != "f":
        raise ValueError(f"{name} must be float, int16, int32 or uint8, got {samples.dtype}.")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} has samples that are not finite.")
    return samples.astype(np.float32)


def _checked_rate(rate: Any, name: str) -> int:
    is_number = isinstance(rate, int | float | np.integer | np.floating)
    if not is_number or not LOWEST_RATE <= rate <= HIGHEST_RATE or rate != int(rate):
        raise ValueError(
            f"{name} must have a whole number of samples per second, from {LOWEST_RATE} to "
            f"{HIGHEST_RATE}; got {rate}."
        )
    return int(rate)


def _check_length(seconds: float, most: float, name: str) -> None:
    if seconds > most:
        raise ValueError(
            f"{name} is {seconds:.6g} seconds long, and the model hears at most {most:.6g} seconds "
            "at once. Cut it into clips."
        )


def _resampled(mono: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    if rate == sample_rate:
        return mono
    # A part of scipy that jax itself does not import, and that takes a while to import.
    from scipy.signal import resample_poly

    common = gcd(rate, sample_rate)
    return resample_poly(mono, sample_rate // common, rate // common).astype(np.float32)


def _read(path: Path, max_seconds: float | None) -> tuple[np.ndarray, int]:
    if not path.is_file():
        raise ValueError(f"{path} cannot be read as sound: there is no such file.")
    if not is_wav(path):
        return _read_by_soundfile(path, max_seconds)
    try:
        header = read_header(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as sound: {error}.") from error
    if max_seconds is not None:
        _check_length(header.samples / header.sample_rate, max_seconds, str(path))
    return read_samples(path, header), header.sample_rate


def _read_by_soundfile(path: Path, max_seconds: float | None) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f"{path} is not a WAV file. Reading other formats needs soundfile, which is not "
            'installed: pip install "equigemma[audio]".'
        ) from error
    try:
        with soundfile.SoundFile(str(path)) as file:
            return _in_blocks(file, max_seconds, str(path)), file.samplerate
    except soundfile.SoundFileError as error:
        raise ValueError(
            f"{path} cannot be read as sound: its format is not known, or it is damaged."
        ) from error


def _in_blocks(file: Any, max_seconds: float | None, name: str) -> np.ndarray:
    """All samples of a file, whose header may claim any number of them."""
    blocks, total = [np.zeros((0, file.channels), np.float32)], file.frames
    while True:
        if max_seconds is not None:
            _check_length(total / file.samplerate, max_seconds, name)
        blocks.append(file.read(BLOCK, dtype="float32", always_2d=True))
        if not len(blocks[-1]):
            return np.concatenate(blocks)
        total = sum(map(len, blocks))
