"""Manifests from which cards are rendered, and what is looked up in a card."""

import copy
import re

import yaml
from huggingface_hub import ModelCard

from born_again import LineageSpec

IMAGE_METRICS = {"test": {"accuracy": 0.925, "error": 0.075, "nll": 0.51234, "ece": 0.021}}
TEXT_METRICS = {
    "validation": {"nll": 4.45, "perplexity": 85.62694, "tokens": 73_760},
    "test": {"nll": 4.4, "perplexity": 81.45087, "tokens": 82_430},
}


def record(index, kind="image", **changes):
    values = {
        "index": index,
        "status": "finished",
        "seed": 42 + index,
        "parent": index - 1 if index else None,
        "objective": "ban+l" if index else "label",
        "weights_sha256": f"{index}a" * 32,
        "metrics": copy.deepcopy(IMAGE_METRICS if kind == "image" else TEXT_METRICS),
        "seconds": 1234.4,
        "versions": {"python": "3.11.2", "torch": "2.15.0"},
        "hardware": "CPU, 2 threads",
        "hub": None,
        "parameters": 175_066,
        "steps": 460,
        "peak_memory_mib": 900,
    }
    if index:
        values["teacher_fit"] = (
            {"accuracy": 0.99, "samples": 10} if kind == "image" else {"perplexity": 40.447, "tokens": 9}
        )
    return {**values, **changes}


def manifest(*records, kind="image", hub=None, data=None, **spec):
    own = {"name": "wide-resnet-digits", "model": "wide_resnet16_1_cifar", "dataset": "digits"}
    if kind == "text":
        own = {"name": "lstm-small-ptb", "model": "lstm-small", "dataset": "ptb"}
    asked = LineageSpec(**{**own, "objective": "ban+l", "training": {"learning_rate": 0.1, "bf16": True}, **spec})
    if data is None:
        data = {"rows": {"train": 1438, "test": 359}}
        if kind == "text":
            data = {"tokens": {"train": 929_589, "validation": 73_760, "test": 82_430}, "vocabulary": 10_000}
    content = {
        "name": asked.name,
        "spec": asked.to_dict(),
        "spec_sha256": asked.sha256(),
        "data": data,
        "generations": list(records) or [record(index, kind) for index in range(3)],
    }
    return {**content, "hub": hub} if hub is not None else content


HUB = {"namespace": "born-again", "pattern": "{name}-gen{index}", "private": False, "branch": None, "license": None}


def external(**changes):
    source = {"path_or_repo": "someone/their-net", "revision": "v1"}
    return record(0, objective="external", seed=None, source=source, seconds=0.0, **changes)


def data_of(card: str) -> dict:
    """The front matter, read by the Hub's library and back without a loss."""
    held = ModelCard(card).data.to_dict()
    assert held == yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    return held


def section(card: str, title: str) -> str:
    return re.search(rf"^#+ {title}\n(.*?)(?=^##+ |\Z)", card, re.DOTALL | re.MULTILINE)[1].strip()


def codes(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def ensemble(*members, metrics=None, average="probabilities"):
    return {"members": list(members), "average": average, "metrics": IMAGE_METRICS if metrics is None else metrics}
