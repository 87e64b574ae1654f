"""Facts in, card out: the README.md of a generation, from nothing but its lineage's manifest.

The fixed text is in the folder model_card_templates; what is said of a generation is made here. Text of users goes
through `born_again.card_markup`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from born_again.card_facts import (
    IMAGES,
    TEXT,
    Kind,
    base_model_of,
    branch_of,
    commit_of,
    dataset_name,
    datasets_of,
    is_external,
    license_of,
    model_index,
    provenance,
    repo_of,
    true_split,
)
from born_again.card_markup import front_matter, local_name, one_line, plain, setting
from born_again.lineage.schema import is_repo_id
from born_again.lineage.table import results_table

_OBJECTIVES = {
    "label": "the cross-entropy with the labels",
    "ban": "the cross-entropy with the teacher's distribution, without the labels",
    "ban+l": "the cross-entropy with the teacher's distribution plus that with the labels",
    "cwtm": "the cross-entropy with the labels, weighted by the teacher's confidence",
    "dkpp": "the cross-entropy with the teacher's distribution, its lesser entries permuted",
}


def image_classifier_card(manifest: Mapping[str, Any], generation: int, *, curve: str | None = None) -> str:
    """The card of one generation of image classifiers.

    Args:
        manifest: the content of lineage.json, with the generation's record. Its `hub`, where it is to be published,
            decides whether examples load from the Hub or from FOLDER.
        generation: its index; nothing is said of later ones, but where the newest is on the Hub.
        curve: file name of a picture of the training beside the card.

    Returns:
        Markdown with YAML front matter.

    Raises:
        ValueError: a curve that is no plain file name.
    """
    return _generation_card(manifest, generation, IMAGES, curve)


def language_model_card(manifest: Mapping[str, Any], generation: int, *, curve: str | None = None) -> str:
    """The card of one generation of language models; takes, returns and raises what `image_classifier_card` does."""
    return _generation_card(manifest, generation, TEXT, curve)


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
    kind = TEXT if is_text else IMAGES
    repo = repo_of(manifest, "ensemble")
    repos = [repo_of(manifest, index) for index in record["members"]]
    are_known = repo is not None and None not in repos
    title = f"{manifest['name']}, ensemble of {', '.join(f'gen{index}' for index in record['members'])}"
    header = {
        "library_name": "born_again",
        "pipeline_tag": kind.task,
        "license": license_of(manifest),
        "tags": ["born-again-networks", "knowledge-distillation", "ensemble", kind.task],
        "datasets": [] if all(map(is_external, members)) else datasets_of(manifest),
        "base_model": repos if are_known else [],
        "model-index": model_index(manifest, record["metrics"], kind, title),
        "born_again": {
            "members": list(record["members"]),
            "average": one_line(record["average"]),
            "weights_sha256": [member["weights_sha256"] for member in members],
            **({"commits": [commit_of(member) for member in members]} if any(map(commit_of, members)) else {}),
        },
    }
    lines = [f"- gen{member['index']}: {_recipe(member)}" for member in members]
    if are_known:
        lines = [f"{line}, {_link(own)}" for line, own in zip(lines, repos, strict=True)]
    where = "in the repositories of the members" if are_known else "in the folders beside it"
    seen = {**manifest, "generations": manifest["generations"][: max(record["members"]) + 1], "ensembles": [record]}
    return _filled(
        "ensemble",
        front_matter=front_matter(header),
        title=plain(title),
        origin=f"The mean of the {plain(record['average'])} (equation 4 of the paper) of networks of one "
        f"architecture, a {_model(spec)}, trained on {_dataset(manifest)} in one born-again lineage. There are no "
        f"weights beside this card: the members are {where}, known by their hashes.",
        members="\n".join(lines),
        source=f'"{repo or "FOLDER"}"{_revision(manifest) if repo else ""}',
        place="downloads its members" if repo else "its members, genK, stand beside FOLDER",
        inputs="input_ids" if is_text else "pixel_values",
        measured="Measured on the weights of the members, in float32; one run, one seed for each member."
        if record["metrics"]
        else "Not measured.",
        results=_results(record["metrics"]),
        lineage=f"{_lineage(seen, kind)} The gain of the ensemble is over the newest of its members.",
        calibration=_calibration(record["metrics"]),
        limits=_limits(manifest, record["metrics"], kind, members[-1]),
        hardware=_hardware(members),
        citation=_template("citation").template.rstrip(),
    )


def _generation_card(manifest: Mapping[str, Any], generation: int, kind: Kind, curve: str | None) -> str:
    if curve is not None and not re.fullmatch(r"\w[\w.-]*", curve, re.ASCII):
        raise ValueError(f"curve: got {curve!r}, expected the name of a file beside the card, such as 'training.png'.")
    spec, record = manifest["spec"], manifest["generations"][generation]
    external, metrics = is_external(record), record["metrics"]
    so_far = {**manifest, "generations": manifest["generations"][: generation + 1], "ensembles": []}
    newest = (manifest.get("hub") or {}).get("newest")
    title = f"{manifest['name']}-gen{generation}"
    header = {
        "library_name": kind.library,
        "pipeline_tag": kind.task,
        "license": license_of(manifest),
        "tags": ["born-again-networks", "knowledge-distillation", kind.task, *kind.tags],
        "datasets": [] if external else datasets_of(manifest),
        "base_model": base_model_of(manifest, record),
        "new_version": newest if is_repo_id(newest) and newest != repo_of(manifest, generation) else None,
        "model-index": model_index(manifest, metrics, kind, title),
        "born_again": provenance(manifest, record),
    }
    training = ["Elsewhere; how is not known here."] if external else _training(manifest, record, kind)
    if curve is not None:
        training += ["", f"![Training curve]({curve})"]
    return _filled(
        "generation",
        front_matter=front_matter(header),
        title=plain(title),
        origin=" ".join(_origin(manifest, record)),
        use=_use(manifest, record, kind),
        measured=_measured(spec, record) if metrics else "Not measured.",
        results=_results(metrics),
        lineage=_lineage(so_far, kind),
        calibration=_calibration(metrics),
        training="\n".join(training),
        limits=_limits(manifest, metrics, kind, record),
        hardware=_hardware(so_far["generations"]),
        citation=_template("citation").template.rstrip(),
    )


@cache
def _template(name: str) -> Template:
    folder = resources.files("born_again").joinpath("model_card_templates")
    return Template(folder.joinpath(f"{name}.md").read_text(encoding="utf-8"))


def _filled(name: str, **values: str) -> str:
    """One pass over the template: what is filled in is not looked at again, whatever a user has written there."""
    return re.sub(r"\n{3,}", "\n\n", _template(name).substitute(values))


def _use(manifest: Mapping[str, Any], record: Mapping[str, Any], kind: Kind) -> str:
    repo, branch, model = repo_of(manifest, record["index"]), branch_of(manifest), manifest["spec"]["model"]
    values = {
        "source": f'"{repo}"{_revision(manifest)}' if repo else '"FOLDER"',
        "timm": (f"hf-hub:{repo}" + (f"@{branch}" if branch else "")) if repo else "local-dir:FOLDER",
    }
    parts = [_filled(f"use_{kind.templates}", **values)]
    if repo and (manifest.get("hub") or {}).get("private"):
        parts.insert(0, "The repository is private: `hf auth login` comes first.")
    if not is_external(record) and kind.own.fullmatch(model):
        values |= {"model": model, "type": "char_cnn_lstm" if "char-cnn" in model else "lstm_lm"}
        parts.append(_filled(f"{'alone' if repo else 'local'}_{kind.templates}", **values))
    return "\n\n".join(part.rstrip() for part in parts)


def _revision(manifest: Mapping[str, Any]) -> str:
    return f', revision="{branch}"' if (branch := branch_of(manifest)) else ""


def _link(repo: str) -> str:
    return f"[{repo}](https://huggingface.co/{repo})"


def _origin(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    spec, parent = manifest["spec"], record["parent"]
    if is_external(record):
        source = record.get("source", {})
        revision = f" at {plain(source['revision'])}" if source.get("revision") else ""
        yield f"A copy of {plain(local_name(str(source.get('path_or_repo'))))}{revision}, which was trained elsewhere:"
        yield "generation 0 of a born-again lineage, the teacher of generation 1."
        return
    what = f"A {_model(spec)} trained from scratch on {_dataset(manifest)}"
    if parent is None:
        yield f"{what} by its labels: generation 0 of a born-again lineage, the teacher of generation 1."
        return
    # Of a network trained elsewhere it is not known.
    same = "" if spec.get("teacher") and parent == 0 else " of the same architecture"
    fit = record.get("teacher_fit") or {}
    known = ""
    if fit.get("perplexity") is not None:
        known = f", whose perplexity on a sample of the training text is {fit['perplexity']:.2f}"
    elif fit.get("accuracy") is not None:
        known = f", which is right on {fit['accuracy']:.2%} of a sample of the training set"
    yield f"{what} with another seed, taught by generation {parent}{same}{known}. Objective: {_objective(record)}."
    repo, commit = repo_of(manifest, parent), commit_of(manifest["generations"][parent])
    if repo is None:
        yield "No weights were taken from its teacher."
        return
    yield f"Its teacher is {_link(repo)}{f' at commit {commit}' if commit else ''}; `base_model` names it, though no"
    yield "weights were taken from it."


def _measured(spec: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if is_external(record):
        return "Measured on the weights beside this card, in float32."
    chosen = "after the last step"
    if spec["training"].get("load_best_model_at_end"):
        chosen = "of the checkpoint that was best in the evaluations during training"
        if "validation" in record["metrics"]:
            chosen = "of the checkpoint that was best on validation"
    return f"Measured on the weights beside this card, in float32, {chosen}; one run, one seed."


def _results(metrics: Mapping[str, Mapping[str, float | int | None]]) -> str:
    return "\n".join(
        f"- {plain(split)} {plain(metric)}: {_shown(value)}"
        for split, values in metrics.items()
        for metric, value in values.items()
    )


def _lineage(manifest: Mapping[str, Any], kind: Kind) -> str:
    """As `results_table` prints it in a terminal, its objectives escaped."""
    records = [{**record, "objective": plain(record["objective"])} for record in manifest["generations"]]
    if not any(record["metrics"] for record in records):
        return "Not measured."
    seeds = "" if all(map(is_external, manifest["generations"])) else " One run, one seed for each generation."
    return f"{results_table({**manifest, 'generations': records})}\n\n{kind.legend}{seeds}"


def _calibration(metrics: Mapping[str, Mapping[str, float | None]]) -> str:
    sentences = []
    for split, values in metrics.items():
        if (ece := values.get("ece")) is not None:
            sentences.append(
                f"On {plain(split)} the confidence in the predicted class is off the accuracy by {100 * ece:.2f} "
                "percentage points on average (expected calibration error), in whichever direction."
            )
            if (nll := values.get("nll")) is not None:
                sentences.append(f"The mean negative log-likelihood of the true class is {nll:.4f} nats.")
    return " ".join(sentences) or "Not measured."


def _training(manifest: Mapping[str, Any], record: Mapping[str, Any], kind: Kind) -> list[str]:
    spec, data = manifest["spec"], manifest["data"]
    parameters = f"; {record['parameters']:,} parameters" if record.get("parameters") else ""
    return [
        f"- objective: {_objective(record)}",
        f"- seed: {record['seed']}",
        f"- architecture: {_model(spec)}{_settings(spec.get('model_args'))}{parameters}",
        f"- data: {_dataset(manifest)}{_settings(spec.get('data_args'))}{_sizes(data, kind)}",
        *(f"- {plain(key)}: {setting(value)}" for key, value in spec["training"].items()),
        f"- versions: {', '.join(f'{plain(name)} {plain(version)}' for name, version in record['versions'].items())}",
    ]


def _settings(values: Mapping[str, Any] | None) -> str:
    inside = ", ".join(f"{plain(key)} {setting(value)}" for key, value in (values or {}).items())
    return f" ({inside})" if inside else ""


def _counts(data: Mapping[str, Any]) -> dict[str, int]:
    """Images or words by split."""
    held = data.get("rows") or data.get("tokens") or {}
    return {split: count for split, count in held.items() if type(count) is int} if isinstance(held, dict) else {}


def _share(data: Mapping[str, Any], split: str, name: str) -> float:
    """A fraction of a split's tokens, see `born_again.data.coverage`; 0 where it is not known."""
    for key in ("coverage", split, name):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data if isinstance(data, float) and 0 < data <= 1 else 0.0


