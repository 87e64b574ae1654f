"""Model cards: the README.md of a generation or an ensemble, rendered from its lineage's manifest alone.

The text is in the folder templates: one jinja2 template for each task and one for ensembles, with card.md.jinja for
the parts that they share. The front matter is a ModelCardData of huggingface_hub. Every value in a template is escaped
by `born_again.hub.model_card.plain`, which ModelCard.from_template would not do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from born_again.lineage.manifest import is_repo_id
from born_again.lineage.plain_text import is_hub_id, last_part, local_name, one_line, without_folders
from born_again.lineage.spec import EXTERNAL, TEACHER_OBJECTIVE
from born_again.lineage.status import results_table
from born_again.lineage.worse import is_clearly_worse, worse_than_teacher
from born_again.objectives import OBJECTIVES_WITH_LABELS
from born_again.teacher.loading import TASKS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from jinja2 import Environment


_MARKUP = re.compile(r"([\\`*_{}\[\]|$~])")
_BLOCK_START = re.compile(r"^([#+=-]+(?=\s|$)|\d+(?=[.)](\s|$)))")


class _Dumper(yaml.SafeDumper):
    """Quotes text that other YAML parsers might read as a number, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # YAML 1.2, which the Hub reads, has more number formats than PyYAML: 1e3, 0o17.
    is_word = text[:1].isalpha() and "<" not in text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_word else '"')


_Dumper.add_representer(str, _represent_text)


def plain(value: Any) -> Markup:
    """Escapes a text for a line of Markdown or a table cell, so that it has no effect as Markdown or HTML.

    `Markup`, which this function returns, is not escaped again.
    """
    if isinstance(value, Markup):
        return value
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _MARKUP.sub(r"\\\1", text).replace("://", ":\\//")
    text = re.sub(r"(?i)\bwww\.", lambda match: f"{match[0][:-1]}\\.", text)
    return Markup(_BLOCK_START.sub(lambda match: match[0] + "\\" if match[0].isdigit() else "\\" + match[0], text))


def setting(value: Any) -> Markup:
    """The value of an argument, escaped; paths are shortened to their last part."""
    value = without_folders(value)
    return plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def front_matter(header: Mapping[str, Any]) -> str:
    """YAML between two lines of dashes, as ModelCardData.to_yaml writes it but for the dumper."""
    text = yaml.dump(dict(header), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9)
    # Equal in YAML, and no HTML tag where the front matter is shown as text.
    return "---\n" + text.rstrip().replace("<", "\\x3C") + "\n---"


_OBJECTIVES = {
    "label": "the cross-entropy with the labels",
    "ban": "the cross-entropy with the teacher's distribution, without the labels",
    "ban+l": "the cross-entropy with the teacher's distribution plus that with the labels",
    "cwtm": "the cross-entropy with the labels, weighted by the teacher's confidence",
    "dkpp": "the cross-entropy with the teacher's distribution, its lesser entries permuted",
}
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "ptb": "ptb-text-only/ptb_text_only",
}
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


@dataclass(frozen=True)
class _Kind:
    """What the cards of one task have in common."""

    task: str  # its name on the Hub
    unit: str
    libraries: tuple[str, ...]  # the Hub shows the first
    # Names of networks of this package, which other libraries do not have; Hub ids and folders do not match.
    own: re.Pattern[str]
    template: str = ""
    auto: str = ""  # of transformers, for any model

    @property
    def is_language(self) -> bool:
        return self.task in ("text-generation", "fill-mask")


_NOTHING = re.compile(r"(?!)")
_IMAGES = _Kind(
    "image-classification",
    "images",
    ("timm", "transformers"),
    re.compile(r"(test_)?(densenet|wide_resnet|resnet_student)\w*_cifar", re.ASCII),
    "image-classification",
)
_TEXT = _Kind(
    "text-generation",
    "words",
    ("transformers",),
    re.compile(r"(test-)?(char-cnn-)?lstm(-\w+)?", re.ASCII),
    "text-generation",
)


