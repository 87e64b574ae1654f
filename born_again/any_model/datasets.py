"""The datasets of a lineage: their splits, their labels, and where they come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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


def label_feature(dataset: Any) -> Any:
    features = getattr(dataset, "features", None) or {}
    return next((features[name] for name in ("labels", "label") if name in features), None)


def source_of(dataset: Any) -> str:
    """The Hub id of a dataset where its info tells it, else the name in its info, else "own data"."""
    info = getattr(dataset, "info", None)
    for url in getattr(info, "download_checksums", None) or {}:
        if match := _HUB_DATA.match(str(url)):
            return match[1]
    return getattr(info, "dataset_name", None) or "own data"
