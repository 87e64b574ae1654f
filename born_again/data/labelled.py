"""Rows with labels of a Hub dataset, a folder or files: splits to train and evaluate on, and images transformed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from torch.utils.data import Dataset

from born_again.data.decode import choose_label_column, open_dataset, read_labels, warn
from born_again.data.fingerprint import dataset_sha256, seeded
from born_again.data.images import stratified_order

_FLAGS = {
    "--dataset ": "--dataset_name ",
    "--image_column ": "--image_column_name ",
    "--label_column ": "--label_column_name ",
}


@dataclass(frozen=True)
class LabelledSplits:
    """Splits with the label of each row.

    Args:
        train: rows to train on.
        evaluation: rows to evaluate on by split, "test" first where there is one.
        labels: (rows,) int64 of every split, "train" among them.
        names: of the classes by number.
    """

    train: datasets.Dataset
    evaluation: Mapping[str, datasets.Dataset]
    labels: Mapping[str, np.ndarray]
    names: tuple[str, ...]

    def splits(self) -> dict[str, datasets.Dataset]:
        """Every split by its name."""
        return {"train": self.train, **self.evaluation}


def read_labelled(
    dataset_name: str | None,
    config: str | None = None,
    revision: str | None = None,
    *,
    files: Mapping[str, str] | None = None,
    builder: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.15,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> LabelledSplits:
    """Reads every split that has labels; where none but "train" has, a part of it is held out as "validation".

    Args:
        dataset_name: Hub id or folder; None where files are given.
        config: of a Hub dataset with several.
        revision: branch, tag or commit of it.
        files: by split, or folders of images in CLASS/.
        builder: that reads them: "csv", "json", "imagefolder".
        label_column: found by its name and type when None.
        validation_fraction: of the training rows to hold out, in proportion of the classes; the same for every seed.
        max_train_samples: at most so many, in proportion of the classes.
        max_eval_samples: likewise of each other split.

    Raises:
        ValueError: nothing is found there, or no labels, or a label is missing; names the flag.
        ConnectionError: the Hub cannot be reached.
    """
    try:
        name, opened = _open(dataset_name, config, revision, files, builder)
        column = choose_label_column(name, opened["train"].features, label_column)
        kept = {split: rows for split, rows in opened.items() if _has_labels(rows, column)}
        if "train" not in kept:
            read_labels(name, {"train": opened["train"]}, column)  # says what is wrong
        labels, names = read_labels(name, kept, column)
    except (ValueError, ConnectionError) as error:
        text = str(error)
        for old, new in _FLAGS.items():
            text = text.replace(old, new)
        raise type(error)(text) from error
    if len(kept) == 1:
        kept, labels = _hold_out(name, kept["train"], labels["train"], validation_fraction)
    for split in kept:
        limit = max_train_samples if split == "train" else max_eval_samples
        if limit is not None and limit < len(labels[split]):
            chosen = np.sort(stratified_order(labels[split])[:limit])
            kept[split], labels[split] = kept[split].select(chosen), labels[split][chosen]
    order = sorted((split for split in kept if split != "train"), key=lambda split: split != "test")
    return LabelledSplits(kept["train"], {split: kept[split] for split in order}, labels, names)


def _open(
    name: str | None, config: str | None, revision: str | None, files: Mapping[str, str] | None, builder: str | None
) -> tuple[str, Mapping[str, datasets.Dataset]]:
    if files:
        if "train" not in files:
            raise ValueError(f"files: got {', '.join(files)} alone, expected a training part too; give it.")
        patterns: dict[str, Any] = {
            split: f"{path}/**" if builder == "imagefolder" else path for split, path in files.items()
        }
        try:
            found = datasets.load_dataset(builder or "csv", data_files=patterns)
        except (FileNotFoundError, OSError, DatasetGenerationError) as error:
            raise ValueError(
                f"files: {', '.join(files.values())} cannot be read ({error}); check the paths."
            ) from error
        return files["train"], _by_name(found)
    if name is None:
        raise ValueError("dataset_name: got none, expected a Hub id or a folder, or files; give --dataset_name.")
    opened = open_dataset(name, revision) if config is None else datasets.load_dataset(name, config, revision=revision)
    by_split = _by_name(opened)
    if "train" not in by_split:
        raise ValueError(f"--dataset {name!r} has the splits {', '.join(by_split)}; expected one called 'train'.")
    return name, by_split


def _by_name(opened: Any) -> dict[str, datasets.Dataset]:
    return {str(split): rows for split, rows in opened.items()}


def _has_labels(rows: datasets.Dataset, column: str) -> bool:
    """False for a split without the column, without rows, or with rows that have no label, as GLUE's test splits."""
    if column not in rows.column_names or not len(rows):
        return False
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return all(value is not None and (isinstance(value, str) or value >= 0) for value in values)


def _hold_out(
    name: str, train: datasets.Dataset, labels: np.ndarray, fraction: float
) -> tuple[dict[str, datasets.Dataset], dict[str, np.ndarray]]:
    count = round(fraction * len(labels))
    if not 0 < count < len(labels):
        raise ValueError(
            f"train_val_split: got {fraction}, which holds out {count} of {len(labels)} rows of {name!r}, which has "
            "no other split with labels; expected a share between 0 and 1 that leaves some."
        )
    warn(f"dataset {name!r}: no split but 'train' has labels, so {count:,} of its rows are held out as 'validation'")
    order = stratified_order(labels)
    kept, held_out = np.sort(order[count:]), np.sort(order[:count])
    return (
        {"train": train.select(kept), "validation": train.select(held_out)},
        {"train": labels[kept], "validation": labels[held_out]},
    )


class TransformedImages(Dataset):
    """Images of rows, transformed when they are read, as {"pixel_values", "labels"}.

    What a random transform draws for a row is a function of seed, epoch and row, whoever reads it and how often: any
    number of workers sees the same, and a training that is resumed in the middle of an epoch.

    Args:
        rows: with a column of images.
        column: its name.
        labels: (rows,) int64.
        transform: from a Pillow image to a float tensor (channels, height, width).
        convert: makes of a stored image what `transform` takes.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        column: str,
        labels: np.ndarray,
        transform: Callable[[Any], Tensor],
        convert: Callable[[Any], Any],
    ) -> None:
        self.rows, self.column, self.labels = rows, column, labels
        self.transform, self.convert = transform, convert
        self.seed, self.epoch = 0, 0

    def set_seed(self, seed: int) -> None:
        """Begins a training of its own."""
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draws anew."""
        self.epoch = epoch

    def select(self, indices: Sequence[int]) -> TransformedImages:
        """Some of its rows."""
        chosen = self.rows.select(indices), self.column, self.labels[np.asarray(indices)]
        return TransformedImages(*chosen, self.transform, self.convert)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.convert(self.rows[index][self.column])
        drawn = hashlib.sha256(f"{self.seed} {self.epoch} {index}".encode()).digest()
        with seeded(int.from_bytes(drawn[:4], "big")):
            pixels = self.transform(image)
        return {"pixel_values": pixels, "labels": int(self.labels[index])}

    @property
    def cache_fingerprint(self) -> str:
        """Of the stored images, the labels and the transform."""
        stored = dataset_sha256("train_dataset", self.rows.select_columns([self.column]))
        transform = re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform))
        digest = hashlib.sha256(f"{stored} {transform}".encode())
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()
