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
            "---",
            yaml.safe_dump(header, sort_keys=False).rstrip(),
            "---",
            "",
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
            *(
                f"- {split} {metric}: {_shown(value)}"
                for split, values in record["metrics"].items()
                for metric, value in values.items()
            ),
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
