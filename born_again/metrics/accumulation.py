"""What the metrics of this package share: `evaluate` metrics that keep sums instead of predictions.

The stock `evaluate.Metric` writes every prediction to an Arrow file and reads them all back in `compute`. Here
`add_batch` reduces a batch to a few numbers at once, so that the memory of an evaluation does not grow with its
length.

`evaluate.load` copies this file beside the metric's own; imports stand one module to a line because its parser needs
it so.
"""

import abc
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

IGNORE_INDEX = -100


class SummingMetric(evaluate.Metric, abc.ABC):
    """Base of a metric of logits and labels that is a function of sums over items.

    A subclass gives `_info`, `_reset` (all sums to zero), `_update` (a batch into the sums) and `_result`. One object
    serves one evaluation at a time; gather predictions across processes before adding them, as Trainer does.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """
        Args:
            *args: those of `evaluate.Metric`.
            **kwargs: those of `evaluate.Metric`; `num_process` has to be 1.

        Raises:
            ValueError: if `num_process` is not 1.
        """
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"num_process is {self.num_process}; expected 1, since sums are kept in this process: gather "
                "predictions and references first (accelerator.gather_for_metrics)"
            )
        self.reset()

    # Neither add, add_batch nor compute may call super(): evaluate rebuilds them as plain functions.
    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch to the sums; nothing of it is kept.

        Args:
            predictions: logits (..., C), torch or numpy, any float dtype, any device.
            references: class numbers (...) of any integer dtype; items at -100 are ignored.
            **kwargs: none.

        Raises:
            ValueError: if shapes or dtypes do not fit, a label is out of range, the logits of a counted item
                have no softmax (NaN, infinity, minus infinity for every class), or the number of classes differs from
                that of the batches before.
        """
        if kwargs:
            raise ValueError(
                f"unexpected inputs {sorted(kwargs)}; expected predictions and references only: drop them"
            )
        values, labels, classes = self._counted(predictions, references)
        if None not in (classes, self.num_classes) and classes != self.num_classes:
            raise ValueError(
                f"predictions have {classes} classes and the batches before had {self.num_classes}; expected "
                "the same number in an evaluation: call compute() or reset() between two models"
            )
        self.num_classes = classes or self.num_classes
        if len(labels):
            self.items += len(labels)
            self._update(values, labels)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one item: logits (C,) and a class number."""
        if prediction is None or reference is None:
            raise ValueError("prediction or reference is None; expected logits (C,) and a class number: give both")
        row = torch.as_tensor(prediction).unsqueeze(0)  # (1, C)
        self.add_batch(predictions=row, references=torch.as_tensor([int(reference)]), **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """The metric over everything added since the last call (and `predictions`, if given), then start anew.

        Args:
            predictions: as in `add_batch`, optional.
            references: as in `add_batch`, optional.
            **kwargs: none.

        Returns:
            The values by name.

        Raises:
            ValueError: as `add_batch` does, and if no item was counted.
        """
        if predictions is not None or references is not None or kwargs:
            self.add_batch(predictions=predictions, references=references, **kwargs)
        if self.items == 0:
            raise ValueError(
                f"no item to compute {self.name} of: nothing was added, or every reference is {IGNORE_INDEX}; "
                "expected at least one: add a batch with labels first"
            )
        try:
            return self._result()
        finally:
            self.reset()

    def reset(self) -> None:
        """Forget everything added, as after an evaluation that was interrupted."""
        self.items = 0
        self.num_classes = None
        self._reset()

    def __len__(self) -> int:
        return self.items

    def _counted(self, predictions: Any, references: Any) -> tuple[torch.Tensor, torch.Tensor, int | None]:
        """Check a batch without touching the sums, and keep the items that count.

        Returns:
            What `_update` takes, here logits (n, C) float64; labels (n,) int64; and the number of classes, or None
            where the predictions do not tell it.

        Raises:
            ValueError: as `counted_items` does.
        """
        logits, labels = counted_items(predictions, references)
        return logits, labels, logits.shape[1]

    @abc.abstractmethod
    def _reset(self) -> None:
        """Set the sums to zero."""

    @abc.abstractmethod
    def _update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add what `_counted` gave to the sums: logits (n, C) float64 and labels (n,) int64 on the CPU; n >= 1."""

    @abc.abstractmethod
    def _result(self) -> dict[str, float]:
        """The values, from the sums and `self.items` >= 1."""


