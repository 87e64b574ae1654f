"""How well a teacher knows the training set, and when that is too little to teach."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import TrainingArguments

from born_again.objectives import OBJECTIVES_WITH_LABELS

logger = logging.getLogger(__name__)

FITTED = 0.98


def evenly_spaced(dataset: Dataset | datasets.Dataset, samples: int) -> Dataset | datasets.Dataset:
    """At most so many rows of a dataset, evenly spaced and always the same.

    Args:
        dataset: with a length.
        samples: rows to keep, at least 1.

    Returns:
        A part of the dataset; one of the datasets library stays one, so that Trainer still drops the columns that no
        forward takes.
    """
    kept = min(samples, len(dataset))
    indices = [index * len(dataset) // kept for index in range(kept)]
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)


@contextmanager
def everything_once(args: TrainingArguments) -> Iterator[None]:
    """Inside, a Trainer's loaders drop no row, and their workers end with them."""
    names = ("dataloader_drop_last", "dataloader_persistent_workers")
    before = {name: getattr(args, name) for name in names}
    for name in names:
        setattr(args, name, False)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def sums_of_rows(values: Tensor, weights: Tensor, rows: int) -> Tensor:
    """What the items of each row of a batch add up to.

    Args:
        values: (rows x items of a row,), 0 or ignored where the weight is 0.
        weights: the same shape.
        rows: how many the batch has.

    Returns:
        (rows, 2) float64: sum(weight x value) and sum(weight).
    """
    values, weights = values.detach().double(), weights.detach().double()
    return torch.stack([(values * weights).view(rows, -1).sum(-1), weights.view(rows, -1).sum(-1)], -1)


def warn_of_an_unfitted_classifier(accuracy: float, objective: str) -> None:
    """Says where a teacher has not fitted its training set and the objective has no label term to make up for it.

    Args:
        accuracy: of the teacher on (a sample of) the training set, a fraction.
        objective: what the student is taught by.
    """
    if accuracy >= FITTED or objective in OBJECTIVES_WITH_LABELS:
        return
    logger.warning(
        f"The teacher is right on {accuracy:.1%} of a sample of the training set, under {FITTED:.0%}, and objective "
        f"{objective!r} has no label term: the student may come out below its teacher. Train the teacher longer, or "
        "use objective 'ban+l' (the paper: where the teacher had not fitted, its LSTMs, only BAN+L worked)."
    )
