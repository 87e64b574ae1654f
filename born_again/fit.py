"""How well a teacher knows the training set, and when that is too little to teach."""

from __future__ import annotations

import logging

import datasets
from torch.utils.data import Dataset, Subset

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
