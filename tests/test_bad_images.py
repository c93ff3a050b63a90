"""Files of images that are damaged or far too large: one sentence each."""

import struct
import warnings
import zlib

import numpy as np
import pytest

from equigemma.images import as_rgb


PIL = pytest.importorskip("PIL.Image", reason="reading files is the extra `images`")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file that claims a size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(30_000, 6_000), (60_000, 60_000), (2**31 - 1, 1)], ids=str)
def test_files_that_claim_too_many_pixels(size, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(ValueError, match="bomb.png cannot be read .* it has so many pixels"):
        as_rgb(path)


@pytest.mark.slow
def test_large_files_are_read_without_a_warning(tmp_path):
    """Pillow warns of half of what it refuses."""
    width, height = 9_500, 9_500
    assert PIL.MAX_IMAGE_PIXELS < width * height < 2 * PIL.MAX_IMAGE_PIXELS
    path = tmp_path / "large.png"
    rows = b"\0" + bytes(3 * width)
    path.write_bytes(png(width, height, rows * height))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_rgb(path).shape == (height, width, 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff"])
def test_damaged_files(kind, tmp_path):
    """Some damage cannot be seen; all that can is one sentence."""
    rng = np.random.default_rng(0)
    whole = tmp_path / f"whole.{kind}"
    PIL.fromarray(rng.integers(0, 256, (13, 17, 3)).astype(np.uint8)).save(whole)
    content, path, refused = whole.read_bytes(), tmp_path / f"damaged.{kind}", 0
    for _ in range(200):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for _ in range(rng.integers(0, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            shown = as_rgb(path)
        except ValueError as error:
            refused += 1
            assert "cannot be read as an image" in str(error) and "\n" not in str(error)
        else:
            assert shown.dtype == np.uint8 and shown.ndim == 3
    assert refused > 50
