"""Negative log-likelihood and expected calibration error of logits: an `evaluate` metric that needs no network.

Imports stand one module to a line because the parser of `evaluate.load` needs it so.
"""

import evaluate
import torch

from .accumulation import SummingMetric, logits_and_labels

BINS = 15

_DESCRIPTION = """
How well the probabilities of a classifier can be believed: mean negative log-likelihood in nats per item, and expected
calibration error over 15 bins of equal width of the confidence in the predicted class.
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""

_INPUTS = """
Args:
    predictions: logits (N, C).
    references: class numbers (N,); -100 is ignored.
Returns:
    nll: mean negative log-likelihood, in nats per item.
    ece: expected calibration error, a fraction between 0 and 1.
"""


class Calibration(SummingMetric):
    """{"nll", "ece"} of logits, in float64 from the logits on.

    ece is equation 3 of Guo et al. (2017) with 15 bins: the mean over items of |accuracy - confidence| of the item's
    bin, where bin m of M holds the confidences in ((m - 1) / M, m / M]. Confidence is the largest probability.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_INPUTS, features=logits_and_labels()
        )

    def _reset(self) -> None:
        self.nll_sum = 0.0
        self.confidence_sums = torch.zeros(BINS, dtype=torch.float64)
        self.correct_sums = torch.zeros(BINS, dtype=torch.float64)

    def _update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        log_probabilities = logits.log_softmax(dim=1)  # (n, C)
        self.nll_sum -= float(log_probabilities.gather(1, labels.unsqueeze(1)).sum())
        confidence = log_probabilities.amax(dim=1).exp()  # (n,)
        correct = (logits.argmax(dim=1) == labels).to(torch.float64)  # (n,)
        bins = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # (n,)
        self.confidence_sums.index_add_(0, bins, confidence)
        self.correct_sums.index_add_(0, bins, correct)

    def _result(self) -> dict[str, float]:
        gap = (self.correct_sums - self.confidence_sums).abs().sum()
        return {"nll": self.nll_sum / self.items, "ece": float(gap) / self.items}
