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
        logits, labels = counted_items(predictions, references)
        if self.num_classes not in (None, logits.shape[1]):
            raise ValueError(
                f"predictions have {logits.shape[1]} classes and the batches before had {self.num_classes}; expected "
                "the same number in an evaluation: call compute() or reset() between two models"
            )
        self.num_classes = logits.shape[1]
        if len(labels):
            self.items += len(labels)
            self._update(logits, labels)

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

    @abc.abstractmethod
    def _reset(self) -> None:
        """Set the sums to zero."""

    @abc.abstractmethod
    def _update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add logits (n, C) float64 and labels (n,) int64, both on the CPU, to the sums; n >= 1."""

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
    if predictions is None or references is None:
        missing = "predictions" if predictions is None else "references"
        raise ValueError(
            f"{missing} is None; expected logits (N, C) as predictions and labels (N,) as references: give both"
        )
    logits = _as_tensor(predictions)
    labels = _as_tensor(references)
    if not logits.is_floating_point() or logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(
            f"predictions is {tuple(logits.shape)} {logits.dtype}; expected float logits (N, C) of at least 2 "
            "classes: pass the model's logits, not their argmax"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"references is {labels.dtype}; expected integers: pass class numbers")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"references is {tuple(labels.shape)} for predictions {tuple(logits.shape)}; expected "
            f"{tuple(logits.shape[:-1])}: one label for each row of logits"
        )
    classes = logits.shape[-1]
    labels = labels.reshape(-1).to("cpu", torch.int64)  # (N,)
    counted = labels != IGNORE_INDEX
    labels = labels[counted]  # (n,)
    # Picked before moving and widening: of a padded batch most rows may be ignored.
    logits = logits.reshape(-1, classes)[counted.to(logits.device)].to("cpu").to(torch.float64)  # (n, C)
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(
            f"references holds the label {labels[wrong][0].item()}; expected 0 to {classes - 1} for {classes} "
            f"classes, or {IGNORE_INDEX} for an item to ignore: check that labels and model belong together"
        )
    broken = (torch.isnan(logits) | torch.isposinf(logits)).any(dim=1) | torch.isneginf(logits).all(dim=1)  # (n,)
    if broken.any():
        raise ValueError(
            f"predictions holds NaN or infinity in {int(broken.sum())} of {len(labels)} counted rows; expected finite "
            "logits: the model has diverged or overflowed, lower the learning rate or evaluate in float32"
        )
    return logits, labels


def _as_tensor(values: Any) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    return torch.from_numpy(np.array(values))