def _kind_of_any(manifest: Mapping[str, Any]) -> _Kind | None:
    """What the spec says that the networks are for; None where it leaves that to the architecture."""
    spec = manifest["spec"]
    task = spec.get("task")
    if task is None:
        return None
    if (spec.get("model_args") or {}).get("library") == "timm":
        return _IMAGES
    unit = str(manifest["data"].get("unit", "items"))
    # A class of its own is loaded by the mixin of huggingface_hub, not by transformers.
    library = "pytorch" if (spec.get("model_args") or {}).get("class") else "transformers"
    return _Kind(task, unit, (library,), _NOTHING, "any-model", TASKS.get(task, "AutoModel"))


def image_classifier_card(
    manifest: Mapping[str, Any],
    generation: int,
    *,
    curve: str | None = None,
    report: str | None = None,
    picture: str | None = None,
) -> str:
    """The card of one generation of image classifiers.

    Args:
        manifest: the content of lineage.json, with the generation's record. Its `hub`, where it is to be published,
            decides whether examples load from the Hub or from FOLDER.
        generation: its index; later ones are not mentioned, except the repository of the newest.
        curve: file name of a picture of the training beside the card.
        report: path of the lineage's report from the card's folder, such as "../report.html".
        picture: likewise of its picture, such as "../report.png".

    Returns:
        Markdown with YAML front matter.

    Raises:
        ValueError: a curve, report or picture that is no plain file name, but for a ../ before the last two.
    """
    return _generation_card(manifest, generation, _IMAGES, curve, report, picture)


def language_model_card(
    manifest: Mapping[str, Any],
    generation: int,
    *,
    curve: str | None = None,
    report: str | None = None,
    picture: str | None = None,
) -> str:
    """The card of one generation of language models; takes, returns and raises what `image_classifier_card` does."""
    return _generation_card(manifest, generation, _TEXT, curve, report, picture)


def any_model_card(
    manifest: Mapping[str, Any],
    generation: int,
    *,
    curve: str | None = None,
    report: str | None = None,
    picture: str | None = None,
) -> str:
    """The card of one generation of a lineage whose spec names the task; as `image_classifier_card`."""
    return _generation_card(manifest, generation, _kind_of_any(manifest) or _IMAGES, curve, report, picture)


def ensemble_card(
    manifest: Mapping[str, Any],
    record: Mapping[str, Any],
    *,
    report: str | None = None,
    picture: str | None = None,
) -> str:
    """The card of an ensemble of generations, of image classifiers or of language models.

    Args:
        manifest: the content of lineage.json, with the members' records.
        record: {"members": their indices, "average": "probabilities" or "logits", "metrics": by split, {} where it
            was not measured}.
        report, picture: see `image_classifier_card`.

    Returns:
        Markdown with YAML front matter.

    Raises:
        ValueError: see `image_classifier_card`.
    """
    _check_links(report=report, picture=picture)
    members = [manifest["generations"][index] for index in record["members"]]
    is_text = any("perplexity" in values for member in members for values in member["metrics"].values())
    kind = _kind_of_any(manifest) or (_TEXT if is_text else _IMAGES)
    repo, repos = _repo_of(manifest, "ensemble"), [_repo_of(manifest, index) for index in record["members"]]
    are_on_hub = repo is not None and None not in repos
    commits = [_commit_of(member) for member in members]
    header = {
        "library_name": "born_again",
        "tags": ["born-again-networks", "knowledge-distillation", "ensemble", kind.task],
        "datasets": None if all(map(_is_external, members)) else _datasets_of(manifest),
        "base_model": repos if are_on_hub else None,
        "born_again": {
            "members": list(record["members"]),
            "average": one_line(record["average"]),
            "weights_sha256": [member["weights_sha256"] for member in members],
            **({"commits": commits} if any(commits) else {}),
        },
    }
    facts = {
        "title": f"{manifest['name']}, ensemble of {', '.join(f'gen{index}' for index in record['members'])}",
        "record": members[-1],
        "metrics": record["metrics"],
        "average": record["average"],
        "models": sorted({local_name(_architecture(manifest, member["index"])[0]) for member in members}),
        "trained": members,
        "repo": repo,
        "repos": repos,
        "are_on_hub": are_on_hub,
        "report": report,
        "picture": picture,
    }
    seen = {**manifest, "generations": manifest["generations"][: max(record["members"]) + 1], "ensembles": [record]}
    return _card("ensemble", seen, kind, header, facts)