def logits_and_labels() -> datasets.Features:
    """The inputs as `evaluate` describes them: rows of float logits and integer labels."""
    return datasets.Features(
        {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
    )


def counted_items(predictions: Any, references: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a batch and keep the items that count.

    Args:
        predictions: logits (..., C), torch, numpy or lists, any float dtype, any device.
        references: class numbers (...), any integer dtype; -100 is ignored.

    Returns:
        Logits (n, C) float64 and labels (n,) int64 of the n items that are not ignored, on the CPU.

    Raises:
        ValueError: if something is missing, of the wrong dtype or shape, or out of range.
    """
    logits, labels = counted_rows(predictions, references)
    # Widened only now: of a padded batch most rows may be ignored.
    logits = logits.to("cpu").to(torch.float64)  # (n, C)
    check_logits((torch.isnan(logits) | torch.isposinf(logits)).any(dim=1) | torch.isneginf(logits).all(dim=1))
    return logits, labels


def as_tensors(predictions: Any, references: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and references, torch, numpy or lists, as tensors without a graph.

    Raises:
        ValueError: if one of them is None.
    """
    if predictions is None or references is None:
        missing = "predictions" if predictions is None else "references"
        raise ValueError(
            f"{missing} is None; expected logits (N, C) as predictions and labels (N,) as references: give both"
        )
    return _as_tensor(predictions), _as_tensor(references)


def counted_labels(labels: torch.Tensor, classes: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Check labels and keep those that count.

    Args:
        labels: class numbers (...), of any integer dtype, on any device; -100 is ignored.
        classes: how many classes there are; None where only negative labels can be told to be wrong.

    Returns:
        The labels (n,) int64 that are not ignored, and which of all they are (N,) bool; both on the CPU.

    Raises:
        ValueError: if labels are no integers, or one is out of range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"references is {labels.dtype}; expected integers: pass class numbers")
    labels = labels.reshape(-1).to("cpu", torch.int64)  # (N,)
    counted = labels != IGNORE_INDEX
    labels = labels[counted]  # (n,)
    wrong = labels < 0
    if classes is not None:
        wrong |= labels >= classes
    if wrong.any():
        expected = "0 or more" if classes is None else f"0 to {classes - 1} for {classes} classes"
        raise ValueError(
            f"references holds the label {labels[wrong][0].item()}; expected {expected}, or {IGNORE_INDEX} for an "
            "item to ignore: check that labels and model belong together"
        )
    return labels, counted


def counted_rows(predictions: Any, references: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Check all of a batch but the values of its logits, and keep the items that count.

    Args:
        predictions: as in `counted_items`.
        references: as in `counted_items`.

    Returns:
        Logits (n, C) of the n items that are not ignored, of the dtype and on the device they came with, and not
        copied where no item is ignored; labels (n,) int64 on the CPU.

    Raises:
        ValueError: if something is missing, of the wrong dtype or shape, or a label is out of range.
    """
    logits, labels = as_tensors(predictions, references)
    if not logits.is_floating_point() or logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"predictions is {tuple(logits.shape)} {logits.dtype}; expected float logits (N, C) of at least 2 "
            "classes: pass the model's logits, not their argmax"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"references is {tuple(labels.shape)} for predictions {tuple(logits.shape)}; expected "
            f"{tuple(logits.shape[:-1])}: one label for each row of logits"
        )
    classes = logits.shape[-1]
    labels, counted = counted_labels(labels, classes)
    logits = logits.reshape(-1, classes)  # (N, C)
    return logits if counted.all() else logits[counted.to(logits.device)], labels


def check_logits(broken: torch.Tensor) -> None:
    """Refuse a batch with counted rows (n,) bool whose logits have no softmax.

    Raises:
        ValueError: if any row is broken.
    """
    if broken.any():
        raise ValueError(
            f"predictions holds NaN or infinity in {int(broken.sum())} of {len(broken)} counted rows; expected finite "
            "logits: the model has diverged or overflowed, lower the learning rate or evaluate in float32"
        )


def _as_tensor(values: Any) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    return torch.from_numpy(np.array(values))
