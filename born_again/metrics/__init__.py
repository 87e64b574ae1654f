"""Metrics as `evaluate` modules of our own, which load from their files and need no network.

`evaluate.load("PATH/born_again/metrics/accuracy.py")` and direct use of the classes both work. Importing this package
does not import `evaluate`, which costs seconds: only using a metric does.
"""

from collections.abc import Callable
from typing import Any


def classification_metrics() -> Callable[..., dict[str, float]]:
    """Make a `compute_metrics` for `Trainer`: accuracy, error, top-5 accuracy (from 6 classes), nll and ece.

    Meant for `batch_eval_metrics=True`, where Trainer hands over every gathered batch and says which one is the last:
    only sums are kept. Without that setting it is called once with everything, and works too.

    Returns:
        `compute_metrics(eval_prediction, compute_result=True)`, which returns {} until `compute_result` is true, then
        all values, and starts anew. It has the method `reset()`, for after an evaluation that broke off.

    Example:
        >>> import numpy
        >>> from transformers import EvalPrediction
        >>> logits, labels = numpy.array([[2.0, 0.0], [2.0, 0.0]]), numpy.array([0, 1])
        >>> metrics = classification_metrics()(EvalPrediction(logits, labels))
        >>> metrics["accuracy"], metrics["error"], sorted(metrics)
        (0.5, 0.5, ['accuracy', 'ece', 'error', 'nll'])
    """
    # Imported here: evaluate takes seconds to import, and nothing else of this package needs it.
    from born_again.metrics.accuracy import Accuracy
    from born_again.metrics.calibration import Calibration

    return BatchMetrics([Accuracy(), Calibration()])


def language_model_metrics() -> Callable[..., dict[str, float]]:
    """Make a `compute_metrics` for `Trainer`: nll in nats per token, perplexity, and the number of tokens.

    Predictions are logits (..., C), or the negative log-likelihood of each token in nats, of the shape of the labels:
    with that, nobody needs to keep a row of logits for each token. Labels are shifted already: position i predicts
    label i; -100 is ignored. For `batch_eval_metrics`, see `classification_metrics`.

    Returns:
        `compute_metrics(eval_prediction, compute_result=True)`, as `classification_metrics` does.
    """
    # Imported here for the reason given above.
    from born_again.metrics.perplexity import Perplexity

    return BatchMetrics([Perplexity()])


class BatchMetrics:
    """Several summing metrics behind the one call that Trainer makes."""

    def __init__(self, metrics: list):
        """
        Args:
            metrics: objects with add_batch, compute and reset, such as `Accuracy()`.
        """
        self.metrics = metrics

    def __call__(self, eval_prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; at the last one, return the values.

        Args:
            eval_prediction: transformers' EvalPrediction: predictions are logits (B, C), or what else the metrics
                take, or a tuple that begins with them; label_ids labels (B,) or a tuple that begins with them.
            compute_result: whether this is the last batch.

        Raises:
            ValueError: from a metric; all of them have then been reset, so the next evaluation starts clean.
        """
        logits = _first(eval_prediction.predictions)
        labels = _first(eval_prediction.label_ids)
        values: dict[str, float] = {}
        try:
            for metric in self.metrics:
                metric.add_batch(predictions=logits, references=labels)
            if compute_result:
                values = self.compute()
        except ValueError:
            self.reset()
            raise
        return values

    def compute(self) -> dict[str, float]:
        """The values over all batches added since the last compute or reset, which are then forgotten.

        Raises:
            ValueError: if no item was added.
        """
        values: dict[str, float] = {}
        for metric in self.metrics:
            values.update(metric.compute())
        return values

    def reset(self) -> None:
        """Forget the batches added so far."""
        for metric in self.metrics:
            metric.reset()


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, (tuple, list)) else values
