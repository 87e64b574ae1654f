"""The training accuracy of a teacher, and the warning where it underfits."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers import Trainer

from born_again.objectives import IGNORED
from born_again.teacher import logits_of

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

FITTED_ACCURACY = 0.98
ACCURACY_SAMPLES = 2048


class TeacherAccuracyMixin:
    """The part of BornAgainTrainer that evaluates its teacher on the training set."""

    def _samples_to_measure(self) -> int:
        if self.teacher is None:
            return 0
        if self.args.teacher_accuracy_samples is None:
            return ACCURACY_SAMPLES if self.in_lineage or self._may_warn_of_teacher() else 0
        return self.args.teacher_accuracy_samples

    def _may_warn_of_teacher(self) -> bool:
        return self._has_label_term is False

    def evaluate_teacher(self, samples: int | None = None) -> dict[str, float] | None:
        """Accuracy of the teacher on evenly spaced training samples, as they are shown to the student.

        The random number generators are left as they were.

        Args:
            samples: how many; None is `teacher_accuracy_samples`, 2,048 where that is not given.

        Returns:
            {"accuracy": fraction of items whose argmax is the label, "samples": how many rows of the training set},
            or None for a training set without a length.
        """
        if self.teacher is None or not can_be_indexed(self.train_dataset):
            return None
        return self._training_accuracy(
            samples or self.args.teacher_accuracy_samples or ACCURACY_SAMPLES, self._teacher_rows
        )

    def evaluate_student(self) -> dict[str, float] | None:
        """What `evaluate_teacher` gives, of the student as it is now: how much of its training set it has learned.

        Returns:
            As there.
        """
        if not (self._owns_loss and can_be_indexed(self.train_dataset)):
            return None
        # Of a student in shards the wrapper puts the weights together.
        student = self.model_wrapped if self.is_sharded else self.model

        def rows(inputs: Mapping[str, Any], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            with torch.no_grad(), self.accelerator.autocast():
                yield self._items(logits_of(self._student_forward(student, inputs)), labels)

        was_training = self.model.training
        self.model.eval()
        try:
            return self._training_accuracy(self.args.teacher_accuracy_samples or ACCURACY_SAMPLES, rows)
        finally:
            self.model.train(was_training)

    def _training_accuracy(
        self, samples: int, logits_and_targets: Callable[[Mapping[str, Any], Tensor], Iterable[tuple[Tensor, Tensor]]]
    ) -> dict[str, float]:
        dataset = evenly_spaced(self.train_dataset, samples)
        correct = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with self._leaving_generators_alone():
            for batch in self._rows_in_order(dataset):
                inputs, labels = self._split_labels(self._prepare_inputs(batch))
                with self._eager_where_smaller(batch):
                    parts = [((rows.argmax(-1) == targets), targets != IGNORED)
                             for rows, targets in logits_and_targets(inputs, labels)]  # fmt: skip
                right, counted = (torch.cat(part).double() for part in zip(*parts, strict=True))
                sums = sums_of_rows(right, counted, len(labels))
                correct += self.accelerator.gather_for_metrics(sums).sum(0)
        right, items = correct.tolist()
        return {"accuracy": right / max(items, 1), "samples": len(dataset)}

    def _rows_in_order(self, dataset: Dataset) -> DataLoader:
        """Every row of a dataset, by a loader that serves nothing else, in batches of the training's size.

        Trainer would keep one of get_eval_dataloader for its evaluations where workers are persistent. Another size
        would be a second shape for a compiled or captured teacher.
        """
        settings = {"dataloader_drop_last": False, "dataloader_persistent_workers": False}
        with changed(self.args, per_device_eval_batch_size=self._train_batch_size, **settings):
            return Trainer.get_test_dataloader(self, dataset)

    @contextmanager
    def _leaving_generators_alone(self) -> Iterator[None]:
        """Restores the random states of torch, numpy and Python: iterating over a DataLoader draws numbers."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        python, arrays = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)

    def _warn_if_teacher_underfits(self) -> None:
        if self.teacher_train_metrics is not None and self._may_warn_of_teacher() and self.is_world_process_zero():
            warn_if_classifier_underfits(self.teacher_train_metrics["accuracy"], self.args.objective)


def can_be_indexed(dataset: Any) -> bool:
    """Whether a training set can be read without taking its rows from the training: not a stream, even one that says
    how long it is."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def evenly_spaced(dataset: Dataset | datasets.Dataset, samples: int) -> Dataset | datasets.Dataset:
    """At most so many rows of a dataset, evenly spaced and always the same.

    Args:
        dataset: with a length.
        samples: rows to keep, at least 1.

    Returns:
        A part of the dataset; one of the datasets library stays one, so that Trainer still drops the columns that no
        forward takes.
    """
    count = min(samples, len(dataset))
    indices = [index * len(dataset) // count for index in range(count)]
    library = sys.modules.get("datasets")  # imported by whoever made one of its datasets
    if library is not None and isinstance(dataset, library.Dataset):
        return dataset.select(indices)
    return Subset(dataset, indices)


@contextmanager
def changed(args: Any, **values: Any) -> Iterator[None]:
    """Inside, these attributes, such as training arguments, have other values."""
    before = {name: getattr(args, name) for name in values}
    for name, value in values.items():
        setattr(args, name, value)
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


def warn_if_classifier_underfits(accuracy: float, objective: str) -> None:
    """Warns where a teacher underfits its training set, of an objective without a label term to make up for it.

    Args:
        accuracy: of the teacher on (a sample of) the training set, a fraction.
        objective: what the student is taught by.
    """
    if accuracy >= FITTED_ACCURACY:
        return
    logger.warning(
        f"The teacher underfits: its accuracy on a sample of the training set is {accuracy:.1%}, under "
        f"{FITTED_ACCURACY:.0%}, and objective {objective!r} has no label term, so the student may be worse than its "
        "teacher. Train the teacher longer, or use objective 'ban+l' (in the paper only BAN+L worked for the LSTMs, "
        "whose teacher underfits)."
    )
