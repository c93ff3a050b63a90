"""WAV files: a header that says what the samples are, and the samples.

Read here rather than by a library, because every one that is not an extra leaves out a kind of
sample, or allocates as much memory as the header claims.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np


PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
UNKNOWN_LENGTH = 0xFFFFFFFF
"""Of samples that were written to a pipe."""


@dataclass(frozen=True, kw_only=True)
class WavHeader:
    """What a file says about its samples, and where they are."""

    kind: int
    channels: int
    sample_rate: int
    bits: int
    start: int
    """Where the samples start, in bytes."""
    samples: int
    """Of each channel."""


def is_wav(path: Path) -> bool:
    """Whether a file starts like a WAV file."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WAVE"


def read_header(path: Path) -> WavHeader:
    """The header of a WAV file, checked against the file's size.

    **Raises:** `ValueError` if the file is cut off, or of a kind that is not supported.
    """
    size, form = path.stat().st_size, None
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            name, length = head[:4], struct.unpack("<I", head[4:])[0]
            start = file.tell()
            if name == b"data" and form is not None:
                return _header(form, start, length, size - start)
            if name == b"fmt " and length >= 16:
                form = file.read(min(length, 40))
            # Chunks are padded to an even length.
            file.seek(start + length + length % 2)
    raise ValueError("it has no samples")


def _header(form: bytes, start: int, length: int, available: int) -> WavHeader:
    kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", form[:16])
    if kind == EXTENSIBLE and len(form) >= 26:
        kind = struct.unpack("<H", form[24:26])[0]
    if (kind, bits) not in _DTYPES:
        raise ValueError(f"its samples are of kind {kind} with {bits} bits, which is not supported")
    if not channels or not rate or frame != channels * bits // 8:
        raise ValueError("its header contradicts itself")
    if length in (0, UNKNOWN_LENGTH):
        length = available
    if length > available:
        raise ValueError(f"it is cut off: {length} bytes of samples are announced, {available} are")
    return WavHeader(
        kind=kind,
        channels=channels,
        sample_rate=rate,
        bits=bits,
        start=start,
        samples=length // frame,
    )


_DTYPES = {
    (PCM, 8): np.dtype("u1"),
    (PCM, 16): np.dtype("<i2"),
    (PCM, 24): np.dtype("u1"),
    (PCM, 32): np.dtype("<i4"),
    (FLOAT, 32): np.dtype("<f4"),
    (FLOAT, 64): np.dtype("<f8"),
}


def read_samples(path: Path, header: WavHeader) -> np.ndarray:
    """`float32[samples channels]`; integers are divided by the largest of their kind."""
    dtype = _DTYPES[header.kind, header.bits]
    count = header.samples * header.channels
    shape = (header.samples, header.channels)
    with path.open("rb") as file:
        file.seek(header.start)
        data = file.read(count * header.bits // 8)
    if header.bits == 24:
        # Three bytes each, the least significant first, become the upper ones of four.
        wide = np.zeros((count, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(count, 3)
        return (wide.view("<i4").reshape(shape) / 2.0**31).astype(np.float32)
    samples = np.frombuffer(data, dtype).reshape(shape)
    if header.kind == FLOAT:
        return samples.astype(np.float32)
    if header.bits == 8:
        return ((samples.astype(np.float32) - 128) / 128).astype(np.float32)
    return (samples / 2.0 ** (header.bits - 1)).astype(np.float32)
