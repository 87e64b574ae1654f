"""Manifests as the runner writes them, without a training."""

from __future__ import annotations

import copy
from typing import Any

from born_again import LineageSpec

SPEC = LineageSpec(
    name="tiny-words",
    model="bert",
    dataset="words",
    generations=3,
    objective="ban+l",
    seed=3,
    model_args={"proj_drop_rate": 0.3},
    data_args={"max_train_samples": 22},
    training={"learning_rate": 0.1, "lr_milestones": [0.5], "bf16": False},
)


def record(index: int, /, **changes: Any) -> dict[str, Any]:
    """Of a finished generation."""
    values = {
        "index": index,
        "status": "finished",
        "seed": SPEC.seed_of(index),
        "parent": index - 1 if index else None,
        "objective": SPEC.objective_of(index),
        "weights_sha256": f"{index:x}" * 64,
        "metrics": {"test": {"accuracy": 0.9, "nll": 0.5, "perplexity": None, "tokens": 7}},
        "seconds": 12.4,
        "versions": {"python": "3.11.2", "torch": "2.15.0"},
        "hardware": "CPU, 2 threads",
        "hub": None,
        "teacher_fit": {"accuracy": 0.9, "samples": 10} if index else None,
        "parameters": 1234,
        "steps": 6,
        "peak_memory_mib": 300,
    }
    return {**values, **changes}


def training(index: int, /, **changes: Any) -> dict[str, Any]:
    """Of a generation that has just begun."""
    values = record(index, status="training", weights_sha256=None, metrics={}, seconds=0.0)
    for name in ("teacher_fit", "parameters", "steps", "peak_memory_mib"):
        del values[name]
    return {**values, **changes}


def content(*records: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of lineage.json; two finished generations and one in training where no records are given."""
    values = {
        "format": "born_again.lineage",
        "version": 1,
        "name": SPEC.name,
        "spec": SPEC.to_dict(),
        "spec_sha256": SPEC.sha256(),
        "data": {"sha256": "a", "rows": {"train": 22}, "mean": [0.5, 0.5]},
        "generations": list(records) or [record(0), record(1), training(2)],
    }
    return copy.deepcopy({**values, **changes})
