"""One image file to 8-bit RGB: upright, without transparency, of the size that is trained at."""

import io
from collections.abc import Mapping
from typing import NamedTuple

import datasets
import numpy as np
from datasets.utils.file_utils import is_local_path
from PIL import ExifTags, Image

# Pillow's modes of one channel of more than 8 bits.
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_BITS_PER_SAMPLE = 258
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ReadImage(NamedTuple):
    """One image as it is trained on.

    Attributes:
        pixels: (size, size, 3) uint8.
        is_transparent: whether a pixel of the file was not opaque, hence blended with white.
        wide: of a file of more than 8 bits a channel, as one grey channel: its largest value and that which becomes
            white; else None.
    """

    pixels: np.ndarray
    is_transparent: bool
    wide: tuple[float, float] | None


def to_rgb(image: Image.Image) -> Image.Image:
    """Brings any image of Pillow to 8-bit RGB, as the training images of `load_images` are.

    Turned upright by its EXIF orientation, as `datasets`, browsers and transformers' pipelines do; transparency is
    blended with white, as a page shows it; 16 bits are scaled by their range (the high byte is taken), not by what
    one image uses of it. 32-bit integers have no agreed range: they are taken as they are from 0 to 255, and as 16
    bits from a PNG or PPM file, where older versions of Pillow use them for that. Floats are taken from 0 to 1. Of an
    animation this is the frame that Pillow stands at, the first in a file just opened.

    Args:
        image: of any mode and size.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: 32-bit integers or floats outside of these ranges.
        OSError: a file that is damaged.
    """
    return _to_rgb(image)[0]


def read_image(item: Mapping[str, bytes | str | None] | None, feature: datasets.Image, size: int) -> ReadImage:
    """Reads an image as `to_rgb` does, and squashes it to a square with Pillow's bilinear filter.

    Args:
        item: "bytes", "path", as an undecoded `datasets.Image` gives them.
        feature: of the column; its mode, where it has one, is that of the data set's author.
        size: side of the square, in pixels.

    Raises:
        ValueError: there is no image, or it has values that are no brightness.
        OSError: a file that is missing or damaged; as Pillow has it, also many other exceptions.
    """
    if item is None or (item["bytes"] is None and item["path"] is None):
        raise ValueError("there is no image")
    with _open(item) as image:
        image, is_transparent, wide = _to_rgb(image)
    if feature.mode not in (None, "RGB", "RGBA"):
        image = image.convert(feature.mode).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return ReadImage(np.asarray(image), is_transparent, wide)


def _open(item: Mapping[str, bytes | str | None]) -> Image.Image:
    if item["bytes"] is not None:
        return Image.open(io.BytesIO(item["bytes"]))
    if is_local_path(item["path"]):
        return Image.open(item["path"])
    return datasets.Image().decode_example(item)  # an address


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool, tuple[float, float] | None]:
    image.load()  # what stands behind the pixels in a file, such as EXIF in a PNG, is known from here on
    if image.info:
        image = _upright(image)
    is_transparent, wide = False, None
    if image.mode in _WIDE_MODES:
        values, wide = _to_8_bits(image)
        image = Image.fromarray(values)
    elif image.mode != "RGB" or "transparency" in image.info:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            is_transparent = image.getextrema()[3][0] < 255
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB"), is_transparent, wide


def _upright(image: Image.Image) -> Image.Image:
    """What ImageOps.exif_transpose gives, also where the rest of the EXIF is broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Of a broken EXIF, Pillow's parser raises whatever its bytes lead to; the pixels are not concerned.
    except Exception:
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_8_bits(image: Image.Image) -> tuple[np.ndarray, tuple[float, float]]:
    """(H, W) uint8 from an image of one channel of 16 or 32 bits; its largest value and that which becomes white."""
    values = np.asarray(image)
    largest = values.max().item()
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also where a value is not a number
            raise ValueError(
                f"its values are floats from {values.min():g} to {values.max():g}, expected 0 to 1; scale all images "
                "by one range, or save them in 8 or 16 bits"
            )
        return np.rint(values * 255).astype(np.uint8), (largest, 1.0)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        if not (values.min() >= 0 and values.max() <= 255):
            raise ValueError(
                f"its values are 32-bit integers from {values.min()} to {values.max()}, expected 0 to 255, since they "
                "have no agreed range; scale all images by one range, and save them in 8 or 16 bits"
            )
        return values.astype(np.uint8), (largest, 255)
    # Pillow leaves the 12 bits of a TIFF file as they are.
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if hasattr(image, "tag_v2") else 16
    return (values >> (bits - 8)).astype(np.uint8), (largest, 2**bits - 1)
