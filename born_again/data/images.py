"""An image dataset as one uint8 tensor per split, read once through `datasets`.

A 32x32 data set of 50,000 images is 150 MB: small enough to hold, and a batch gathered from it costs a fraction of
decoding 128 files. Augmentation and normalisation are in `born_again.data.augment`, batches in
`born_again.data.image_dataset`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from born_again.data.augment import scramble
from born_again.data.decode import (
    EMBEDDED,
    SHORTCUTS,
    choose_image_column,
    choose_label_column,
    choose_splits,
    decode_images,
    open_dataset,
    read_labels,
    resolved_revision,
    warn,
)

# Digits and letters, whose mirror images are other characters or none.
_CHARACTER_DATASETS = frozenset(
    "digit digits letter letters character characters alphabet alphabets captcha captchas ocr usps svhn omniglot "
    "mnist emnist kmnist k49mnist qmnist notmnist kkanji kuzushiji mnistm hasy hasyv2 chars74k multimnist".split()
)
# In MNIST's format, but of other things.
_OTHER_DATASETS = frozenset(("fashion", "medical", "med"))
_OPPOSITES = {"left": "right", "east": "west", "clockwise": "counterclockwise", "forward": "backward"}
_MIN_IMAGE_SIZE = 8
_SUM_CHUNK = 4_096


@dataclass(frozen=True)
class ImageSplit:
    """One split.

    Attributes:
        pixels: (N, H, W, 3) uint8, contiguous.
        labels: (N,) int64, each in 0 ... classes - 1.
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> ImageSplit:
        """The split on another device, where batches are then made."""
        return ImageSplit(self.pixels.to(device), self.labels.to(device))

    def select(self, rows: Sequence[int]) -> ImageSplit:
        """The split of some of its rows."""
        chosen = torch.as_tensor(rows, device=self.labels.device)
        return ImageSplit(self.pixels[chosen], self.labels[chosen])

    @property
    def nbytes(self) -> int:
        """Size of the tensors, in bytes."""
        return self.pixels.nbytes + self.labels.nbytes


