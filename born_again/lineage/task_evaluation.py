"""Evaluates a network of any served task on the data that a trainer would be given: plain cross-entropy, by split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import RemoveColumnsCollator

from born_again.data.fingerprint import seeded
from born_again.lineage.predictions import SplitMetrics
from born_again.metrics import classification_metrics
from born_again.objectives import IGNORED
from born_again.teacher import logits_of
from born_again.teacher.inputs import NetworkInputs, cast_floating, input_dtype
from born_again.training.checks import LabelRange, class_numbers
from born_again.training.lm_trainer import perplexity

logger = logging.getLogger(__name__)

LANGUAGE_TASKS = ("text-generation", "fill-mask")
_LABEL_NAMES = ("label", "label_ids", "labels")


@dataclass
class TaskEvaluation:
    """Metrics of a network by split, in the precision of its weights, in eval mode; every process reads every row.

    Of classifiers accuracy, error, top5_accuracy (from 6 classes), nll (nats) and ece over all labels that count; of
    language models nll (nats per token), perplexity and tokens, every token with the same weight. Masks that a
    collator draws are the same for every network.

    Args:
        task: as the Hub names it.
        splits: datasets by split.
        collate: makes a batch with the labels in it.
        batch_size: rows at once.
        device: to evaluate on.
        label_name: of the labels in a batch.
        shifts_labels: whether the logits at a position are of the label after it.
        removes_columns: whether columns that no forward takes are dropped before the collator, as Trainer does.
        compute_metrics: the user's, of Trainer; its numbers are recorded beside these.
        preprocess_logits: likewise.
        by_batch: whether compute_metrics is called batch by batch (batch_eval_metrics).
        seed: of what is drawn while data are read.
        workers: that read them.
    """

    task: str
    splits: Mapping[str, Any]
    collate: Callable[..., Any]
    batch_size: int
    device: torch.device | str = "cpu"
    label_name: str = "labels"
    shifts_labels: bool = False
    removes_columns: bool = True
    compute_metrics: Callable[..., Mapping[str, Any]] | None = None
    preprocess_logits: Callable[[Tensor, Tensor], Any] | None = None
    by_batch: bool = False
    seed: int = 0
    workers: int = 0

    def __call__(self, network: nn.Module) -> dict[str, SplitMetrics]:
        """Metrics by split, with the predictions of every item.

        Raises:
            ValueError: labels that are none of the network's classes, or no item with a label.
        """
        network = network.to(self.device).eval()
        return {split: self._of_split(network, dataset, split) for split, dataset in self.splits.items()}

    @torch.no_grad()
    def _of_split(self, network: nn.Module, dataset: Any, split: str) -> SplitMetrics:
        is_language = self.task in LANGUAGE_TASKS
        metrics, kept = classification_metrics(), []
        theirs = _TrainersMetrics(self.compute_metrics, self.preprocess_logits, self.by_batch)
        with seeded(self.seed):
            batches = iter(loader(dataset, self.collate, self.batch_size, self.columns(network), self.workers))
            upcoming = next(batches, None)
            while upcoming is not None:
                batch, upcoming = upcoming, next(batches, None)
                logits, labels = self.forward(network, batch, split)
                theirs.add(logits, labels, is_last=upcoming is None)
                if self.shifts_labels:
                    labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
                if is_language:
                    kept.append(_token_sums(logits, labels))
                else:
                    rows, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
                    metrics(EvalPrediction(cast(Any, rows), cast(Any, targets)), compute_result=False)
                    kept.append(_item_predictions(rows, targets))
        predictions = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]} if kept else {}
        items = len(next(iter(predictions.values()), ()))
        if not items:
            raise ValueError(
                f"eval_dataset: the split {split!r} has no item with a label, expected at least one; give labels "
                f"(column {self.label_name!r}), {IGNORED} only for those that do not count."
            )
        if is_language:
            tokens = int(predictions["tokens"].sum())
            nll = float(predictions["nll_sum"].sum()) / tokens
            own = {"nll": nll, "perplexity": perplexity(nll), "tokens": tokens}
        else:
            own = metrics.compute()
        return SplitMetrics({**own, **theirs.result(own)}, predictions)

    def forward(self, network: nn.Module, batch: Mapping[str, Any], split: str) -> tuple[Tensor, Tensor]:
        """The logits and labels of a batch.

        Raises:
            ValueError: it has no labels, or labels that do not fit the logits.
        """
        inputs = dict(batch)
        labels = inputs.pop(self.label_name, None)
        if labels is None:
            raise ValueError(
                f"{split}: a batch has only {', '.join(batch) or 'nothing'}, expected {self.label_name!r} among them; "
                "name the column so, name it in label_names, or have the data collator make it."
            )
        labels = class_numbers(labels, self.label_name).to(self.device)
        moved = {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        given = cast_floating(NetworkInputs(network, "student").of(moved), input_dtype(network))
        logits = logits_of(network(**given))
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)} in a batch of {split} for logits of shape "
                f"{tuple(logits.shape)}; expected one label for each row of logits, shape {tuple(logits.shape[:-1])}."
            )
        seen = LabelRange(self.label_name)
        seen.see(labels.reshape(-1), logits.shape[-1])
        seen.check()
        return logits, labels

    def columns(self, network: nn.Module) -> list[str] | None:
        """What of the datasets the collator is given; None for all."""
        if not self.removes_columns:
            return None
        return [*NetworkInputs(network, "student").columns, *_LABEL_NAMES, self.label_name]


def loader(
    dataset: Any, collate: Callable[..., Any], batch_size: int, columns: list[str] | None, workers: int = 0
) -> DataLoader:
    """Batches of a dataset in its order.

    Args:
        dataset: as Trainer takes it.
        collate: of the batches.
        batch_size: rows at once.
        columns: that the collator is given; None gives it all.
        workers: processes that read.
    """
    if columns is not None:
        if hasattr(dataset, "remove_columns") and getattr(dataset, "column_names", None):
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in columns])
        else:
            collate = RemoveColumnsCollator(collate, columns)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=workers)


def _token_sums(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    from born_again.metrics.perplexity import token_nlls  # imports evaluate, which takes seconds

    nlls, counted = token_nlls(logits, labels)  # (rows, time) each
    tokens = counted.sum(dim=1)
    return {"nll_sum": nlls.sum(dim=1)[tokens > 0].numpy(), "tokens": tokens[tokens > 0].numpy()}


def _item_predictions(rows: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """Of the items that count: see `born_again.lineage.predictions.SplitMetrics`."""
    counted = targets != IGNORED
    labels = targets[counted].cpu()
    log_probabilities = rows[counted].to("cpu", torch.float64).log_softmax(dim=1)  # (items, classes)
    confidence, predicted = log_probabilities.max(dim=1)  # (items,)
    nll = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    found = {"label": labels, "predicted": predicted, "nll": nll, "confidence": confidence.exp()}
    return {name: values.numpy() for name, values in found.items()}


class _TrainersMetrics:
    """Calls the user's compute_metrics as Trainer does."""

    def __init__(
        self, compute: Callable[..., Any] | None, preprocess: Callable[..., Any] | None, by_batch: bool
    ) -> None:
        self.compute, self.preprocess, self.by_batch = compute, preprocess, by_batch
        self.logits, self.labels = EvalLoopContainer(padding_index=-100), EvalLoopContainer(padding_index=-100)
        self.found: Mapping[str, Any] = {}

    def add(self, logits: Any, labels: Tensor, is_last: bool) -> None:
        if self.compute is None:
            return
        if self.preprocess is not None:
            logits = self.preprocess(logits, labels)
        if self.by_batch:
            self.found = self.compute(EvalPrediction(cast(Any, logits), cast(Any, labels)), compute_result=is_last)
            return
        for container, value in ((self.logits, logits), (self.labels, labels)):
            container.add(value)
            container.to_cpu_and_numpy()
        if is_last:
            self.found = self.compute(EvalPrediction(self.logits.get_arrays(), self.labels.get_arrays()))

    def result(self, own: Mapping[str, float]) -> dict[str, float]:
        """Its numbers; one that has the name of another of ours, and not its value, is called compute_metrics_NAME."""
        kept: dict[str, float] = {}
        for name, value in self.found.items():
            name = name.removeprefix("eval_")
            if not isinstance(value, int | float | np.number) or isinstance(value, bool):
                logger.warning("compute_metrics: %r is a %s and not recorded.", name, type(value).__name__)
                continue
            number = value.item() if isinstance(value, np.number) else value
            if name not in own:
                kept[name] = number
            elif not math.isclose(own[name], number, rel_tol=1e-6):
                kept[f"compute_metrics_{name}"] = number
        return kept
