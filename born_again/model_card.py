"""Facts in, card out: the README.md of a generation, from nothing but its lineage's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_CITATION = """```bibtex
@inproceedings{furlanello2018born,
  title = {Born Again Neural Networks},
  author = {Furlanello, Tommaso and Lipton, Zachary and Tschannen, Michael and Itti, Laurent and Anandkumar, Anima},
  booktitle = {International Conference on Machine Learning},
  year = {2018}
}
```"""


_IMAGES = """```python
import born_again  # registers the architecture with timm
import timm
from transformers import AutoModelForImageClassification

model = timm.create_model("local-dir:FOLDER", pretrained=True)
model = AutoModelForImageClassification.from_pretrained("FOLDER")
```"""

_TEXT = """```python
import born_again  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # of whole words, <eos> ends a sentence
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""


_ENSEMBLE = """```python
from born_again import LineageEnsemble

model = LineageEnsemble.from_pretrained("FOLDER")  # its members, genK, stand beside FOLDER
logits = model({inputs}).logits
```"""


def image_classifier_card(manifest: Mapping[str, Any], generation: int) -> str:
    """The card of one generation of image classifiers.

    Args:
        manifest: the content of lineage.json, with the generation's record.
        generation: its index.

    Returns:
        Markdown with YAML front matter.
    """
    return _card(manifest, generation, "timm", "image-classification", ["timm", "transformers"], _IMAGES)


def language_model_card(manifest: Mapping[str, Any], generation: int) -> str:
    """The card of one generation of language models; takes and returns what `image_classifier_card` does."""
    return _card(manifest, generation, "transformers", "text-generation", ["transformers"], _TEXT)


def ensemble_card(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The card of an ensemble of generations, of image classifiers or of language models.

    Args:
        manifest: the content of lineage.json, with the members' records.
        record: {"members": their indices, "average": "probabilities" or "logits", "metrics": by split, {} where it
            was not measured}.

    Returns:
        Markdown with YAML front matter.
    """
    spec, members = manifest["spec"], [manifest["generations"][index] for index in record["members"]]
    is_text = any("perplexity" in values for member in members for values in member["metrics"].values())
    task = "text-generation" if is_text else "image-classification"
    header = {
        "library_name": "born_again",
        "pipeline_tag": task,
        "tags": ["born-again-networks", "knowledge-distillation", "ensemble", task],
        "born_again": {
            "members": list(record["members"]),
            "average": record["average"],
            "weights_sha256": [member["weights_sha256"] for member in members],
        },
    }
    names = ", ".join(f"gen{index}" for index in record["members"])
    measured = "Measured on the weights of the members, in float32; one run, one seed for each member."
    return "\n".join(
        [
            *_front_matter(header),
            f"# {_plain(manifest['name'])}, ensemble of {names}",
            "",
            f"The mean of the {record['average']} (equation 4 of the paper) of networks of one architecture, a "
            f"{_plain(spec['model'])}, trained on {_plain(spec['dataset'])} in one born-again lineage. There are no "
            "weights in this folder: the members are those of the folders beside it, known by their hashes.",
            "",
            *(f"- gen{member['index']}: {_plain(member['objective'])}, seed {member['seed']}" for member in members),
            "",
            "## Use",
            "",
            _ENSEMBLE.replace("{inputs}", "input_ids" if is_text else "pixel_values"),
            "",
            "## Results",
            "",
            measured if record["metrics"] else "Not measured.",
            "",
            *_results(record["metrics"]),
            "",
            "## Citation",
            "",
            _CITATION,
            "",
        ]
    )


def _card(
    manifest: Mapping[str, Any], generation: int, library: str, task: str, tags: Sequence[str], usage: str
) -> str:
    spec, record = manifest["spec"], manifest["generations"][generation]
    header = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["born-again-networks", "knowledge-distillation", task, *tags],
        "born_again": {
            "generation": generation,
            "objective": record["objective"],
            "seed": record["seed"],
            "weights_sha256": record["weights_sha256"],
        },
    }
    data = manifest["data"]
    chosen = (
        "of the epoch that was best on validation" if "validation" in record["metrics"] else "after the last epoch"
    )
    return "\n".join(
        [
            *_front_matter(header),
            f"# {_plain(manifest['name'])}-gen{generation}",
            "",
            _origin(spec, record),
            "",
            "## Use",
            "",
            usage,
            "",
            "## Results",
            "",
            f"Measured on the weights in this folder, in float32, {chosen}; one run, one seed.",
            "",
            *_results(record["metrics"]),
            "",
            "## Training",
            "",
            f"- data: {_plain(spec['dataset'])}, {data.get('rows') or data.get('tokens') or {}}",
            *(f"- {key}: {_plain(value)}" for key, value in spec["training"].items()),
            f"- hardware: {_plain(record['hardware'])}; {record['seconds']:.0f} seconds",
            f"- versions: {', '.join(f'{key} {value}' for key, value in record['versions'].items())}",
            "",
            "## Citation",
            "",
            _CITATION,
            "",
        ]
    )


def _front_matter(header: Mapping[str, Any]) -> list[str]:
    return ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", ""]


def _results(metrics: Mapping[str, Mapping[str, float | int | None]]) -> list[str]:
    return [
        f"- {split} {metric}: {_shown(value)}" for split, values in metrics.items() for metric, value in values.items()
    ]


def _origin(spec: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    what = f"A {_plain(spec['model'])} trained from scratch on {_plain(spec['dataset'])}"
    if record["parent"] is None:
        return f"{what} by its labels: generation 0 of a born-again lineage, the teacher of generation 1."
    fit = record.get("teacher_fit")
    known = ""
    if fit and "perplexity" in fit:
        known = f", whose perplexity on a sample of the training text is {fit['perplexity']:.2f}"
    elif fit:
        known = f", which is right on {fit['accuracy']:.2%} of a sample of the training set"
    return (
        f"{what} with another seed, taught by generation {record['parent']} of the same architecture{known}. "
        f"Objective: {record['objective']}."
    )


def _shown(value: float | int | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _plain(value: Any) -> str:
    """User text in Markdown: no line breaks, no markup."""
    text = " ".join(str(value).split())
    for character in "\\`*_<>[]|":
        text = text.replace(
            character, f"\\{character}" if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character]
        )
    return text