@dataclass(frozen=True)
class ImageData:
    """A dataset, read.

    Attributes:
        train: the training split.
        test: the test split.
        label_names: names of all classes of the dataset, also if a limited split lacks some.
        mean: mean of each channel over the rows of `train`, on the scale where 255 is 1, rounded to 6 decimals.
        std: standard deviation likewise (of the population); 1.0 for a constant channel, which then becomes 0.
        fingerprint: JSON-able: source, revision (the commit where the Hub gave one), image_column, label_column, rows
            by split, and the sha256 of shapes, pixels and labels of both splits; test_split if the dataset's test
            split has another name.
        flip: whether mirroring keeps the class, judged by the name: see `born_again.data.images.allows_flip`.
        interpolation: of resized images, by timm's name.
        validation: the validation split that was held out of the training split; None without one.
    """

    train: ImageSplit
    test: ImageSplit
    label_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: dict
    flip: bool
    interpolation: str = "bilinear"
    validation: ImageSplit | None = None

    def to(self, device: torch.device | str) -> ImageData:
        """The dataset with all splits on another device."""
        validation = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.train.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the tensors of all splits, in bytes."""
        held_out = 0 if self.validation is None else self.validation.nbytes
        return self.train.nbytes + self.test.nbytes + held_out


def load_images(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    image_size: int = 32,
    test_samples: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    validation_fraction: float | None = None,
) -> ImageData:
    """Read an image classification dataset into memory.

    Images are converted to RGB as by `born_again.data.decode.to_rgb`, and resized to a square with Pillow's bilinear
    filter, without keeping the aspect ratio. The test split is the one called test, else validation.

    Args:
        name: "digits" (1,797 real handwritten digits that scikit-learn carries; needs no network), "cifar10",
            "cifar100", "owner/name" on the Hub, or a folder in any layout `datasets` reads. A folder with the
            name of a shortcut is given as "./cifar10".
        image_column: column of the images; None finds it by type, and by the names img and image.
        label_column: column of the labels; None finds it by type, and by the names label, labels and fine_label.
        revision: branch, tag or commit of a dataset on the Hub.
        image_size: side of the images in pixels, at least 8.
        test_samples: number of digits in the test split, the others are in the training split; None takes a fifth.
        max_train_samples: number of training rows to keep, stratified by class and independent of the seed; the rows
            kept at n are among those kept at n + 1. None, or more than there are, keeps all.
        max_eval_samples: likewise for the test split.
        validation_fraction: of the kept training rows, that are held out as a validation split: stratified by class
            and independent of the seed; None holds none out. Mean and std are of the rows that are left.

    Returns:
        The splits as uint8 tensors, names of the classes, mean and std of the training images, and a fingerprint.

    Raises:
        ValueError: if the name, a column, a split, a label, an image or a limit is not as expected, a class of the
            test split has no training row, or all training images are the same; the message says which.
        ConnectionError: if the Hub is needed and cannot be reached.
        ImportError: for "digits" without scikit-learn.

    Example:
        >>> data = load_images("digits", image_size=16, test_samples=1197)
        >>> data.train.pixels.shape, data.train.pixels.dtype, len(data.test.labels), data.label_names[:3]
        (torch.Size([600, 16, 16, 3]), torch.uint8, 1197, ('0', '1', '2'))
    """
    if image_size < _MIN_IMAGE_SIZE:
        raise ValueError(f"image_size is {image_size}; expected at least {_MIN_IMAGE_SIZE} pixels, such as 32")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}; expected a share of the training images above 0 and below "
            "1, such as 0.1"
        )
    limits = {"train": max_train_samples, "test": max_eval_samples}
    for flag, limit in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if limit is not None and limit < 1:
            raise ValueError(f"--{flag} is {limit}; expected at least 1: leave it out to use every row")
    if test_samples is not None and name != EMBEDDED:
        raise ValueError(
            f"--test_samples is {test_samples} with --dataset {name}, which has a test split: leave it out"
        )
    test = "test"
    if name == EMBEDDED:
        for argument, value in (
            ("image_column", image_column),
            ("label_column", label_column),
            ("revision", revision),
        ):
            if value is not None:
                raise ValueError(
                    f"{argument} is {value!r} with --dataset digits, which has no columns or revisions: drop it"
                )
        splits, label_names = _read_digits(image_size, test_samples, limits)
        interpolation = "nearest" if image_size % 8 == 0 else "bilinear"
    else:
        dataset = open_dataset(name, revision)
        train, test = choose_splits(name, dataset)
        chosen = {"train": dataset[train], test: dataset[test]}
        image_column = choose_image_column(name, dataset[train].features, image_column)
        label_column = choose_label_column(name, dataset[train].features, label_column)
        revision = resolved_revision(dataset[train].info.download_checksums, revision)
        labels, label_names = read_labels(name, chosen, label_column)
        _check_classes(name, labels[train], labels[test], label_names, test)
        interpolation = "bilinear"
        splits = {}
        for role, split in (("train", train), ("test", test)):
            rows = _rows_to_keep(labels[split], limits[role])
            pixels = decode_images(name, split, chosen[split], image_column, rows, image_size)
            kept = labels[split] if rows is None else labels[split][rows]
            splits[role] = ImageSplit(torch.from_numpy(pixels), torch.from_numpy(kept))
            if role == "train" and (left_out := sorted(set(labels[split].tolist()) - set(kept.tolist()))):
                warn(
                    f"dataset {name!r}: --max_train_samples {max_train_samples} leaves no training image of "
                    f"{_class_list(left_out, label_names)}, of which there may be test images"
                )
    if validation_fraction is not None:
        splits["train"], splits["validation"] = _hold_out(name, splits["train"], validation_fraction)
    _check_variation(name, splits["train"], label_names)
    mean, std = channel_statistics(splits["train"].pixels)
    fingerprint = {
        "source": SHORTCUTS.get(name, name),
        "revision": revision,
        "image_column": image_column,
        "label_column": label_column,
        "rows": {role: len(split) for role, split in splits.items()},
        "sha256": _digest(*(splits[role] for role in ("train", "test", "validation") if role in splits)),
    }
    if test != "test":
        fingerprint["test_split"] = test
    return ImageData(
        splits["train"],
        splits["test"],
        label_names,
        mean,
        std,
        fingerprint,
        allows_flip(name),
        interpolation,
        splits.get("validation"),
    )


def _hold_out(name: str, train: ImageSplit, fraction: float) -> tuple[ImageSplit, ImageSplit]:
    """The training split without the rows that are held out, and these."""
    labels = train.labels.numpy()
    order = stratified_order(labels)
    count = round(fraction * len(labels))
    kept, held_out = np.sort(order[count:]), np.sort(order[:count])
    if not 0 < count < len(labels) or {*labels[kept].tolist()} != {*labels.tolist()}:
        raise ValueError(
            f"dataset {name!r}: --validation_fraction {fraction} holds {count:,} of {len(labels):,} training images "
            "out; expected at least one, and one training image of every class left: give another fraction"
        )
    return (
        ImageSplit(train.pixels[kept], train.labels[kept]),
        ImageSplit(train.pixels[held_out], train.labels[held_out]),
    )


def _read_digits(
    image_size: int, test_samples: int | None, limits: dict[str, int | None]
) -> tuple[dict[str, ImageSplit], tuple[str, ...]]:
    """scikit-learn's digits (Alpaydin and Kaynak, UCI 1998), 17 grey levels; each class is split in proportion."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "--dataset digits is carried by scikit-learn, which is missing: pip install scikit-learn"
        ) from error
    bunch: Any = load_digits()
    labels = bunch.target.astype(np.int64)
    levels = bunch.images.astype(np.int64)  # (1797, 8, 8), 0 ... 16
    grey = ((levels * 255 + 8) // 16).astype(np.uint8)
    if image_size % 8 == 0:
        # Repeated pixels are the same bytes with any version of any library.
        factor = image_size // 8
        grey = grey.repeat(factor, axis=1).repeat(factor, axis=2)  # (1797, S, S)
    else:
        size = (image_size, image_size)
        grey = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in grey])
    count = len(labels) // 5 if test_samples is None else test_samples
    if not 10 <= count <= len(labels) - 10:
        raise ValueError(
            f"--test_samples is {count}; expected 10 ... {len(labels) - 10} of the {len(labels):,} digits, so that "
            "both splits have every class"
        )
    order = stratified_order(labels)
    by_role = {"test": np.sort(order[:count]), "train": np.sort(order[count:])}
    splits = {}
    for role in ("train", "test"):
        rows = by_role[role]
        kept = _rows_to_keep(labels[rows], limits[role])
        rows = rows if kept is None else rows[kept]
        pixels = np.ascontiguousarray(np.broadcast_to(grey[rows][..., None], (len(rows), *grey.shape[1:], 3)))
        splits[role] = ImageSplit(torch.from_numpy(pixels), torch.from_numpy(labels[rows]))
    return splits, tuple(str(digit) for digit in range(10))


