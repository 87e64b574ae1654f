"""Intervals of means and differences: Student's t over runs, and the bootstrap over test items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from born_again.lineage.predictions import Predictions

LEVEL = 0.95
# As born_again.metrics.calibration, which is not imported since it takes seconds.
_BINS = 15
_REPLICATES = 1000
_MAX_WEIGHTS = 50_000_000  # 400 MB

Interval = tuple[float, float]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1), which is None for one value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def t_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % interval of the mean of independent values by Student's t, None for fewer than two values."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return None
    mean, deviation = mean_and_deviation(values)
    half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * (deviation or 0.0) / math.sqrt(len(values))
    return mean - half, mean + half


class ItemBootstrap:
    """Metrics on test splits resampled with replacement (Efron 1979), the same resampled splits for every network.

    The differences of two networks on the same resampled splits are paired: what makes an item hard for both cancels.
    The items are images, or blocks of consecutive tokens, since the losses of neighbouring tokens are correlated. It
    says how far a difference depends on which items the split happens to hold, for these trained networks.

    Args:
        items: of the split.
        seed: of the resampling.
    """

    def __init__(self, items: int, seed: int = 0) -> None:
        replicates = max(1, min(_REPLICATES, _MAX_WEIGHTS // items))
        counts = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=replicates)
        self._counts = counts.astype(np.float64)  # (replicates, items): how often each item is drawn

    def metrics(self, predictions: Predictions) -> dict[str, np.ndarray]:
        """The metrics of a network on every resampled split, (replicates,) each.

        Args:
            predictions: of the split, see `born_again.lineage.predictions.SplitMetrics`.

        Returns:
            accuracy, nll and ece of images; nll and perplexity of text.
        """
        if "tokens" in predictions:
            sums = self._sums(np.stack([predictions["nll_sum"], predictions["tokens"]], axis=1))
            nll = sums[:, 0] / sums[:, 1]
            with np.errstate(over="ignore"):
                return {"nll": nll, "perplexity": np.exp(nll)}
        correct = predictions["label"] == predictions["predicted"]  # (items,)
        confidence = predictions["confidence"].astype(np.float64)
        bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
        gaps = np.zeros((len(correct), _BINS))
        gaps[np.arange(len(correct)), bins] = correct - confidence
        # (replicates, 2 + bins)
        means = self._sums(np.column_stack([correct, predictions["nll"], gaps])) / len(correct)
        return {"accuracy": means[:, 0], "nll": means[:, 1], "ece": np.abs(means[:, 2:]).sum(axis=1)}

    def _sums(self, columns: np.ndarray) -> np.ndarray:
        return self._counts @ columns.astype(np.float64)


def percentile_interval(values: np.ndarray) -> Interval | None:
    """The middle 95 % of bootstrap values, None where one is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
