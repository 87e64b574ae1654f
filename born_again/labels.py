"""What a batch of labels must be, found out without waiting for the device at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from born_again.objectives import IGNORED


def class_numbers(labels: Any, column: str) -> Tensor:
    """The labels of a batch as int64.

    Args:
        labels: of any integer dtype, or bool.
        column: where they come from, for the message.

    Raises:
        ValueError: no tensor, or one of floats, such as the soft labels of mixup.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{column}: got {type(labels).__name__} in a batch, expected a tensor of class numbers; have the collator "
            "make one."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{column}: got {labels.dtype} of shape {tuple(labels.shape)} in a batch, expected class numbers of an "
            f"integer dtype, {IGNORED} for items that do not count. Class numbers that are stored as floats: cast the "
            "column to int64. Soft labels, as mixup and CutMix make them, are not read here: leave them out, or mix "
            "the images alone, since a teacher gives a distribution for a mixed image by itself."
        )
    return labels.long()


class LabelRange:
    """Remembers the smallest and the largest label of a training, and says so where they are no classes.

    On a CPU a batch is looked at when it is seen, before a kernel fails on it. On another device nothing is waited
    for: the losses take any class for a label that is none, and `check` reads what was seen.

    Args:
        column: of the labels, for the message.
    """

    def __init__(self, column: str = "labels") -> None:
        self.column = column
        self._seen: Tensor | None = None  # (2,): minus the smallest, and the largest label above the last class
        self._classes = 0

    def see(self, targets: Tensor, classes: int) -> None:
        """Takes note of a batch.

        Args:
            targets: (items,) int64, `IGNORED` for items that do not count.
            classes: how many the logits have.

        Raises:
            ValueError: a label is no class; on a CPU.
        """
        if targets.numel() == 0:
            return
        low, high = torch.aminmax(targets.where(targets != IGNORED, 0))
        seen = torch.stack([-low, high - (classes - 1)])
        self._seen = seen if self._seen is None else self._seen.maximum(seen)
        self._classes = classes
        if targets.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Looks at what was seen since the last check.

        Raises:
            ValueError: a label was no class; names the column and one such label.
        """
        if self._seen is None:
            return
        (below, above), self._seen = self._seen.tolist(), None
        if below <= 0 and above <= 0:
            return
        label = -below if below > 0 else self._classes - 1 + above
        raise ValueError(
            f"{self.column}: got {label} in a batch, expected class numbers 0 to {self._classes - 1}, or {IGNORED} "
            "for items that do not count. Number the classes from 0, leave rows without a label out (often "
            "marked by -1), or build the networks for more classes."
        )