def _check_links(**links: str | None) -> None:
    for name, link in links.items():
        above = "" if name == "curve" else r"(\.\./)?"
        if link is not None and not re.fullmatch(above + r"\w[\w.-]*", link, re.ASCII):
            where = "such as 'training.png'" if name == "curve" else "or ../ and such a name"
            raise ValueError(f"{name}: got {link!r}, expected the name of a file beside the card, {where}.")


def _generation_card(
    manifest: Mapping[str, Any],
    generation: int,
    kind: _Kind,
    curve: str | None,
    report: str | None,
    picture: str | None,
) -> str:
    _check_links(curve=curve, report=report, picture=picture)
    record, repo = manifest["generations"][generation], _repo_of(manifest, generation)
    newest = (manifest.get("hub") or {}).get("newest")
    header = {
        "library_name": kind.libraries[0],
        "tags": ["born-again-networks", "knowledge-distillation", kind.task, *kind.libraries],
        "datasets": None if _is_external(record) else _datasets_of(manifest),
        "base_model": _base_model_of(manifest, record),
        "new_version": newest if is_repo_id(newest) and newest != repo else None,
        "born_again": _provenance(manifest, record),
    }
    parent = None if record["parent"] is None else manifest["generations"][record["parent"]]
    seen = {**manifest, "generations": manifest["generations"][: generation + 1], "ensembles": []}
    facts = {
        "title": f"{manifest['name']}-gen{generation}",
        "record": record,
        "metrics": record["metrics"],
        "worse": worse_than_teacher(manifest, generation),
        "trained": seen["generations"],
        "repo": repo,
        "parent_model": parent and local_name(_architecture(manifest, parent["index"])[0]),
        "parent_repo": parent and _repo_of(manifest, parent["index"]),
        "parent_commit": parent and _commit_of(parent),
        "curve": curve,
        "report": report,
        "picture": picture,
    }
    return _card(kind.template, seen, kind, header, facts)


def _card(
    template: str, manifest: Mapping[str, Any], kind: _Kind, header: Mapping[str, Any], facts: Mapping[str, Any]
) -> str:
    """Renders a template with the given and the shared values, and prepends the front matter."""
    from huggingface_hub import ModelCardData

    results = _eval_results(manifest, facts["metrics"], kind)
    data = ModelCardData(
        **header,
        pipeline_tag=kind.task,
        license=_license_of(manifest),
        model_name=one_line(facts["title"]) if results else None,
        eval_results=results or None,
    )
    # Users' texts are escaped before the table is made.
    records = [{**record, "objective": str(plain(record["objective"]))} for record in manifest["generations"]]
    names = ("model", "student_model")
    models = {name: str(plain(local_name(text))) for name in names if (text := manifest["spec"].get(name)) is not None}
    is_measured = any(record["metrics"] for record in records)
    repo, branch = facts["repo"], _branch_of(manifest)
    model, model_args = _architecture(manifest, facts["record"]["index"])
    shared = {
        "spec": manifest["spec"],
        "data": manifest["data"],
        "kind": kind,
        "counts": _counts(manifest["data"]),
        "rows": "rows" if kind.unit == "tokens" else kind.unit,  # what the counts are of
        "item": kind.unit.removesuffix("s"),
        "model": local_name(model),
        "model_args": model_args,
        "own_model": Markup(model) if kind.own.fullmatch(model) and not _is_external(facts["record"]) else None,
        "dataset": _dataset_name(manifest),
        "test_split": _dataset_split(manifest, "test"),
        "table": Markup(results_table({**manifest, "spec": {**manifest["spec"], **models}, "generations": records}))
        if is_measured
        else "",
        "teacher": records[0],
        "any_worse": any(is_clearly_worse(manifest, record["index"]) for record in records),
        "all_external": all(map(_is_external, records)),
        "source": Markup(f'"{repo}"' + (branch and f', revision="{branch}"') if repo else '"FOLDER"'),
        "timm": Markup(f"hf-hub:{repo}" + (branch and f"@{branch}") if repo else "local-dir:FOLDER"),
        "is_private": repo and (manifest.get("hub") or {}).get("private"),
    }
    text = _environment().get_template(f"{template}.md.jinja").render(shared, **facts)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"{front_matter(data.to_dict())}\n\n{text}\n"