def _sizes(data: Mapping[str, Any], kind: Kind) -> str:
    counts = ", ".join(f"{plain(split)} {count:,}" for split, count in _counts(data).items())
    return f"; {kind.unit}: {counts}" if counts else ""


def _limits(
    manifest: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, float | None]],
    kind: Kind,
    record: Mapping[str, Any],
) -> str:
    spec, data = manifest["spec"], manifest["data"]
    dataset, count = _dataset(manifest), _counts(data).get("test", 0)
    sentences = [
        f"Measured on {dataset} and on nothing else: not on other data, not for robustness, fairness or any use."
        if metrics
        else f"Not measured, neither on {dataset} nor on anything else."
    ]
    if not is_external(record):
        sentences.append(
            "With one seed for each generation the spread between seeds is not known, and a small gain may be chance."
        )
    accuracy = metrics.get("test", {}).get("accuracy")
    if count and accuracy is not None and 0 <= accuracy <= 1:
        error = 100 * math.sqrt(accuracy * (1 - accuracy) / count)
        sentences.append(
            f"The test split has {count:,} images, from which alone the accuracy has a standard error of {error:.2f} "
            "percentage points."
        )
    elif count and metrics:
        sentences.append(f"The test split has {count:,} {kind.unit}.")
    if (split := true_split(manifest, "test")) != "test":
        sentences.append(f"The dataset has no test split: what is called test here is its split {plain(split)}.")
    purposes = {"max_train_samples": "for training", "max_eval_samples": "of each split measured"}
    if is_external(record):
        del purposes["max_train_samples"]
    for name, purpose in purposes.items():
        if (limit := (spec.get("data_args") or {}).get(name)) is not None:
            sentences.append(f"No more than {setting(limit)} {kind.unit} were taken {purpose}.")
    if is_external(manifest["generations"][0]):
        sentences.append("What generation 0 was trained on is not known here, nor whether the test split was in it.")
    if kind is IMAGES and "image_column" in data and not is_external(record):  # read by load_images
        size = setting((spec.get("data_args") or {}).get("image_size", 32))
        sentences.append(
            f"It was trained on images of {size}x{size} pixels, to which others were squashed whatever their "
            "proportions; on images read in another way it is less accurate."
        )
    elif kind is IMAGES and kind.own.fullmatch(spec["model"]) and not is_external(record):
        sentences.append("The network is made for images of 32x32 pixels.")
    if kind is TEXT and type(data.get("vocabulary")) is int:
        sentences.append(f"It reads and writes the {data['vocabulary']:,} words of its vocabulary and no others.")
        unknown = _share(data, "test", "unknown")
        if unknown:
            sentences.append(
                f"Of the tokens of the test split {unknown:.2%} are not among them and were read as `<unk>`, which "
                "makes perplexities lower than those of the text."
            )
    return " ".join(sentences)


def _hardware(records: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- gen{record['index']}: {_place(record)}" for record in records)


def _place(record: Mapping[str, Any]) -> str:
    if is_external(record):
        return "trained elsewhere"
    parts = [plain(record.get("hardware") or "hardware not recorded"), f"{record['seconds']:,.0f} seconds of training"]
    if record.get("steps"):
        parts.append(f"{record['steps']:,} steps")
    if record.get("peak_memory_mib"):
        parts.append(f"peak memory {record['peak_memory_mib']:,} MiB")
    return "; ".join(parts)


def _model(spec: Mapping[str, Any]) -> str:
    return plain(local_name(spec["model"]))


def _dataset(manifest: Mapping[str, Any]) -> str:
    return plain(dataset_name(manifest))


def _objective(record: Mapping[str, Any]) -> str:
    meaning = _OBJECTIVES.get(record["objective"])
    return plain(record["objective"]) + (f" ({meaning})" if meaning else "")


def _recipe(record: Mapping[str, Any]) -> str:
    return "trained elsewhere" if is_external(record) else f"{plain(record['objective'])}, seed {record['seed']}"


def _shown(value: float | int | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
