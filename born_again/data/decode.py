"""Reads an image dataset of the `datasets` library into arrays: splits, columns, labels and decoded pixels."""

from __future__ import annotations

import difflib
import io
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.file_utils import is_local_path
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import ExifTags, Image
from tqdm.auto import tqdm

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
SHORTCUTS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
EMBEDDED = "digits"
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "valid", "val")
_PROGRESS_FROM = 5_000
_DECODE_CHUNK = 1_000
Loaded = TypeVar("Loaded")


# ---- Splits and columns ----


def open_dataset(name: str, revision: str | None) -> datasets.DatasetDict:
    """Open every split of a folder or of a dataset on the Hub.

    Args:
        name: a folder (parquet, imagefolder, the Hub's layout, or what `save_to_disk` wrote), a shortcut, or
            "owner/name".
        revision: branch, tag or commit on the Hub; None for the default branch.

    Raises:
        ValueError: if `name` is none of these, a folder without data, or something `datasets` refuses (several
            configurations, an empty split, damaged files), or if `revision` is given for a folder.
        ConnectionError: if the Hub cannot be reached and the dataset is not in the local cache.
    """
    folder = Path(name).expanduser()
    source = SHORTCUTS.get(name, name)
    if source == name and folder.is_dir():
        return _open_folder(name, folder, revision)
    if source == name and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(_unknown_name(name))
    try:
        return _load(name, lambda: datasets.load_dataset(source, revision=revision))
    except DatasetNotFoundError as error:
        raise ValueError(
            f"--dataset {name!r} is neither a folder here nor a dataset on the Hub that this account can read "
            f"({error}); check the spelling and the revision, or log in with `hf auth login` if it is private or gated"
        ) from error
    except (ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"--dataset {name!r} is not in the local cache and the Hub cannot be reached ({error}); use `--dataset "
            "digits`, which needs no network, or `--dataset PATH` with a local folder of the dataset"
        ) from error


def _open_folder(name: str, folder: Path, revision: str | None) -> datasets.DatasetDict:
    if revision is not None:
        raise ValueError(
            f"revision is {revision!r} for the folder {name!r}; only a dataset on the Hub has revisions: drop it"
        )
    saved = (folder / "dataset_dict.json").is_file()
    try:
        if saved:
            return cast(datasets.DatasetDict, _load(name, lambda: datasets.load_from_disk(str(folder))))
        builder = _load(name, lambda: datasets.load_dataset_builder(str(folder)))
        _check_splits_apart(name, builder)
        _load(name, builder.download_and_prepare)
        return cast(datasets.DatasetDict, _load(name, builder.as_dataset))
    except FileNotFoundError as error:
        raise ValueError(
            f"--dataset {name!r} is a folder in which `datasets` finds no data ({error}); expected parquet files or "
            "images in train/CLASS/ and test/CLASS/"
        ) from error


def _check_splits_apart(name: str, builder: datasets.DatasetBuilder) -> None:
    """Checks that `datasets`, which infers splits from words in a path, does not put a file into two splits."""
    split_of: dict[str, str] = {}
    for split, files in (builder.config.data_files or {}).items():
        for file in map(str, files):
            other = split_of.setdefault(file, str(split))
            if other != str(split) and not Path(file).name.startswith("metadata."):
                raise ValueError(
                    f"--dataset {name!r}: {file} would be in the splits {other!r} and {str(split)!r}: `datasets` "
                    "takes words such as train, test, val or eval anywhere in a path for a split; expected class "
                    "folders without such words: rename them, or save the splits as parquet files"
                )


