"""Images as arrays: value by value those of the image processor of Gemma 3 in `transformers`."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest

from equigemma.images import as_rgb


Image = pytest.importorskip("PIL.Image", reason="reading files is the extra `images`")
pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
processing = pytest.importorskip(
    "transformers.models.gemma3.image_processing_pil_gemma3", reason="transformers is too old"
)
from transformers.image_utils import load_image  # noqa: E402


RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (7, 11, 4)).astype(np.uint8)


def of_mode(mode: str):
    """An image with all that the mode can hold."""
    image = Image.fromarray(COLOURS)
    match mode:
        case "I":
            return Image.fromarray(RNG.integers(-9, 300, (7, 11)).astype(np.int32))
        case "I;16":
            return Image.fromarray(RNG.integers(0, 300, (7, 11)).astype(np.uint16))
        case "F":
            return Image.fromarray(RNG.uniform(-9, 300, (7, 11)).astype(np.float32))
        case "P transparent" | "L transparent" | "RGB transparent":
            image = image.convert("RGB").convert(mode.split()[0])
            key = image.getpixel((3, 3))
            image.info["transparency"] = key
            return image
        case "P bytes":
            image = image.convert("RGB").convert("P")
            image.info["transparency"] = bytes(range(256))
            return image
        case "PA":
            return image.convert("LA").convert("PA")
    return image.convert(mode)


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"]
TRANSPARENT = ["P transparent", "L transparent", "RGB transparent", "P bytes"]


def their_pixels(image) -> np.ndarray:
    processor = processing.Gemma3ImageProcessorPil()
    return np.moveaxis(processor.process_image(image, do_convert_rgb=True), 0, -1)


@pytest.mark.parametrize("mode", [*MODES, *TRANSPARENT])
def test_images_of_pillow(mode):
    image = of_mode(mode)
    np.testing.assert_array_equal(as_rgb(image), their_pixels(image))


@pytest.mark.parametrize("mode", [*MODES, *TRANSPARENT])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_that_were_held_in_another_way(mode, orientation):
    image = of_mode(mode)
    image.getexif()[0x0112] = orientation
    ours = as_rgb(image)
    assert ours.shape == ((7, 11, 3) if orientation < 5 else (11, 7, 3))
    if mode not in ("LA", "PA", "RGBA", *TRANSPARENT):
        # Of what is transparent it shows the colours.
        np.testing.assert_array_equal(ours, np.asarray(load_image(image)))
    turned = Image.fromarray(as_rgb(of_mode("RGB")))
    turned.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(as_rgb(turned), np.asarray(load_image(turned)))


# It warns of a palette whose transparency it drops, and leaves files open that it cannot read.
theirs_warns = pytest.mark.filterwarnings("ignore")


@theirs_warns
@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("png", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
        ("jpeg", ["L", "RGB", "CMYK"]),
        ("tiff", ["L", "RGB", "RGBA", "CMYK", "I", "I;16", "F"]),
        ("gif", ["L", "P"]),
        ("webp", ["RGB", "RGBA"]),
    ],
)
def test_files(kind, modes, tmp_path):
    for mode in modes:
        path = tmp_path / f"{mode[0]}.{kind}"
        of_mode(mode).save(path)
        with Image.open(path) as image:
            np.testing.assert_array_equal(as_rgb(path), their_pixels(image), err_msg=mode)
            is_opaque = "A" not in mode and "transparency" not in image.info
        if is_opaque:
            np.testing.assert_array_equal(as_rgb(path), np.asarray(load_image(str(path))))
        url = f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()
        np.testing.assert_array_equal(as_rgb(url), as_rgb(path))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays(channels):
    array = RNG.integers(0, 256, (29, 31, channels)).astype(np.uint8)
    np.testing.assert_array_equal(as_rgb(array), their_pixels(array))


@theirs_warns
def test_what_transformers_cannot_read_either(tmp_path):
    held = io.BytesIO()
    of_mode("RGB").resize((99, 99)).save(held, "jpeg")
    for name, data in {"cut.jpg": held.getvalue()[:700], "empty.jpg": b"", "no.jpg": b"no"}.items():
        path = Path(tmp_path / name)
        path.write_bytes(data)
        with pytest.raises(Exception):  # noqa: B017
            load_image(str(path))
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: it is"):
            as_rgb(path)
