"""Loads a generation as a user would, evaluates it, and formats metrics for its record."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import EvalPrediction, PretrainedConfig

from born_again.lineage.manifest import check_one_lineage
from born_again.lineage.predictions import MAX_TOKENS, SplitMetrics
from born_again.metrics import classification_metrics, language_model_metrics
from born_again.models.image_classifier import load_image_classifier
from born_again.models.language_models import load_language_model
from born_again.models.saved import check_index, check_settings, loading, read_settings
from born_again.teacher import carries_state
from born_again.teacher.loading import TASKS, class_names, load_network
from born_again.teacher.preprocessing import (
    Renormalization,
    preprocessing_of_dataset,
    preprocessing_of_network,
    renormalized,
)
from born_again.training.sharding import loading_whole

if TYPE_CHECKING:
    from born_again.data.streams import TokenStreams


def load_generation(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    """Loads a generation, of whatever task, ready to evaluate.

    Args:
        path_or_repo: the folder of a generation, such as OUTPUT_DIR/gen3, or a Hub repository.
        revision: branch, tag or commit of the Hub repository.

    Returns:
        The transformers model in eval mode, weights read from safetensors only.

    Raises:
        FileNotFoundError: a folder that is missing or lacks a file.
        OSError: the Hub has no such repository, or cannot be reached.
        ValueError: it holds no generation.

    Example:
        >>> model = load_generation("outputs/wide-resnet-digits/gen2")
        >>> model(torch.zeros(4, 3, 16, 16)).logits.shape
        torch.Size([4, 10])
    """
    check_one_lineage("path_or_repo", path_or_repo, "gen0")
    with loading_whole():
        return _loader(path_or_repo, revision)(path_or_repo, revision=revision)


def _loader(path_or_repo: str | os.PathLike[str], revision: str | None):
    try:
        if os.path.isdir(path_or_repo):
            config = read_settings(Path(path_or_repo))
        else:
            config, _ = PretrainedConfig.get_config_dict(path_or_repo, revision=revision)
    except OSError:
        return load_image_classifier  # raises with what is missing
    # timm's own config.json has an architecture and no model_type.
    if "architecture" in config or config.get("model_type") == "timm_wrapper":
        return load_image_classifier
    return _load_any if _is_of_another_task(config) else load_language_model


def _is_of_another_task(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names a class for another of the tasks that are served than causal language modelling."""
    named = config.get("architectures")
    named = named if isinstance(named, list) else []
    others = (auto for task, auto in TASKS.items() if task != "text-generation")
    return any(name in class_names(auto) for auto in others for name in named if isinstance(name, str))


def _load_any(path_or_repo: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    source = os.fspath(path_or_repo)
    if os.path.isdir(source):
        check_index(Path(source))
        check_settings(read_settings(Path(source)), source)
    with loading(source):
        return load_network(source, revision, dtype="float32")


_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    dataset: Dataset,
    collate: Callable,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> SplitMetrics:
    """Accuracy, error, top-5 accuracy, negative log-likelihood and expected calibration error of a classifier.

    In the precision of the weights, without autocast, in eval mode; every process evaluates every row.

    Args:
        model: called with the batch without its labels, returns an object with logits (batch, classes).
        dataset: of the split, not augmented. If its mean and std and those of the model are known and differ, the
            images are renormalised for the model.
        collate: from the items of a batch to a dict of tensors with "labels".
        batch_size: rows at once; affects the last digits only.
        device: to evaluate on.

    Returns:
        Fractions (accuracy, error, top5_accuracy from 6 classes on, ece) and nats per item (nll); a dict with the
        predictions of every row.
    """
    model = model.to(device).to(memory_format=torch.channels_last).eval()
    metrics = classification_metrics()
    given, own = preprocessing_of_dataset(dataset), preprocessing_of_network(model)
    change = None
    if given is not None and own is not None and own.is_certain:
        change = Renormalization.between(given, own)
    kept: list[dict[str, Tensor]] = []
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
        labels = batch.pop("labels")
        inputs = renormalized({name: value.to(device) for name, value in batch.items()}, change)
        logits = model(**inputs).logits
        metrics(EvalPrediction(predictions=logits, label_ids=labels.to(device)), compute_result=False)
        kept.append(_prediction(logits, labels))
    return SplitMetrics(metrics.compute(), _concatenated(kept))


@torch.no_grad()
def evaluate_language_model(
    model: nn.Module, streams: TokenStreams, device: torch.device | str = "cpu"
) -> SplitMetrics:
    """Negative log-likelihood and perplexity of a language model, each token with the same weight.

    In the precision of the weights, without autocast, in eval mode; every process evaluates the whole text. A model
    that carries a state reads each stream from its start to its end, so with one stream every token is predicted from
    all tokens before it, whatever the window; other models see the tokens of the window only.

    Args:
        model: called with input_ids (streams, time), and state where it takes one; returns an object with logits.
        streams: `born_again.data.streams.TokenStreams` of the split.
        device: where it is computed.

    Returns:
        nll (nats per token), perplexity (its exponential; per word where the tokens are words), tokens (their number);
        a dict with the sums of every row of a window as predictions, and the tokens at the begin of the first stream.
    """
    from born_again.metrics.perplexity import token_nlls  # imports evaluate, which takes seconds

    model = model.to(device).eval()
    carries, state = carries_state(model), {}
    metrics = language_model_metrics()
    kept: list[dict[str, Tensor]] = []
    described: list[dict[str, Tensor]] = []
    left = MAX_TOKENS
    for window in range(streams.windows):
        batch = streams.__getitems__(range(window * streams.streams, (window + 1) * streams.streams))
        output = model(batch["input_ids"].to(device), **state)
        state = {"state": output.state} if carries else {}
        nlls, counted = token_nlls(output.logits, batch["labels"].to(device))  # (streams, time) each
        metrics(cast(Any, EvalPrediction)(nlls, batch["labels"]), compute_result=False)
        tokens = counted.sum(dim=1)  # (streams,)
        kept.append({"nll_sum": nlls.sum(dim=1)[tokens > 0], "tokens": tokens[tokens > 0]})
        if left:
            places = counted[0].nonzero().squeeze(1)[:left]  # (tokens,)
            described.append(_prediction(output.logits[0, places], batch["labels"][0, places.cpu()]))
            left -= len(places)
    return SplitMetrics(metrics.compute(), {**_concatenated(kept), **_concatenated(described)})


def _prediction(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The columns of `born_again.lineage.predictions` from logits (items, classes) and labels (items,)."""
    labels = labels.cpu()
    log_probabilities = logits.to("cpu", torch.float64).log_softmax(dim=1)  # (items, classes)
    confidence, predicted = log_probabilities.max(dim=1)  # (items,)
    nll = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    return {"label": labels, "predicted": predicted, "nll": nll, "confidence": confidence.exp()}


def _concatenated(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def by_split(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Groups Trainer's metrics by split: from eval_accuracy or eval_SPLIT_accuracy to {split: {"accuracy": ...}}."""
    splits: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        if name == "epoch" or name.endswith(_NOT_METRICS):
            continue
        split, _, metric = name.removeprefix("eval_").partition("_")
        if split not in ("train", "validation", "test"):
            split, metric = "test", name.removeprefix("eval_")
        splits.setdefault(split, {})[metric] = value
    return splits


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON numbers, None for infinity and NaN, which JSON does not have."""
    return {
        name: (int(value) if isinstance(value, int) else float(value)) if math.isfinite(value) else None
        for name, value in metrics.items()
    }
