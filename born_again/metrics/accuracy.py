"""Accuracy of logits, accumulated by the batch: an `evaluate` metric that loads from this file without a network.

Imports stand one module to a line because the parser of `evaluate.load` needs it so.
"""

import evaluate
import torch

from .accumulation import SummingMetric, logits_and_labels

_TOP = 5

_DESCRIPTION = """
Top-1 accuracy, top-1 error and top-5 accuracy of classification logits, as fractions of the items whose label is not
-100.
"""

_INPUTS = """
Args:
    predictions: logits (N, C).
    references: class numbers (N,); -100 is ignored.
Returns:
    accuracy: fraction of items whose label has the largest logit; among equal logits the lower class comes first.
    error: 1 - accuracy.
    top5_accuracy: fraction of items whose label is among the 5 first; left out below 6 classes, where it is always 1.
"""


class Accuracy(SummingMetric):
    """{"accuracy", "error", "top5_accuracy"} of logits; top-5 only from 6 classes on.

    Ties are broken towards the lower class, as argmax does, so a model with equal logits for all classes does not
    score.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=logits_and_labels()
        )

    def _reset(self) -> None:
        self.first = 0
        self.among_top = 0

    def _update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        own = logits.gather(1, labels.unsqueeze(1))  # (n, 1)
        lower = torch.arange(logits.shape[1]) < labels.unsqueeze(1)  # (n, C)
        rank = ((logits > own) | ((logits == own) & lower)).sum(dim=1)  # (n,)
        self.first += int((rank == 0).sum())
        self.among_top += int((rank < _TOP).sum())

    def _result(self) -> dict[str, float]:
        values = {"accuracy": self.first / self.items, "error": (self.items - self.first) / self.items}
        if self.num_classes is not None and self.num_classes > _TOP:
            values["top5_accuracy"] = self.among_top / self.items
        return values
