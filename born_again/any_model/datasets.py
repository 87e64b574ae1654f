"""The datasets of a lineage: their splits, their labels, and where they come from."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from born_again.data.fingerprint import seeded
from born_again.objectives import IGNORED

logger = logging.getLogger(__name__)

_HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)@")


def splits(eval_dataset: Any) -> tuple[dict[str, Any], str]:
    """The datasets by the split that they are recorded as, and the name that the data has for "test"."""
    if not isinstance(eval_dataset, Mapping):
        own = getattr(eval_dataset, "split", None)
        return {"test": eval_dataset}, str(own) if own is not None and re.fullmatch(r"\w+", str(own)) else "test"
    named = {str(name): dataset for name, dataset in eval_dataset.items()}
    if "train" in named:
        raise ValueError(
            "eval_dataset: got a split 'train', which is the training data's, expected other names; rename it."
        )
    if "test" in named:
        return named, "test"
    first = next(iter(named))
    return {"test" if name == first else name: dataset for name, dataset in named.items()}, first


def chosen_on(eval_dataset: Any, metric: str | None) -> tuple[str | None, Any]:
    """What a trainer evaluates while it trains, so that eval_loss and metric_for_best_model are of one dataset.

    Args:
        eval_dataset: as Trainer takes it.
        metric: metric_for_best_model.

    Returns:
        The name of the split, and its dataset: "validation", else the first that is not "test". The name is None for
        the whole mapping, where the metric is named after one of several splits, as Trainer names them.
    """
    if not isinstance(eval_dataset, Mapping):
        return splits(eval_dataset)[1], eval_dataset
    asked = (metric or "").removeprefix("eval_")
    if any(asked.startswith(f"{name}_") for name in eval_dataset):
        return None, eval_dataset
    names = sorted(map(str, eval_dataset), key=lambda name: (name != "validation", name == "test"))
    return names[0], {str(name): dataset for name, dataset in eval_dataset.items()}[names[0]]


def label_names(dataset: Any) -> list[str] | None:
    """The names of the classes by number, where a dataset of the `datasets` library has them."""
    features = getattr(dataset, "features", None) or {}
    feature = next((features[name] for name in ("labels", "label") if name in features), None)
    return getattr(getattr(feature, "feature", feature), "names", None)  # of token classes in a list


def own_names(network: Any) -> list[str] | None:
    """The names of the classes that a network's config has, None where they are LABEL_0 and so on, as by default."""
    labels = getattr(getattr(network, "config", None), "id2label", None)
    if not labels:
        return None
    names = [str(labels[index]) for index in sorted(labels)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def check_labels(parts: Mapping[str, Any], classes: int, label_name: str, names: list[str] | None) -> None:
    """Checks the labels of all rows where they can be read without the rest of these.

    Args:
        parts: datasets by split, with "train".
        classes: of the network.
        label_name: of the labels in a batch.
        names: of the network's classes, see `own_names`.

    Raises:
        ValueError: labels that are no class of the network; names of classes that contradict each other.
    """
    given = {split: own for split, dataset in parts.items() if (own := label_names(dataset)) is not None}
    for split, own in given.items():
        if own != (first := given.get("train", own)):
            raise ValueError(
                f"eval_dataset: the classes of the split {split!r} are {_shown(own)}, and of train_dataset "
                f"{_shown(first)}; expected the same in the same order, as by datasets' align_labels_with_mapping."
            )
        if names is None or own == names:
            continue
        if sorted(map(str.casefold, own)) == sorted(map(str.casefold, names)):
            if list(map(str.casefold, own)) != list(map(str.casefold, names)):
                raise ValueError(
                    f"id2label: the classes of the network are {_shown(names)}, and of the split {split!r} "
                    f"{_shown(own)}; expected the same order; give id2label and label2id where the network is made."
                )
        elif split == "train":
            logger.warning(
                "id2label: the classes of the network are called %s, and of the dataset %s; the first are saved.",
                _shown(names),
                _shown(own),
            )
    found = {split: own for split, dataset in parts.items() if (own := stored_labels(dataset, label_name)) is not None}
    for split, own in found.items():
        if wrong := sorted(label for label in own if label != IGNORED and not 0 <= label < classes):
            raise ValueError(
                f"{label_name}: got {', '.join(map(str, wrong[:5]))} in the split {split!r}, expected class numbers 0 "
                f"to {classes - 1}, or {IGNORED} for items that do not count. Number the classes from 0, leave rows "
                "without a label out (often marked by -1), or build the network for more classes."
            )
        if "train" in found and (unseen := sorted(own - found["train"] - {IGNORED})):
            called = names or given.get(split)
            logger.warning(
                "eval_dataset: no row of train_dataset has the classes %s, which the split %r has, so that no "
                "generation can learn them.",
                _shown([called[label] if called and label < len(called) else str(label) for label in unseen]),
                split,
            )


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def stored_labels(dataset: Any, label_name: str) -> set[int] | None:
    """The class numbers of a dataset, read without the rest of its rows.

    None where they are not stored as integers, or where reading a row gives another label than is stored.
    """
    known = (label_name, "label", "label_ids")
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset)):
        return None
    if hasattr(dataset, "with_format"):  # of the datasets library
        column = next((name for name in known if name in dataset.column_names), None)
        if column is None:
            return None
        values = dataset.select_columns([column]).with_format("arrow")[:].column(column).combine_chunks()
        first = values[:1].to_pylist()
        while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
            values = values.flatten()
        if not str(values.type).startswith(("int", "uint")):
            return None
        stored = {label for label in values.unique().to_pylist() if label is not None}
    elif isinstance(getattr(dataset, "labels", None), np.ndarray) and len(dataset.labels) == len(dataset):
        first, stored = dataset.labels[:1].tolist(), set(np.unique(dataset.labels).tolist())
    elif isinstance(dataset, list) and all(isinstance(row, Mapping) for row in dataset):
        name = next((name for name in known if name in dataset[0]), None)
        if name is None or not all(name in row for row in dataset):
            return None
        values = [np.asarray(row[name]) for row in dataset]
        return set(np.unique(np.concatenate([own.ravel() for own in values])).tolist()) if _are_whole(values) else None
    else:
        return None
    with seeded(0):
        row = dataset[0]
    read = next((row[name] for name in known if name in row), None)
    return stored if read is not None and np.array_equal(np.asarray(read), np.asarray(first[0])) else None


def _are_whole(values: list[np.ndarray]) -> bool:
    return all(own.dtype.kind in "iu" for own in values)


def source_of(dataset: Any) -> str:
    """The Hub id of a dataset where its info tells it, else the name in its info, else "own data"."""
    info = getattr(dataset, "info", None)
    for url in getattr(info, "download_checksums", None) or {}:
        if match := _HUB_DATA.match(str(url)):
            return match[1]
    return getattr(info, "dataset_name", None) or "own data"
