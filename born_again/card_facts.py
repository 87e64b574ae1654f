"""What a card states as data: repositories, datasets, provenance and measured values, from a lineage's manifest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from born_again.card_markup import is_hub_id, last_part, one_line
from born_again.lineage.schema import is_repo_id
from born_again.lineage.spec import EXTERNAL

_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "ptb": "ptb-text-only/ptb_text_only",
}
# Networks of this package, which other libraries do not know. Of a Hub id or a folder as model it is not known here.
_OWN_IMAGES = re.compile(r"(test_)?(densenet|wide_resnet)\w*_cifar", re.ASCII)
_OWN_TEXT = re.compile(r"(test-)?(char-cnn-)?lstm(-\w+)?", re.ASCII)

# Metric -> type and name in the Hub's index; a count is no metric.
_METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "top5_accuracy": ("top_5_accuracy", "Top-5 accuracy"),
    "error": ("error", "Error (1 - accuracy)"),
    "nll": ("loss", "Negative log-likelihood (nats per item)"),
    "ece": ("ece", "Expected calibration error"),
    "perplexity": ("perplexity", "Perplexity"),
}
_COUNTS = ("tokens", "samples")
_IMAGE_LEGEND = (
    "Accuracy, error and calibration error (ECE) are in percent, NLL in nats per image; the gain is in percentage "
    "points of accuracy over the generation's own teacher. Seconds are of training."
)
_TEXT_LEGEND = (
    "Perplexity and NLL (in nats) are per word; the gain is by how much the test perplexity fell below that of the "
    "generation's own teacher. Seconds are of training."
)


@dataclass(frozen=True)
class Kind:
    """What cards of one kind of network have in common."""

    task: str
    task_name: str
    library: str
    tags: tuple[str, ...]
    templates: str
    own: re.Pattern[str]
    unit: str
    legend: str


IMAGES = Kind(
    "image-classification",
    "Image classification",
    "timm",
    ("timm", "transformers"),
    "images",
    _OWN_IMAGES,
    "images",
    _IMAGE_LEGEND,
)
TEXT = Kind(
    "text-generation", "Text generation", "transformers", ("transformers",), "text", _OWN_TEXT, "words", _TEXT_LEGEND
)


def is_external(record: Mapping[str, Any]) -> bool:
    return record["objective"] == EXTERNAL


# ---- Where things are on the Hub ----


def repo_of(manifest: Mapping[str, Any], index: int | str) -> str | None:
    """The repository of a generation or, by "ensemble", of the ensemble; None where it is not known."""
    held, pattern = manifest.get("hub") or {}, "{name}-ensemble"
    if isinstance(index, int):
        own = (manifest["generations"][index].get("hub") or {}).get("repo")
        if is_repo_id(own):
            return own
        pattern = held.get("pattern") or "{name}-gen{index}"
    # No str.format: a pattern is read from a file, and could ask for attributes.
    name = str(pattern).replace("{name}", manifest["name"]).replace("{index}", str(index))
    repo = f"{held.get('namespace')}/{name}"
    return repo if held.get("namespace") and is_repo_id(repo) else None


def commit_of(record: Mapping[str, Any]) -> str | None:
    commit = (record.get("hub") or {}).get("commit")
    return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,64}", commit) else None


def branch_of(manifest: Mapping[str, Any]) -> str | None:
    branch = (manifest.get("hub") or {}).get("branch")
    return branch if isinstance(branch, str) and re.fullmatch(r"\w[\w./-]{0,95}", branch, re.ASCII) else None


def license_of(manifest: Mapping[str, Any]) -> str | None:
    name = (manifest.get("hub") or {}).get("license")
    return one_line(name) if isinstance(name, str) else None


def _hub_dataset(manifest: Mapping[str, Any]) -> str | None:
    """The Hub id of the dataset; None for one that is embedded or a folder."""
    name, data = manifest["spec"]["dataset"], manifest["data"]
    if name in _HUB_DATASETS:
        return _HUB_DATASETS[name]
    # Images from the Hub come with the commit they were read at, which a folder does not have.
    from_the_hub = "image_column" not in data or isinstance(data.get("revision"), str)
    return name if from_the_hub and is_hub_id(name) else None


def dataset_name(manifest: Mapping[str, Any]) -> str:
    """The dataset as it may be shown: of a folder the last part."""
    name = manifest["spec"]["dataset"]
    return name if _hub_dataset(manifest) else last_part(name)


def datasets_of(manifest: Mapping[str, Any]) -> list[str]:
    return [name] if (name := _hub_dataset(manifest)) else []


def base_model_of(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
    if record["parent"] is not None:
        return repo_of(manifest, record["parent"])
    source = record.get("source", {}).get("path_or_repo") if is_external(record) else None
    return source if is_hub_id(source) else None


# ---- Front matter ----


def provenance(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "generation": record["index"],
        "objective": one_line(record["objective"]),
        "seed": record["seed"],
        "weights_sha256": record["weights_sha256"],
        "spec_sha256": manifest.get("spec_sha256"),
    }
    if record["parent"] is not None:
        parent = manifest["generations"][record["parent"]]
        about = {
            "generation": record["parent"],
            "weights_sha256": parent["weights_sha256"],
            "repo": repo_of(manifest, record["parent"]),
            "commit": commit_of(parent),
        }
        facts["parent"] = {name: value for name, value in about.items() if value is not None}
    if not is_external(record):
        facts["versions"] = {one_line(name): one_line(version) for name, version in record["versions"].items()}
    return {name: value for name, value in facts.items() if value is not None}


def true_split(manifest: Mapping[str, Any], split: str) -> str:
    """What the dataset calls a split: "validation" for "test", where it has no test split."""
    name = manifest["data"].get("test_split")
    return name if split == "test" and isinstance(name, str) else split


def model_index(
    manifest: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], kind: Kind, name: str
) -> list[dict[str, Any]]:
    hub_id, data_args = _hub_dataset(manifest), manifest["spec"].get("data_args") or {}
    results = []
    for split, values in metrics.items():
        measured = [
            {"type": _METRICS.get(key, (one_line(key),))[0], "value": value, "name": _METRICS.get(key, ("", key))[1]}
            for key, value in values.items()
            if key not in _COUNTS and value is not None and math.isfinite(value)
        ]
        shown = one_line(dataset_name(manifest))
        dataset: dict[str, Any] = {
            "name": shown,
            "type": hub_id or shown,
            "split": one_line(true_split(manifest, split)),
        }
        revision = manifest["data"].get("revision") or data_args.get("dataset_revision")
        if hub_id and isinstance(revision, str):
            dataset["revision"] = one_line(revision)
        if type(data_args.get("max_eval_samples")) is int:
            dataset["args"] = {"max_eval_samples": data_args["max_eval_samples"]}
        if measured:
            task = {"type": kind.task, "name": kind.task_name}
            metric_lines = [{**entry, "name": one_line(entry["name"])} for entry in measured]
            results.append({"task": task, "dataset": dataset, "metrics": metric_lines})
    return [{"name": one_line(name), "results": results}] if results else []
