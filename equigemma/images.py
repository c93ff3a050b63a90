"""Images as arrays: files, Pillow's images and arrays of any kind become `uint8[height width 3]`.

What a model sees in them is decided in `nn`. Pillow is needed for files only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np


Image = Any
"""A path, an array `uint8[height width]` or with 1 to 4 channels, or an image of Pillow's."""

WHITE = 255


def as_rgb(image: Image) -> np.ndarray:
    """`uint8[height width 3]`: grey is three equal colours, what is transparent shows white.

    ```python
    >>> import numpy as np
    >>> from equigemma.images import as_rgb
    >>> as_rgb(np.array([[0, 100]], np.uint8)).tolist()  # grey
    [[[0, 0, 0], [100, 100, 100]]]
    >>> as_rgb(np.array([[[0, 100, 200, 51]]], np.uint8)).tolist()  # a fifth of it is there
    [[[204, 224, 244]]]

    ```

    **Raises:** `ValueError` for anything else than an image; `ImportError` if it is a path, and
    Pillow is not installed.
    """
    if isinstance(image, Picture):
        return image.rgb
    if isinstance(image, str | PathLike):
        return as_rgb(_opened(Path(image)))
    if hasattr(image, "convert") and hasattr(image, "getbands"):
        image = _from_pillow(image)
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            "An image must be uint8[height, width] or uint8[height, width, channels] with 1 to 4 "
            f"channels, got {array.dtype}{list(array.shape)}."
        )
    if not array.size:
        raise ValueError(f"An image needs at least one pixel, got uint8{list(array.shape)}.")
    if array.shape[-1] in (1, 3):
        return np.broadcast_to(array, (*array.shape[:2], 3))
    colours, alpha = array[..., :-1].astype(np.float32), array[..., -1:].astype(np.float32) / WHITE
    mixed = np.rint(colours * alpha + WHITE * (1 - alpha)).astype(np.uint8)
    return np.broadcast_to(mixed, (*array.shape[:2], 3))


@dataclass(frozen=True, init=False)
class Picture:
    """An image as a value: pixels that stay as they are, whatever becomes of the file."""

    rgb: np.ndarray = field(repr=False, compare=False)
    """`uint8[height width 3]`."""
    path: str | None = field(compare=False)
    """The file that it was read from."""
    digest: bytes = field(repr=False)
    """The same for the same pixels, and for no others."""

    def __init__(self, image: Image):
        """Reads `image`; the errors are those of `as_rgb`."""
        rgb = np.array(as_rgb(image))
        rgb.setflags(write=False)
        path = fspath(image) if isinstance(image, str | PathLike) else None
        path = image.path if isinstance(image, Picture) else path
        digest = hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).digest()
        vars(self).update(rgb=rgb, path=path, digest=digest)


def as_list(images: Image | Sequence[Image]) -> list[Image]:
    """One image, or several, as a list."""
    if isinstance(images, str | PathLike | Picture) or hasattr(images, "getbands"):
        return [images]
    if getattr(images, "ndim", 4) < 4:
        return [images]
    return list(images)


def _opened(path: Path) -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError(
            "Reading images from files needs Pillow, which is not installed: "
            'pip install "equigemma[images]".'
        ) from error
    try:
        with Image.open(path) as image:
            # Cameras store how they were held; the pixels themselves stay as they came.
            return ImageOps.exif_transpose(image)
    except OSError as error:
        reason = "there is no such file" if not path.exists() else "it is no image that is known"
        raise ValueError(f"{path} cannot be read as an image: {reason}.") from error


def _from_pillow(image: Any) -> np.ndarray:
    has_alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        # Pillow would cut off what is brighter than 255.
        wide = np.asarray(image, np.float32)
        top = 1.0 if image.mode == "F" and wide.max(initial=0) <= 1 else 65_535.0
        return np.rint(wide.clip(0, top) * (WHITE / top)).astype(np.uint8)
    return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