@cache
def _environment() -> Environment:
    from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined, UndefinedError

    def escaped(value: Any) -> Markup:
        if isinstance(value, Undefined):
            raise UndefinedError(f"a card's template uses a value that its manifest lacks: {value._undefined_name}")
        return plain(value)

    environment = Environment(
        loader=PackageLoader("born_again.hub"),
        autoescape=True,  # finalize escapes everything that is no Markup
        finalize=escaped,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["external"] = _is_external
    environment.globals |= {"objective": _objective, "reads_labels": _reads_labels}
    environment.filters |= {
        "local_name": local_name,
        "setting": setting,
        "in_brackets": _in_brackets,
        "link": lambda repo: Markup(f"[{repo}](https://huggingface.co/{repo})"),
        "shown": _format_number,
        "paragraph": lambda text: Markup(" ".join(text.split())),
    }
    return environment


def _architecture(manifest: Mapping[str, Any], index: int) -> tuple[str, Mapping[str, Any]]:
    """The architecture of a generation and its arguments."""
    spec = manifest["spec"]
    if index and spec.get("student_model") is not None:
        return spec["student_model"], spec.get("student_model_args") or {}
    return spec["model"], spec.get("model_args") or {}


def _is_external(record: Mapping[str, Any]) -> bool:
    return record["objective"] == EXTERNAL


def _objective(record: Mapping[str, Any]) -> Markup:
    meaning = _OBJECTIVES.get(record["objective"])
    return Markup(f"{plain(record['objective'])}{f' ({meaning})' if meaning else ''}")


def _reads_labels(record: Mapping[str, Any], training: Mapping[str, Any]) -> bool:
    annealed = record["objective"] == "ban" and bool(training.get("teacher_annealing"))
    return annealed or record["objective"] in (TEACHER_OBJECTIVE, *OBJECTIVES_WITH_LABELS)


def _in_brackets(values: Mapping[str, Any] | None) -> Markup:
    inside = ", ".join(f"{plain(key)} {setting(value)}" for key, value in (values or {}).items())
    return Markup(f" ({inside})" if inside else "")


def _format_number(value: float | int | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _counts(data: Mapping[str, Any]) -> dict[str, int]:
    """Images or words by split."""
    held = data.get("rows") or data.get("tokens") or {}
    return {split: count for split, count in held.items() if type(count) is int} if isinstance(held, dict) else {}


# ---- Where things are on the Hub ----


def _repo_of(manifest: Mapping[str, Any], index: int | str) -> str | None:
    """The repository of a generation, or of the ensemble for "ensemble"; None if not known."""
    held, pattern = manifest.get("hub") or {}, "{name}-ensemble"
    if isinstance(index, int):
        own = (manifest["generations"][index].get("hub") or {}).get("repo")
        if is_repo_id(own):
            return own
        pattern = held.get("pattern") or "{name}-gen{index}"
    # Not str.format: a pattern read from a file could access attributes.
    name = str(pattern).replace("{name}", manifest["name"]).replace("{index}", str(index))
    repo = f"{held.get('namespace')}/{name}"
    return repo if held.get("namespace") and is_repo_id(repo) else None


def _commit_of(record: Mapping[str, Any]) -> str | None:
    commit = (record.get("hub") or {}).get("commit")
    return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,64}", commit) else None


def _branch_of(manifest: Mapping[str, Any]) -> str:
    """Empty for the default branch."""
    branch = (manifest.get("hub") or {}).get("branch")
    return branch if isinstance(branch, str) and re.fullmatch(r"\w[\w./-]{0,95}", branch, re.ASCII) else ""


def _license_of(manifest: Mapping[str, Any]) -> str | None:
    name = (manifest.get("hub") or {}).get("license")
    return one_line(name) if isinstance(name, str) else None


def _hub_dataset(manifest: Mapping[str, Any]) -> str | None:
    """The Hub id of the dataset; None for one that is embedded or a folder."""
    name, data = manifest["spec"]["dataset"], manifest["data"]
    if name in _HUB_DATASETS:
        return _HUB_DATASETS[name]
    # Images from the Hub have a revision, folders have none.
    from_the_hub = ("image_column" not in data and "unit" not in data) or isinstance(data.get("revision"), str)
    if "unit" in data:  # of any model: what the data says of itself
        from_the_hub = data.get("source") == name
    return name if from_the_hub and is_hub_id(name) else None


def _dataset_name(manifest: Mapping[str, Any]) -> str:
    """The name of the dataset; a folder shortened to its last part."""
    name = manifest["spec"]["dataset"]
    return name if _hub_dataset(manifest) else last_part(name)


def _datasets_of(manifest: Mapping[str, Any]) -> list[str] | None:
    return [name] if (name := _hub_dataset(manifest)) else None


def _base_model_of(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
    if record["parent"] is not None:
        return _repo_of(manifest, record["parent"])
    source = manifest["spec"].get("starting_point")
    if _is_external(record):
        source = record.get("source", {}).get("path_or_repo")
    return source if is_hub_id(source) else None


# ---- Front matter ----


def _provenance(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "generation": record["index"],
        "objective": one_line(record["objective"]),
        "seed": record["seed"],
        "control": manifest["spec"].get("control"),
        "weights_sha256": record["weights_sha256"],
        "spec_sha256": manifest.get("spec_sha256"),
    }
    if record["parent"] is not None:
        parent = manifest["generations"][record["parent"]]
        about = {
            "generation": record["parent"],
            "weights_sha256": parent["weights_sha256"],
            "repo": _repo_of(manifest, record["parent"]),
            "commit": _commit_of(parent),
        }
        facts["parent"] = {name: value for name, value in about.items() if value is not None}
    if not _is_external(record):
        facts["versions"] = {one_line(name): one_line(version) for name, version in record["versions"].items()}
    return {name: value for name, value in facts.items() if value is not None}


def _dataset_split(manifest: Mapping[str, Any], split: str) -> str:
    """The dataset's own name of a split: such as "validation" for "test" if it has no test split."""
    name = manifest["data"].get("test_split")
    return name if split == "test" and isinstance(name, str) else split


def _eval_results(
    manifest: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], kind: _Kind
) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    hub_id, shown = _hub_dataset(manifest), one_line(_dataset_name(manifest))
    data_args = manifest["spec"].get("data_args") or {}
    limit = data_args.get("max_eval_samples")
    revision = manifest["data"].get("revision") or data_args.get("dataset_revision")
    return [
        EvalResult(
            task_type=kind.task,
            task_name=kind.task.replace("-", " ").capitalize(),
            dataset_type=hub_id or shown,
            dataset_name=shown,
            dataset_split=one_line(_dataset_split(manifest, split)),
            dataset_revision=one_line(revision) if hub_id and isinstance(revision, str) else None,
            dataset_args={"max_eval_samples": limit} if type(limit) is int else None,
            metric_type=_METRICS[name][0] if name in _METRICS else one_line(name),
            metric_name=_METRICS[name][1] if name in _METRICS else one_line(name),
            metric_value=value,
        )
        for split, values in metrics.items()
        for name, value in values.items()
        if name not in _COUNTS and value is not None and math.isfinite(value)
    ]
