"""Facts in, card out: the README.md of a generation, from nothing but its lineage's manifest."""

from __future__ import annotations

from collections.abc import Mapping
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


def image_classifier_card(manifest: Mapping[str, Any], generation: int) -> str:
    """The card of one generation of image classifiers.

    Args:
        manifest: the content of lineage.json, with the generation's record.
        generation: its index.

    Returns:
        Markdown with YAML front matter.
    """
    spec, record = manifest["spec"], manifest["generations"][generation]
    header = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["born-again-networks", "knowledge-distillation", "image-classification", "timm", "transformers"],
        "born_again": {
            "generation": generation,
            "objective": record["objective"],
            "seed": record["seed"],
            "weights_sha256": record["weights_sha256"],
        },
    }
    name = _plain(f"{manifest['name']}-gen{generation}")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {name}",
            "",
            _origin(spec, record),
            "",
            "## Use",
            "",
            "```python",
            "import born_again  # registers the architecture with timm",
            "import timm",
            "from transformers import AutoModelForImageClassification",
            "",
            'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
            'model = AutoModelForImageClassification.from_pretrained("FOLDER")',
            "```",
            "",
            "## Results",
            "",
            "Measured on the weights in this folder, in float32, after the last epoch; one run, one seed.",
            "",
            *(
                f"- {split} {metric}: {value:.4f}"
                for split, values in record["metrics"].items()
                for metric, value in values.items()
            ),
            "",
            "## Training",
            "",
            f"- data: {_plain(spec['dataset'])}, {manifest['data'].get('rows', {})}",
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


def _origin(spec: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    what = f"A {_plain(spec['model'])} trained from scratch on {_plain(spec['dataset'])}"
    if record["parent"] is None:
        return f"{what} by its labels: generation 0 of a born-again lineage, the teacher of generation 1."
    fit = record.get("teacher_fit")
    known = f", which is right on {fit['accuracy']:.2%} of a sample of the training set" if fit else ""
    return (
        f"{what} with another seed, taught by generation {record['parent']} of the same architecture{known}. "
        f"Objective: {record['objective']}."
    )


def _plain(value: Any) -> str:
    """User text in Markdown: no line breaks, no markup."""
    text = " ".join(str(value).split())
    for character in "\\`*_<>[]|":
        text = text.replace(
            character, f"\\{character}" if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character]
        )
    return text