def _load(name: str, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    # IndexError: what load_from_disk raises on an empty split.
    except (ValueError, IndexError, DatasetGenerationError) as error:
        raise ValueError(
            f"--dataset {name!r} is refused by `datasets` ({error}); expected readable files, one configuration and "
            "no empty split: save the part to use as a folder of parquet files, or of images in train/CLASS/"
        ) from error


def _unknown_name(name: str) -> str:
    if "/" in name or name.startswith((".", "~")):
        return (
            f"--dataset {name!r} looks like a folder and does not exist; check the path, or give 'owner/name' for the "
            "Hub"
        )
    known = (EMBEDDED, *SHORTCUTS)
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return (
        f"--dataset {name!r} is unknown; {hint}expected one of {', '.join(known)}, a folder, or 'owner/name' on the "
        "Hub"
    )


def resolved_revision(checksums: Mapping[str, object] | None, revision: str | None) -> str | None:
    """The commit a dataset was downloaded at, from the urls of its files; else `revision` as it was given."""
    for url in checksums or ():
        match = re.match(r"hf://datasets/[^@]+@([0-9a-f]{40})/", url)
        if match:
            return match.group(1)
    return revision


def choose_splits(name: str, splits: Mapping[Any, datasets.Dataset]) -> tuple[str, str]:
    """Names of the training and the test split.

    Raises:
        ValueError: if there is no split "train", none of the test splits, or one of the two is empty.
    """
    found = ", ".join(splits)
    if "train" not in splits:
        raise ValueError(f"dataset {name!r} has the splits {found}; expected one called 'train': rename a split")
    test = next((split for split in TEST_SPLITS if split in splits), None)
    if test is None:
        raise ValueError(
            f"dataset {name!r} has the splits {found}; expected a test split, one of {', '.join(TEST_SPLITS)}: set "
            "some rows aside under one of these names (Dataset.train_test_split, then save as parquet)"
        )
    for split in ("train", test):
        if len(splits[split]) == 0:
            raise ValueError(
                f"dataset {name!r}: split {split!r} is empty; expected at least one row: put images in it"
            )
    if test != TEST_SPLITS[0]:
        warn(f"dataset {name!r}: there is no split 'test', so {test!r} is what is tested on", logging.INFO)
    return "train", test


def choose_image_column(name: str, features: datasets.Features, requested: str | None) -> str:
    """The column that holds the images: the one requested, else the only one, else the one called img or image.

    Raises:
        ValueError: if there is none, or several and no way to choose.
    """
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if requested is not None:
        if requested not in images:
            raise ValueError(
                f"--image_column is {requested!r}; dataset {name!r} has the columns {_describe(features)} and its "
                f"image columns are {images}: give one of these"
            )
        return requested
    if not images:
        raise ValueError(
            f"dataset {name!r} has no image column, only {_describe(features)}; expected a column of type "
            "datasets.Image: cast one with Dataset.cast_column(column, datasets.Image())"
        )
    preferred = [column for column in IMAGE_COLUMNS if column in images]
    candidates = images if len(images) == 1 else preferred
    if len(candidates) != 1:
        raise ValueError(f"dataset {name!r} has several image columns, {images}; choose one with --image_column")
    return _log_choice(name, "image column", candidates[0], images, "--image_column")


def choose_label_column(name: str, features: datasets.Features, requested: str | None) -> str:
    """The column that holds the labels.

    The one requested; else the only ClassLabel, or the first of label, labels, fine_label among several; else a
    column of integers or strings by one of these names.

    Raises:
        ValueError: if there is none, or several and no way to choose, or the one requested cannot hold labels.
    """
    usable = [column for column, feature in features.items() if _can_label(feature)]
    if requested is not None:
        if requested not in usable:
            raise ValueError(
                f"--label_column is {requested!r}; dataset {name!r} has the columns {_describe(features)}, of which "
                f"{usable} can hold labels (ClassLabel, integers or strings): give one of these"
            )
        return requested
    classes = [column for column in usable if isinstance(features[column], datasets.ClassLabel)]
    candidates = classes or usable
    preferred = classes if len(classes) == 1 else [column for column in LABEL_COLUMNS if column in candidates]
    if preferred:
        return _log_choice(name, "label column", preferred[0], candidates, "--label_column")
    if classes:
        raise ValueError(f"dataset {name!r} has several label columns, {classes}; choose one with --label_column")
    raise ValueError(
        f"dataset {name!r} has no label column, only {_describe(features)}; expected a ClassLabel, or integers or "
        f"strings called {', '.join(LABEL_COLUMNS)}: name another column with --label_column"
    )


def _log_choice(name: str, what: str, chosen: str, among: list[str], flag: str) -> str:
    if len(among) > 1:
        warn(f"dataset {name!r}: {what} {chosen!r} is taken, of {among}; {flag} takes another", logging.INFO)
    return chosen


def _can_label(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    dtype = str(getattr(feature, "dtype", "")) if isinstance(feature, datasets.Value) else ""
    return dtype.startswith(("int", "uint")) or dtype in ("string", "large_string")


def _describe(features: datasets.Features) -> str:
    kinds = {
        column: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for column, feature in features.items()
    }
    return ", ".join(f"{column} ({kind})" for column, kind in kinds.items())


# ---- Labels ----


def read_labels(
    name: str, splits: Mapping[str, datasets.Dataset], column: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of every split as class indices, and the names of the classes.

    A ClassLabel keeps its own order of names. Strings are sorted. Integers are sorted too, and their names are their
    decimal digits, so labels that start at 1 or leave gaps come out as 0 ... n - 1.

    Args:
        name: the dataset, for messages.
        splits: the splits to read, one of them "train".
        column: the column to read.

    Returns:
        {split: (N,) int64} and the names.

    Raises:
        ValueError: if a row has no label (null, or a negative number, as in unlabelled test sets), if a label lies
            outside its ClassLabel, if the splits disagree on the column, or if all training rows are of one class.
    """
    feature = splits["train"].features[column]
    for split, rows in splits.items():
        if rows.features.get(column) != feature:
            raise ValueError(
                f"dataset {name!r}: column {column!r} is {rows.features.get(column)} in split {split!r} and {feature} "
                "in 'train'; expected the same column with the same class names: cast one split to the features of "
                "the other"
            )
    raw = {split: _read_column(rows, column) for split, rows in splits.items()}
    for split, values in raw.items():
        unlabelled = sum(value is None or (not isinstance(value, str) and value < 0) for value in values)
        if unlabelled:
            raise ValueError(
                f"dataset {name!r}: {unlabelled} of {len(values)} rows of split {split!r} have no label in column "
                f"{column!r} (null or negative); expected a label in every row: use a copy with these rows or this "
                "split left out"
            )
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        labels = {split: np.asarray(values, dtype=np.int64) for split, values in raw.items()}
        for split, values in labels.items():
            if values.max() >= len(names):
                raise ValueError(
                    f"dataset {name!r}: split {split!r} has label {values.max()} in column {column!r}; expected 0 to "
                    f"{len(names) - 1}, since it declares {len(names)} names: correct the names of the ClassLabel"
                )
    else:
        classes = sorted(set().union(*raw.values()))
        names = tuple(str(value) for value in classes)
        number = {value: index for index, value in enumerate(classes)}
        labels = {
            split: np.fromiter((number[value] for value in values), dtype=np.int64, count=len(values))
            for split, values in raw.items()
        }
    if len(np.unique(labels["train"])) < 2:
        raise ValueError(
            f"dataset {name!r}: every training row is of one class in column {column!r}; expected at least 2 classes: "
            "check the folders, or choose another column with --label_column"
        )
    return labels, names


def _read_column(rows: datasets.Dataset, column: str) -> list:
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


# ---- Pixels ----


def decode_images(
    name: str, split: str, dataset: datasets.Dataset, column: str, rows: np.ndarray | None, image_size: int
) -> np.ndarray:
    """Decode the images of a split into one array, each converted as by `to_rgb`.

    Pillow decodes the raw bytes here: decoding by the Image feature is several times slower.

    Args:
        name: the dataset, for messages.
        split: the split's name, for messages.
        dataset: the split.
        column: the image column.
        rows: which rows, (n,) ascending; None for all.
        image_size: side of the square that every image is brought to, in pixels.

    Returns:
        (n, image_size, image_size, 3) uint8, contiguous.

    Raises:
        ValueError: if an image is missing or cannot be decoded; names its row, and its file where it has one.
    """
    feature = dataset.features[column]
    encoded = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if rows is not None:
        encoded = encoded.select(rows)
    pixels = np.empty((len(encoded), image_size, image_size, 3), dtype=np.uint8)
    transparent, position = 0, 0
    wide: list[tuple[float, float]] = []
    with tqdm(
        total=len(encoded), desc=f"Reading {split}", unit="img", disable=len(encoded) < _PROGRESS_FROM or None
    ) as progress:
        for table in cast(Any, encoded.with_format("arrow")).iter(batch_size=_DECODE_CHUNK):  # of pyarrow
            for item in table[column].to_pylist():
                try:
                    pixels[position], is_transparent, found = read_image(item, feature, image_size)
                # Of a damaged file Pillow's plugins raise whatever its bytes lead to.
                except Exception as error:
                    row = position if rows is None else int(rows[position])
                    file = f" ({item['path']})" if item and item["path"] else ""
                    raise ValueError(
                        f"dataset {name!r}: the image in split {split!r}, row {row}{file}, cannot be decoded "
                        f"({str(error) or type(error).__name__}); expected an image file that Pillow reads: replace "
                        "the file or remove the row"
                    ) from error
                transparent += is_transparent
                wide += [] if found is None else [found]
                position += 1
            progress.update(table.num_rows)
    for count, what in ((transparent, "transparent, and blended with white"), (len(wide), _how_scaled(wide))):
        if count:
            warn(
                f"dataset {name!r}: {count:,} of {len(pixels):,} images in split {split!r} are {what}; the pipelines "
                "of transformers and timm do not do this: give them images brought to RGB by "
                "born_again.data.decode.to_rgb"
            )
    return pixels


class ReadImage(NamedTuple):
    """One decoded image.

    Attributes:
        pixels: (size, size, 3) uint8.
        is_transparent: whether a pixel was not opaque, so that the image was blended with white.
        wide: for one grey channel of more than 8 bits: its largest value, and the value that becomes white; else None.
    """

    pixels: np.ndarray
    is_transparent: bool
    wide: tuple[float, float] | None


def read_image(item: dict[str, Any] | None, feature: datasets.Image, size: int) -> ReadImage:
    """Decodes an image, converts it as `to_rgb` does, and resizes it to a square with Pillow's bilinear filter.

    Args:
        item: "bytes", "path", as an undecoded `datasets.Image` gives them.
        feature: of the column; its mode, if it has one, is applied too.
        size: side of the square, in pixels.

    Raises:
        ValueError: there is no image, or its values are out of range.
        OSError: a missing or damaged file, for which Pillow may raise many other exceptions too.
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, as `load_images` does.

    The image is rotated by its EXIF orientation, as `datasets`, browsers and transformers' pipelines do. Transparency
    is blended with white. 16 bits are scaled by their whole range (the high byte is kept). 32-bit integers must be 0
    to 255, except in PNG and PPM files, where older versions of Pillow use them for 16 bits. Floats must be 0 to 1. Of
    an animation the current frame is taken, which is the first in a file just opened.

    Args:
        image: of any mode and size.

    Returns:
        An image of mode RGB.

    Raises:
        ValueError: 32-bit integers or floats outside of these ranges.
        OSError: a damaged file.
    """
    return _to_rgb(image)[0]


def _open(item: dict[str, Any]) -> Image.Image:
    if item["bytes"] is not None:
        return Image.open(io.BytesIO(item["bytes"]))
    if is_local_path(item["path"]):
        return Image.open(item["path"])
    return datasets.Image().decode_example(item)  # a URL


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool, tuple[float, float] | None]:
    image.load()  # also reads metadata after the pixels, such as EXIF in a PNG
    if image.info:
        image = _upright(image)
    is_transparent, wide = False, None
    if image.mode in _WIDE_MODES:
        values, wide = _to_8_bits(image)
        image = Image.fromarray(values)
    elif image.mode != "RGB" or "transparency" in image.info:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            is_transparent = cast(tuple, image.getextrema())[3][0] < 255
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB"), is_transparent, wide


def _upright(image: Image.Image) -> Image.Image:
    """Like ImageOps.exif_transpose, but works where the rest of the EXIF is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Pillow's parser can raise anything for damaged EXIF; the pixels are not affected.
    except Exception:
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_8_bits(image: Image.Image) -> tuple[np.ndarray, tuple[float, float]]:
    """(H, W) uint8 from an image of one channel of 16 or 32 bits; its largest value and that which becomes white."""
    values = np.asarray(image)
    largest = values.max().item()
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # also for NaN
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
    # Pillow does not scale the 12 bits of a TIFF file.
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return (values >> (bits - 8)).astype(np.uint8), (largest, 2**bits - 1)


def _how_scaled(wide: list[tuple[float, float]]) -> str:
    """What became of images of more than 8 bits, from the largest value of each and that which becomes white."""
    said = []
    for white in sorted({white for _, white in wide}):
        largest = max(value for value, own in wide if own == white)
        kept = f"{max(1, math.ceil(256 * largest / white))} of 256 levels are used"
        remedy = f" (if they use fewer bits, save them so that {white:g} is white)" if largest <= white / 2 else ""
        said.append(f"scaled so that {white:g} is white; their largest value is {largest:g}, so {kept}{remedy}")
    return f"of more than 8 bits, {' and '.join(said)}"


def warn(message: str, level: int = logging.WARNING) -> None:
    """Logs a message about the data on the first process only, since every process reads the data."""
    if os.environ.get("RANK", "0") == "0":  # of torchrun and accelerate launch
        logging.getLogger(__name__).log(level, message)
