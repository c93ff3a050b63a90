"""Images as arrays: files, Pillow's images and arrays of any kind become `uint8[height width 3]`.

What a model sees in them is decided in `nn`. Pillow is needed for files only.

**Source:** transformers `image_utils.py::load_image`, `image_transforms.py::convert_to_rgb`.
"""

import base64
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np


Image = Any
"""A path, a `data:` URL, an array `uint8[height width]` or with 1 to 4 channels, or an image of
Pillow's."""

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

    Files and images of Pillow's are turned as their EXIF orientation says. The values are those of
    the image processor of Gemma 3 in `transformers`; its `load_image` differs in one thing, that it
    shows the colours of what is transparent. In the modes I, I;16 and F numbers are from 0 to 255,
    and those above are white, as everywhere in Pillow; but if none in mode F is above 1, 1 is
    white.

    **Arguments:** `image`: a path may begin with `~`. Nothing is downloaded.

    **Returns:** `uint8[height width 3]`.

    **Raises:** `ValueError` for anything else than an image; `ImportError` if it is a path, and
    Pillow is not installed.
    """
    if isinstance(image, Picture):
        return image.rgb
    if isinstance(image, str | PathLike):
        return _from_pillow(_opened(fspath(image)), _shortened(image))
    if hasattr(image, "convert") and hasattr(image, "getbands"):
        return _from_pillow(image, "The image")
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            "An image must be uint8[height, width] or uint8[height, width, channels] with 1 to 4 "
            f"channels, got {array.dtype}{list(array.shape)}; or else a path or an image of "
            "Pillow's."
        )
    if not array.size:
        raise ValueError(f"An image needs at least one pixel, got uint8{list(array.shape)}.")
    if array.shape[-1] in (1, 3):
        return np.broadcast_to(array, (*array.shape[:2], 3))
    colours, alpha = array[..., :-1].astype(np.float64), array[..., -1:] / WHITE
    mixed = np.rint(alpha * colours + (1 - alpha) * WHITE).astype(np.uint8)
    return np.broadcast_to(mixed, (*array.shape[:2], 3))


@dataclass(frozen=True, init=False, repr=False)
class Picture:
    """An image as a value: pixels that stay as they are, whatever becomes of the file."""

    rgb: np.ndarray = field(compare=False)
    """`uint8[height width 3]`."""
    path: str | None = field(compare=False)
    """The file that it was read from, or the `data:` URL."""
    digest: bytes
    """The same for the same pixels, and for no others."""

    def __init__(self, image: Image):
        """Reads an image, once.

        **Arguments:** `image`: whatever `as_rgb` takes.

        **Raises:** as `as_rgb`.
        """
        rgb = np.array(as_rgb(image))
        rgb.setflags(write=False)
        path = fspath(image) if isinstance(image, str | PathLike) else None
        path = image.path if isinstance(image, Picture) else path
        digest = hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).digest()
        vars(self).update(rgb=rgb, path=path, digest=digest)

    def __repr__(self) -> str:
        height, width, _ = self.rgb.shape
        named = "" if self.path is None else f"{_shortened(self.path)}, "
        return f"Picture({named}{height} by {width} pixels)"


def as_list(images: Image | Sequence[Image]) -> list[Image]:
    """One image, or several, as a list.

    **Arguments:** `images`: a path, an array, one of Pillow's, or a sequence or batch of these.

    **Returns:** the images; files are not opened.
    """
    if isinstance(images, str | PathLike | Picture) or hasattr(images, "getbands"):
        return [images]
    if getattr(images, "ndim", 4) < 4:
        return [images]
    return list(images)


def _opened(source: str) -> Any:
    """The image of a file or a `data:` URL, decoded."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            "Reading images from files needs Pillow, which is not installed: "
            'pip install "equigemma[images]".'
        ) from error
    file = _data(source) if source.startswith("data:") else _found(source)
    try:
        # Pillow warns of half as many pixels as it refuses.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                image.load()
                return image
    except Image.DecompressionBombError as error:
        reason = "it has so many pixels that it may be an attack on memory. Make it smaller"
        raise _unreadable(source, reason) from error
    except UnidentifiedImageError as error:
        reason = "it is no image that is known"
        raise _unreadable(source, reason) from error
    except Exception as error:
        # Of its many readers each has errors of its own.
        raise _unreadable(source, f"it is damaged or cut off ({error})") from error


def _found(source: str) -> Path:
    """The file at a path, which may begin with `~`."""
    # A path of several parts loses one of the strokes.
    if found := re.match(r"(\w+):/", source):
        if found[1].lower() in ("http", "https"):
            raise _unreadable(
                source,
                f"nothing is downloaded here. `curl -LO {source}` does it; pass the path of the "
                "file then",
            )
        raise _unreadable(source, "it must be a path, without a protocol in front")
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise _unreadable(source, "there is no such user") from error
    if not path.exists():
        raise _unreadable(source, "there is no such file")
    if path.is_dir():
        raise _unreadable(source, "it is a folder")
    if path.is_file() and not path.stat().st_size:
        raise _unreadable(source, "it is empty")
    return path


def _data(url: str) -> BytesIO:
    head, comma, data = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("no base64")
        return BytesIO(base64.b64decode(data, validate=True))
    except ValueError as error:
        reason = "it must be data:image/...;base64, with the file in base64 after the comma"
        raise _unreadable(url, reason) from error


def _unreadable(source: str, reason: str) -> ValueError:
    return ValueError(f"{_shortened(source)} cannot be read as an image: {reason}.")


def _shortened(source: str | PathLike[str]) -> str:
    text = fspath(source)
    return f"{text[:40]}…" if text.startswith("data:") else text


def _from_pillow(image: Any, name: str) -> np.ndarray:
    from PIL import Image, ImageOps

    if not all(image.size):
        raise ValueError(f"{name} needs at least one pixel, got {image.size}.")
    try:
        # Cameras store how they were held; the pixels themselves stay as they came.
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            # Releases of Pillow differ in what they make of 16 bits.
            wide = np.asarray(image, np.float32)
            is_share = image.mode == "F" and wide.max() <= 1
            wide = np.rint(wide * WHITE) if is_share else wide
            grey = wide.clip(0, WHITE).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        has_alpha = {"A", "a"} & set(image.getbands()) or "transparency" in image.info
        if not has_alpha:
            return np.asarray(image.convert("RGB"))
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (WHITE,) * 4)
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}.") from error
