"""Any image file to RGB: what a person is shown, and what `datasets` and browsers show."""

import io
import struct

import datasets
import numpy as np
import pytest
from PIL import Image

from born_again.data.decode import read_image, to_rgb

SIZE = 12
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
PLAIN = datasets.Image()


def stored(image: Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def read(image: Image.Image, kind: str = "PNG", **options) -> np.ndarray:
    return read_image(stored(image, kind, **options), PLAIN, SIZE).pixels


def shown(item: dict) -> np.ndarray:
    """What `datasets` gives for it, in RGB."""
    return np.asarray(PLAIN.decode_example(item).convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_datasets(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    item = stored(Image.fromarray(COLOUR), kind, exif=exif, **options)
    pixels = read_image(item, PLAIN, SIZE).pixels
    assert np.array_equal(pixels, shown(item))
    if kind != "JPEG":
        assert np.array_equal(pixels, COLOUR) == (orientation == 1)


def test_orientation_of_xmp_and_of_16_bits():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    assert np.array_equal(read(Image.fromarray(COLOUR), pnginfo=info), COLOUR[::-1, ::-1])
    exif = Image.Exif()
    exif[0x0112] = 3
    assert np.array_equal(read(Image.fromarray(DEEP), exif=exif)[..., 0], DEEP[::-1, ::-1] >> 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("broken", [b"Exif\0\0no tiff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"", b"MM\0*"])
def test_a_broken_exif_is_tolerated(broken):
    assert np.array_equal(read(Image.fromarray(COLOUR), exif=broken), COLOUR)


def test_an_orientation_that_there_is_not_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 9
    assert np.array_equal(read(Image.fromarray(COLOUR), exif=exif), COLOUR)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def test_transparency_is_blended_with_white():
    alpha = RNG.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    grey = COLOUR[..., 0]
    rgba = Image.fromarray(np.concatenate([COLOUR, alpha[..., None]], axis=2))
    np.testing.assert_allclose(read(rgba), on_white(COLOUR, alpha), atol=1)
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    np.testing.assert_allclose(read(la), on_white(grey[..., None].repeat(3, 2), alpha), atol=1)
    palette = Image.fromarray(COLOUR).quantize(8)
    index, opaque = np.asarray(palette), np.asarray(palette.convert("RGB"))
    pixels = read(palette, transparency=3)
    assert (index == 3).any() and np.array_equal(pixels[index == 3], np.full_like(pixels[index == 3], 255))
    assert np.array_equal(pixels[index != 3], opaque[index != 3])
    several = bytes([0, 128, *[255] * 6])
    expected = on_white(opaque, np.array([*several])[index])
    np.testing.assert_allclose(read(palette, transparency=several), expected, atol=1)
    keyed = COLOUR.copy()
    keyed[2, 3] = 1, 2, 3
    expected = keyed.copy()
    expected[2, 3] = 255
    assert np.array_equal(read(Image.fromarray(keyed), transparency=(1, 2, 3)), expected)
    ink = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
    ink[4:8, 4:8, 3] = 255
    pixels = read(Image.fromarray(ink))
    assert pixels[5, 5].tolist() == [0, 0, 0] and pixels[0, 0].tolist() == [255, 255, 255]


def test_an_opaque_alpha_changes_nothing_and_is_no_transparency():
    opaque = Image.fromarray(COLOUR).convert("RGBA")
    assert read_image(stored(opaque), PLAIN, SIZE).is_transparent is False
    assert np.array_equal(read(opaque), COLOUR)
    opaque.putpixel((0, 0), (0, 0, 0, 254))
    assert read_image(stored(opaque), PLAIN, SIZE).is_transparent is True


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_by_their_range(kind):
    faint = DEEP // 4  # an image that does not use it all is darker for it
    for values in (DEEP, faint):
        image = read_image(stored(Image.fromarray(values), kind), PLAIN, SIZE)
        assert image.wide == (values.max(), 65_535)
        np.testing.assert_allclose(image.pixels, (values / 257)[..., None].repeat(3, 2), atol=1)


def test_12_bits_of_a_tiff_are_scaled_by_their_range():
    """Written by hand, since Pillow reads but does not write it: two pixels in three bytes, the high bits first."""
    values = DEEP >> 4
    first, second = values[:, ::2], values[:, 1::2]
    strip = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).astype(np.uint8).tobytes()
    tags = {256: SIZE, 257: SIZE, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: SIZE, 279: len(strip)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + strip
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), values)
    pixels = read_image({"bytes": file, "path": None}, PLAIN, SIZE).pixels
    np.testing.assert_allclose(pixels[..., 0], values / 4095 * 255, atol=1)


def encoded(values: np.ndarray) -> dict:
    return PLAIN.encode_example(values)


@pytest.mark.filterwarnings("ignore:Downcasting array dtype")
def test_arrays_as_datasets_stores_them():
    grey = COLOUR[..., 0]
    expected = grey[..., None].repeat(3, 2)
    for values in (grey, grey.astype(np.int32), grey.astype(np.int64)):
        assert np.array_equal(read_image(encoded(values), PLAIN, SIZE).pixels, expected)
    for dtype in (np.float32, np.float64):
        assert np.array_equal(read_image(encoded((grey / 255).astype(dtype)), PLAIN, SIZE).pixels, expected)
    assert read_image(encoded(grey > 127), PLAIN, SIZE).pixels.max() == 255


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[0, 255]]), "floats from 0 to 255, expected 0 to 1; scale all images by one range"),
        (np.float32([[-0.5, 0.5]]), "floats from -0.5 to 0.5, expected 0 to 1"),
        (np.float32([[0, np.nan]]), "floats from nan to nan, expected 0 to 1"),
        (np.int32([[0, 4095]]), "32-bit integers from 0 to 4095, expected 0 to 255, since they have no agreed range"),
        (np.int32([[-1, 4]]), "32-bit integers from -1 to 4, expected 0 to 255"),
    ],
)
def test_values_without_an_agreed_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read_image(encoded(values), PLAIN, SIZE)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_other_modes_are_as_pillow_shows_them(mode):
    image = Image.fromarray(COLOUR)
    if mode == "LAB":
        image = Image.fromarray(COLOUR).convert("YCbCr")
        image = Image.frombytes("LAB", image.size, image.tobytes())
    else:
        image = image.convert(mode)
    item = stored(image, "PNG" if mode in "L1P" else "TIFF")
    opened = Image.open(io.BytesIO(item["bytes"])).mode
    if (mode, opened) == ("YCbCr", "RGB"):
        pytest.skip("this Pillow opens a YCbCr TIFF as RGB")
    assert opened == mode
    assert np.array_equal(read_image(item, PLAIN, SIZE).pixels, shown(item))
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    pixels = read(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixels, np.asarray(frames[0]), atol=2)


def test_the_mode_of_a_column_is_kept():
    item = stored(Image.fromarray(COLOUR))
    grey = np.asarray(Image.fromarray(COLOUR).convert("L"))[..., None].repeat(3, 2)
    assert np.array_equal(read_image(item, datasets.Image(mode="L"), SIZE).pixels, grey)
    assert np.array_equal(read_image(item, datasets.Image(mode="RGB"), SIZE).pixels, COLOUR)


def test_a_turned_image_is_turned_before_it_is_squashed():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.fromarray(RNG.integers(0, 256, (10, 30, 3), dtype=np.uint8))
    expected = wide.transpose(Image.Transpose.ROTATE_270).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert np.array_equal(read(wide, exif=exif), np.asarray(expected))
    assert np.array_equal(np.asarray(to_rgb(wide)), np.asarray(wide))


def test_to_rgb_leaves_its_argument_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    item = stored(Image.fromarray(COLOUR).convert("RGBA"), exif=exif)
    image = Image.open(io.BytesIO(item["bytes"]))
    turned = to_rgb(image)
    assert image.mode == "RGBA" and image.getexif()[0x0112] == 6
    assert np.array_equal(np.asarray(turned), COLOUR[::-1].swapaxes(0, 1))