def _rows_to_keep(labels: np.ndarray, limit: int | None) -> np.ndarray | None:
    """Rows of a limited split (n,) ascending; None for all."""
    if limit is None or limit >= len(labels):
        return None
    return np.sort(stratified_order(labels)[:limit])


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """A fixed permutation whose every prefix is stratified by class.

    Args:
        labels: (N,) int64.

    Returns:
        (N,) int64; a function of `labels` only, by our own hash, so that no version of a library changes it.
    """
    keys = scramble(np.arange(1, len(labels) + 1, dtype=np.uint64))
    by_class = np.lexsort((keys, labels))
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    ranks = np.arange(len(labels)) - np.repeat(starts, counts)
    quantiles = (ranks + 0.5) / np.repeat(counts, counts)
    return by_class[np.lexsort((keys[by_class], quantiles))]


def channel_statistics(pixels: torch.Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, on the scale where 255 is 1.

    Sums are exact integers, so they do not depend on order or machine; both results are rounded to 6 decimals, which
    JSON preserves.

    Args:
        pixels: (N, H, W, 3) uint8.

    Returns:
        Mean and standard deviation of the population; a deviation that rounds to 0 is given as 1.0.
    """
    count = 0
    total = torch.zeros(3, dtype=torch.int64)
    squares = torch.zeros(3, dtype=torch.int64)
    for chunk in pixels.split(_SUM_CHUNK):
        values = chunk.reshape(-1, 3)  # (n H W, 3)
        histograms = [torch.bincount(values[:, channel], minlength=256) for channel in range(3)]
        counts = torch.stack(histograms)  # (3, 256)
        levels = torch.arange(256)
        count += len(values)
        total += (counts * levels).sum(dim=1)
        squares += (counts * levels**2).sum(dim=1)
    mean, std = [], []
    for channel_sum, channel_squares in zip(total.tolist(), squares.tolist(), strict=True):
        # Python integers, so the difference of large numbers is exact.
        variance = (count * channel_squares - channel_sum**2) / count**2
        mean.append(round(channel_sum / count / 255, 6))
        std.append(round(variance**0.5 / 255, 6) or 1.0)
    return tuple(mean), tuple(std)


def _digest(*splits: ImageSplit) -> str:
    """sha256 over shape, pixels and labels of each split, in order."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(repr(tuple(split.pixels.shape)).encode())
        digest.update(split.pixels.numpy().data)
        # Explicit byte order, so that the digest is the same on any machine.
        digest.update(split.labels.numpy().astype("<i8").data)
    return digest.hexdigest()


# ---- Checks ----


def _check_classes(name: str, train: np.ndarray, test: np.ndarray, label_names: tuple[str, ...], split: str) -> None:
    """Checks that every class of the test labels occurs in the training labels, (N,) int64 each, before any limit."""
    trained, tested = set(train.tolist()), set(test.tolist())
    if unknown := sorted(tested - trained):
        raise ValueError(
            f"dataset {name!r}: split {split!r} has {int(np.isin(test, unknown).sum()):,} rows of "
            f"{_class_list(unknown, label_names)}, of which 'train' has none; it has "
            f"{_class_list(sorted(trained), label_names)}. Expected training rows of every class that is tested: "
            "rename what is the same class (capitals and spaces count), or take these rows out"
        )
    if missing := sorted(trained - tested):
        warn(
            f"dataset {name!r}: split {split!r} has no row of {_class_list(missing, label_names)}, which 'train' has; "
            "the test accuracy says nothing of it"
        )


def _class_list(labels: list[int], label_names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(label_names[label]) for label in labels[:5])
    more = f" and {len(labels) - 5} more" if len(labels) > 5 else ""
    return f"{'class' if len(labels) == 1 else 'classes'} {shown}{more}"


def _check_variation(name: str, split: ImageSplit, label_names: tuple[str, ...]) -> None:
    """Refuses identical training images, and warns of classes with identical images and of constant channels."""
    first = split.pixels[0]
    if len(split) > 1 and all(torch.equal(image, first) for image in split.pixels):
        raise ValueError(
            f"dataset {name!r}: all {len(split):,} training images are the same, as they are read; expected images "
            "that differ. Look at some of them: where only the transparency differs (white ink), blend them with "
            "another ground than white; where values are scaled wrongly, save them anew in 8 bits"
        )
    same = []
    for label in range(len(label_names)):
        rows = (split.labels == label).nonzero().flatten().tolist()
        if len(rows) > 1 and all(torch.equal(split.pixels[row], split.pixels[rows[0]]) for row in rows):
            same.append(label)
    if same:
        warn(
            f"dataset {name!r}: all training images of {_class_list(same, label_names)} are the same, as they are "
            "read; look at some of them, whether they are damaged or scaled wrongly"
        )
    # In chunks: comparing the whole split would copy it.
    constant = [
        channel
        for index, channel in enumerate(("red", "green", "blue"))
        if all(bool((part[..., index] == first[0, 0, index]).all()) for part in split.pixels.split(_SUM_CHUNK))
    ]
    if constant:
        warn(
            f"dataset {name!r}: the {' and '.join(constant)} channel is the same in every pixel of every training "
            "image, and becomes 0; look at some images, whether they were saved wrongly"
        )


# ---- Mirroring ----


def allows_flip(dataset: str) -> bool:
    """False for datasets known to be of digits or letters, by the last part of the name; True for all others.

    Args:
        dataset: "digits", "owner/name" of the Hub, or a folder.
    """
    words = set(re.findall(r"[a-z]+(?:[0-9]+[a-z]*)*|[0-9]+", Path(dataset).name.lower()))
    return not words & _CHARACTER_DATASETS or bool(words & _OTHER_DATASETS)


def flip_warning(label_names: Sequence[str]) -> str | None:
    """Why mirroring may change the class, judged by the names of the classes; None if nothing suggests it.

    Args:
        label_names: name of each class.
    """
    names = [name.lower() for name in label_names]
    if all(re.fullmatch(r"\d|[a-z]", name) for name in names):
        return f"classes called {_first_names(label_names)} may be digits or letters"
    for name in names:
        for one, other in _OPPOSITES.items():
            swapped = re.sub(rf"(?<![a-z]){one}(?![a-z])", other, name)
            if swapped != name and swapped in names:
                pair = [label_names[names.index(each)] for each in (name, swapped)]
                return f"classes {pair[0]!r} and {pair[1]!r} may be mirror images of each other"
    return None


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
