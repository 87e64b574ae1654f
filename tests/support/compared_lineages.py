"""Lineages with given metrics and predictions on disk, without networks."""

import hashlib
import math
from pathlib import Path

import numpy as np

from born_again import LineageSpec
from born_again.lineage.manifest import Manifest
from born_again.lineage.predictions import SplitMetrics, ensemble_predictions_name, write_predictions

DATA = {"sha256": "a", "rows": {"train": 5, "test": 8}}
ITEMS = 8


def weights_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def images(accuracy: float, seed: int = 0) -> SplitMetrics:
    """Metrics of ITEMS images of which the first ones are right, and their predictions."""
    right = round(ITEMS * accuracy)
    nll = np.random.default_rng(seed).uniform(0.1, 2, ITEMS)
    predictions = {
        "label": np.ones(ITEMS),
        "predicted": np.array([1] * right + [0] * (ITEMS - right)),
        "nll": nll,
        "confidence": np.full(ITEMS, 0.75),
    }
    metrics = {"accuracy": accuracy, "nll": float(nll.mean()), "ece": abs(accuracy - 0.75)}
    return SplitMetrics(metrics, predictions)


def text(perplexity: float, blocks=((1.0, 2), (3.0, 4)), has_single_tokens=True) -> SplitMetrics:
    sums, tokens = zip(*blocks, strict=True)
    predictions = {"nll_sum": np.array(sums), "tokens": np.array(tokens)}
    if has_single_tokens:
        predictions |= {name: np.zeros(sum(tokens)) for name in ("label", "predicted", "nll", "confidence")}
    return SplitMetrics({"nll": math.log(perplexity), "perplexity": perplexity}, predictions)


def lineage(folder: Path, results: list, *, seed=1, kept=True, ensembles=(), data=DATA, weights=None, **spec) -> Path:
    """A lineage with these metrics of its generations, and of ensembles {members: metrics}."""
    spec = {"name": "tiny", "model": "test", "dataset": "made", "seed": seed, **spec}
    spec = {"generations": len(results) - 1, **spec}
    manifest = Manifest.create(folder, LineageSpec(**spec), data)
    folder.mkdir(parents=True)
    own = weights or [weights_of(f"{folder} {index}") for index in range(len(results))]
    for index, metrics in enumerate(results):
        splits = metrics if "test" in metrics else {"test": metrics}
        manifest.update(
            index,
            status="finished",
            seed=None if index == 0 and spec.get("teacher") else seed + index,
            parent=manifest.spec.parent_of(index),
            objective=manifest.spec.objective_of(index),
            weights_sha256=own[index],
            metrics={split: dict(values) for split, values in splits.items()},
            seconds=10.0 * (index + 1),
            versions={},
            hub=None,
        )
        if kept:
            path = folder / f"gen{index}/predictions.safetensors"
            write_predictions(path, {split: values.predictions for split, values in splits.items()}, own[index])
    for members, metrics in dict(ensembles).items():
        hashes = [own[index] for index in members]
        record = {"members": list(members), "average": "probabilities", "weights_sha256": hashes}
        manifest.content.setdefault("ensembles", []).append({**record, "metrics": {"test": dict(metrics)}})
        path = folder / "ensemble" / ensemble_predictions_name(members)
        write_predictions(path, {"test": metrics.predictions}, hashes)
    manifest.save()
    return folder
