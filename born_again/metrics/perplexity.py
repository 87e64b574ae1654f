"""Perplexity of a language model, accumulated by the batch: an `evaluate` metric that needs no network.

Imports stand one module to a line because the parser of `evaluate.load` needs it so.
"""

import math
from typing import Any

import datasets
import evaluate
import torch

from .accumulation import (
    IGNORE_INDEX,
    SummingMetric,
    as_tensors,
    check_logits,
    counted_labels,
    counted_rows,
    logits_and_labels,
)

# Rows of logits that are widened at a time: at 10,000 classes 10 MB instead of the whole batch.
ROWS = 256

# How far below 0 rounding may take a negative log-likelihood, in nats.
_ROUNDING = 1e-6

_DESCRIPTION = """
Mean negative log-likelihood in nats per token, perplexity (its exponential) and number of the tokens whose reference
is not -100. Perplexity is per token as the caller cuts the text: in word-level corpora a token is a word.
"""

_INPUTS = """
Args:
    predictions: logits (..., C), or negative log-likelihoods of the tokens in nats (...).
    references: token numbers (...), already shifted: position i of predictions is about references i; -100 is ignored.
Returns:
    nll: mean negative log-likelihood, in nats per token.
    perplexity: exp(nll), per token; inf where a token has probability 0 or float64 cannot hold the value.
    tokens: number of tokens counted.
"""


class Perplexity(SummingMetric):
    """{"nll", "perplexity", "tokens"} of a language model, every token with the same weight.

    Predictions come in two forms, told apart by their dimensions: logits (..., C) with one dimension more than the
    references, or token negative log-likelihoods (...) in nats, -log p(token), of the shape of the references. Both
    may be used in one evaluation. Shift before: position i of predictions is about references i.

    Logits are put through log_softmax in float32 (float64 ones in float64), on their device and `ROWS` rows at a time;
    sums are in float64. Token negative log-likelihoods at ignored tokens may be anything, NaN included; elsewhere
    infinity is allowed and makes the perplexity infinite. They say nothing of the vocabulary, so of their references
    only negative ones are known to be wrong.

    The unit is a token as the caller defines it: token = word for word-level corpora. Values of models with different
    vocabularies or tokenizations do not compare.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[logits_and_labels(), _nlls_and_labels()],
        )

    def _counted(self, predictions: Any, references: Any) -> tuple[torch.Tensor, torch.Tensor, int | None]:
        """Token negative log-likelihoods (n,) float64 in nats and labels (n,) int64, both on the CPU, and C or None.

        Raises:
            ValueError: if something is missing, of the wrong dtype or shape, or out of range.
        """
        values, labels = as_tensors(predictions, references)
        if values.ndim > labels.ndim:
            logits, labels = counted_rows(values, labels)
            return _nlls_of_logits(logits, labels), labels, logits.shape[1]
        return *_counted_nlls(values, labels), None

    def _reset(self) -> None:
        self.nll_sum = 0.0

    def _update(self, nlls: torch.Tensor, labels: torch.Tensor) -> None:
        self.nll_sum += float(nlls.sum())

    def _result(self) -> dict[str, float]:
        nll = self.nll_sum / self.items
        try:
            perplexity = math.exp(nll)
        except OverflowError:
            perplexity = math.inf
        return {"nll": nll, "perplexity": perplexity, "tokens": self.items}


def token_nlls(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each token, as `Perplexity` sums them.

    Args:
        logits: (..., C), any float dtype, any device.
        labels: (...), already shifted; -100 is ignored.

    Returns:
        (...) float64 in nats, 0 where a token is ignored; which are counted, (...) bool. Both on the CPU.

    Raises:
        ValueError: shapes or dtypes that do not fit, a label out of range, or logits that have no softmax.
    """
    rows, kept = counted_rows(logits, labels)
    counted = labels.cpu() != IGNORE_INDEX
    nlls = torch.zeros(labels.shape, dtype=torch.float64)
    nlls[counted] = _nlls_of_logits(rows, kept)
    return nlls, counted


def _nlls_and_labels() -> datasets.Features:
    return datasets.Features({"predictions": datasets.Value("float32"), "references": datasets.Value("int64")})


def _nlls_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods (n,) float64 on the CPU, from logits (n, C) of any dtype and device and labels (n,)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nlls = torch.empty(len(labels), dtype=torch.float64)
    for start in range(0, len(labels), ROWS):
        part = slice(start, start + ROWS)
        own = labels[part].unsqueeze(1).to(logits.device)  # (rows, 1)
        nlls[part] = -logits[part].to(dtype).log_softmax(dim=1).gather(1, own).squeeze(1).to("cpu")
    # A row that holds NaN or infinity, or minus infinity only, is NaN in every class after log_softmax.
    check_logits(nlls.isnan())
    return nlls


def _counted_nlls(nlls: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check token negative log-likelihoods (...) and keep those that count: (n,) float64 and labels (n,) int64."""
    if not nlls.is_floating_point():
        raise ValueError(
            f"predictions is {tuple(nlls.shape)} {nlls.dtype}; expected float logits (..., C) or token negative "
            "log-likelihoods (...): pass what the model gives, not token numbers"
        )
    if nlls.shape != labels.shape:
        shape = tuple(labels.shape)
        raise ValueError(
            f"predictions is {tuple(nlls.shape)} for references {shape}; expected token negative log-likelihoods "
            f"{shape}, or logits with the classes as one more dimension: give one value for each token "
            "(cross_entropy(..., reduction='none')) and reshape both alike"
        )
    labels, counted = counted_labels(labels)
    nlls = nlls.reshape(-1).to("cpu").to(torch.float64)[counted]  # (n,)
    broken = nlls.isnan()
    if broken.any():
        raise ValueError(
            f"predictions holds NaN in {int(broken.sum())} of {len(nlls)} counted tokens; expected negative "
            "log-likelihoods: the model has diverged or overflowed, lower the learning rate or evaluate in float32"
        )
    if (nlls < -_ROUNDING).any():
        raise ValueError(
            f"predictions holds {float(nlls.min()):g}; expected negative log-likelihoods of 0 or more, in nats: pass "
            "-log p(token), not log-probabilities or densities, computed in float32 or wider"
        )
    return nlls, labels
