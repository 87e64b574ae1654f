"""Measures a generation or an ensemble again, as its lineage was measured, and compares with the record."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from born_again.data.image_dataset import ImageDataset, collate_batch
from born_again.data.images import ImageSplit, load_images
from born_again.data.streams import TokenStreams
from born_again.data.text import TextData, load_text
from born_again.lineage.ensemble import LineageEnsemble
from born_again.lineage.evaluation import evaluate_classifier, evaluate_language_model, finite, load_generation
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256
from born_again.lineage.members import ENSEMBLE_NAME, read_ensemble
from born_again.teacher import carries_state
from born_again.teacher.preprocessing import read_otherwise
from born_again.teacher.tokenizers import check_same_tokens

TOLERANCE = 1e-4
_WEIGHTS_NAME = "model.safetensors"
_GENERATION = re.compile("gen(0|[1-9][0-9]{0,5})")
_IMAGE_BATCH = 256
_IMAGE_SIZE = 32
_STREAMS = 8
_WINDOW = 256
# The arguments of the data, as the spec and the command line call them.
_OF_IMAGES = {"image_column": str, "label_column": str, "image_size": int, "test_samples": int}
_OF_TEXT = {"text_column": str}
_OF_BOTH = {"dataset_revision": str, "max_train_samples": int, "max_eval_samples": int}
_KINDS = {**_OF_IMAGES, **_OF_TEXT, **_OF_BOTH, "window": int}


def images_to_measure(split: ImageSplit, mean: Sequence[float], std: Sequence[float]) -> ImageDataset:
    """A split as image classifiers are measured on it: every image as it is.

    Args:
        split: usually the test split.
        mean: of each channel, on the scale where 255 is 1, as the network was trained with.
        std: likewise.
    """
    return ImageDataset(split, tuple(mean), tuple(std), augment=False, flip=False, seed=0)


def texts_to_measure(data: TextData, carries: bool, window: int, streams: int) -> dict[str, TokenStreams]:
    """The splits as language models are measured on them.

    Args:
        data: the corpus.
        carries: whether the network carries a state, see `born_again.teacher.carries_state`. A state makes one stream
            exact and the window indifferent; without it the window is the context.
        window: of the training, in steps.
        streams: of a network without a state, read side by side.

    Returns:
        Streams of the validation and the test split.

    Raises:
        ValueError: a split is too short for so many streams.
    """
    count, steps = (1, 10 * window) if carries else (streams, window)
    before = data.tokenizer.eos_token_id
    splits = {"validation": data.validation, "test": data.test}
    return {
        split: TokenStreams(tokens, count, min(steps, len(tokens)), before=before) for split, tokens in splits.items()
    }


def remeasure(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dataset: str | None = None,
    data_args: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Measures what is in a folder or on the Hub, and compares with its record where there is one.

    A number agrees when it is within `tolerance` of the record, absolutely or relative to the larger of the two; on
    the same machine it is the same to the last digits, and 1e-4 is one image in ten thousand.

    Args:
        path: of a generation, such as OUTPUT_DIR/gen2, or of an ensemble, such as OUTPUT_DIR/ensemble; or a Hub
            repository of a generation.
        revision: of the Hub repository.
        dataset: what to measure on; None takes the lineage's. Its other arguments hold for it, but for the revision.
        data_args: dataset_revision, image_column, label_column, image_size, text_column, max_eval_samples, over the
            lineage's; None stands for the lineage's. Where there is no lineage, image_size is that of config.json.
        batch_size: images at once (256), which changes nothing; or the streams of a language model without a state
            (those of the lineage), which changes what its first words see.
        device: where it is computed; None takes the accelerator where there is one.
        tolerance: 0 or more.

    Returns:
        JSON values:
            path: as given. kind: "generation" or "ensemble". generations: the indices; [] where they are not known.
            lineage: its name, None where there is no lineage.json. average: of an ensemble, else None.
            dataset, data_args: what was measured on. device: where.
            items: how many images or tokens, by split. test_split: what the dataset calls the split that is measured
                as "test".
            weights: a list of file, sha256 (None where it is missing), recorded (None without a record), agrees.
            splits: {split: {metric: {measured, recorded, difference, agrees}}}; the last three are None where there is
                nothing to compare with, a number that is not finite is None.
            compared: whether numbers were compared. note: why not, or what is wrong with the weights; None if nothing.
            tolerance: as given.
            agrees: False where a number or a file of weights differs from the record, True where all agree, None where
                numbers could not be compared.

    Raises:
        FileNotFoundError: a folder that is missing or lacks a file.
        LineageError: a lineage.json or ensemble.json that is wrong.
        ValueError: an argument that is wrong or missing, or data that the network was not made for: other labels or
            other words.
        OSError: the Hub is needed and cannot be reached, or has no such repository or dataset.
    """
    _check_numbers(batch_size, tolerance)
    subject = _find(path, revision)
    name, arguments = _data(subject, dataset, data_args or {})
    place = _device(device)
    result = {
        "path": os.fspath(path),
        "kind": "generation" if subject.average is None else "ensemble",
        "generations": subject.generations,
        "average": subject.average,
        "lineage": subject.manifest and subject.manifest.content["name"],
        "dataset": name,
        "data_args": arguments,
        "device": str(place),
        "items": {},
        "test_split": "test",
        "weights": subject.weights,
        "splits": {},
        "compared": False,
        "note": subject.note,
        "tolerance": tolerance,
        "agrees": None,
    }
    is_changed = any(entry["agrees"] is False for entry in subject.weights)
    if is_changed:
        result |= {"note": "the weights do not hash to the record", "agrees": False}
    try:
        model = _load(subject)
    except (ValueError, OSError, LineageError) as error:
        if not is_changed:
            raise
        result["note"] += f", and do not load ({error})"
        return result
    read = partial(_read, is_recorded=dataset is None)
    if getattr(model.config, "model_type", None) == "timm_wrapper":
        if subject.manifest is None:
            arguments, doubt = _preprocessing(model.config.pretrained_cfg or {}, arguments)
            result |= {"data_args": arguments, "note": f"{result['note']}{doubt}"}
        measured, items, fingerprint = _measure_images(model, read, name, arguments, batch_size or _IMAGE_BATCH, place)
    else:
        measured, items, fingerprint = _measure_text(model, read, subject, name, arguments, batch_size, place)
    result |= {"items": items, "test_split": fingerprint.get("test_split", "test")}
    recorded = None
    if subject.recorded is not None and not is_changed:
        recorded = subject.recorded if _is_same(subject.manifest.content["data"], fingerprint) else None
        if recorded is None:
            result["note"] = "the record is of other data"
    result["splits"] = _compared(measured, recorded or {}, tolerance)
    verdicts = [entry["agrees"] for metrics in result["splits"].values() for entry in metrics.values()]
    if known := [verdict for verdict in verdicts if verdict is not None]:
        result |= {"compared": True, "agrees": all(known)}
    elif recorded is not None:
        result["note"] = "the record has none of these metrics"
    return result


@dataclass
class _Subject:
    """What is measured, and what is written of it.

    Args:
        source: folder or Hub repository.
        revision: of the repository.
        tokenizer: where a language model's is.
        manifest: of the lineage, None where there is none.
        generations: indices, as far as they are known.
        average: of an ensemble, else None.
        recorded: metrics by split, None without a record.
        note: why there is no record.
        weights: of each file: file, sha256, recorded, agrees.
    """

    source: str | Path
    revision: str | None
    tokenizer: str | Path
    manifest: Manifest | None = None
    generations: list[int] = field(default_factory=list)
    average: str | None = None
    recorded: Mapping[str, Any] | None = None
    note: str | None = "there is no record to compare with"
    weights: list[dict[str, Any]] = field(default_factory=list)


def _find(path: str | os.PathLike[str], revision: str | None) -> _Subject:
    source = os.fspath(path)
    if not os.path.isdir(source):
        beside = Path(source).parent
        if _GENERATION.fullmatch(Path(source).name) or (beside / MANIFEST_NAME).is_file() or os.path.exists(source):
            raise FileNotFoundError(
                f"path: got {source!r}, which is no folder, expected that of a generation such as OUTPUT_DIR/gen2, or "
                "a Hub repository; check the spelling."
            )
        return _Subject(source, revision, source)
    if revision is not None:
        raise ValueError(f"revision: got {revision!r} for the folder {source!r}, expected it for the Hub; drop it.")
    folder = Path(source).resolve()
    if (folder / MANIFEST_NAME).is_file():
        raise ValueError(
            f"path: {source!r} is the folder of a lineage, expected one of its generations or its ensemble; give "
            f"{os.path.join(source, 'gen0')!r}, for one."
        )
    manifest = Manifest.read(folder.parent) if (folder.parent / MANIFEST_NAME).is_file() else None
    if (folder / ENSEMBLE_NAME).is_file():
        return _ensemble(folder, manifest)
    subject = _Subject(source, None, source, manifest)
    match = _GENERATION.fullmatch(folder.name)
    if match is None or manifest is None:
        return subject
    index = int(match[1])
    record = manifest.record(index)
    subject.generations = [index]
    if record is None or record["status"] != "finished":
        subject.note = f"generation {index} is not finished in {MANIFEST_NAME}: there is no record to compare with"
        return subject
    subject.recorded, subject.note = record["metrics"], None
    subject.weights = [_hashed(folder, record["weights_sha256"])]
    return subject


def _ensemble(folder: Path, manifest: Manifest | None) -> _Subject:
    members, average = read_ensemble(folder / ENSEMBLE_NAME)
    indices = [member.generation for member in members]
    subject = _Subject(folder, None, folder.parent / f"gen{indices[0]}", manifest, indices, average)
    subject.weights = [_hashed(folder.parent / f"gen{each.generation}", each.weights_sha256) for each in members]
    for record in [] if manifest is None else manifest.content.get("ensembles", []):
        written = dict(zip(record["members"], record["weights_sha256"], strict=True))
        # A mean does not ask for the order of its members; of other weights it is another ensemble.
        if written == {each.generation: each.weights_sha256 for each in members} and record["average"] == average:
            subject.recorded, subject.note = record["metrics"], None
    return subject


def _hashed(folder: Path, recorded: str) -> dict[str, Any]:
    path = folder / _WEIGHTS_NAME
    sha256 = file_sha256(path) if path.is_file() else None
    name = f"{folder.name}/{_WEIGHTS_NAME}"
    return {"file": name, "sha256": sha256, "recorded": recorded, "agrees": sha256 == recorded}


def _load(subject: _Subject) -> nn.Module:
    if subject.average is not None:
        return LineageEnsemble.from_pretrained(subject.source)
    try:
        return load_generation(subject.source, revision=subject.revision)
    except OSError as error:
        if os.path.isdir(subject.source):
            raise
        raise OSError(
            f"path: got {subject.source!r}, which is no folder here and cannot be read from the Hub, expected either; "
            f"check the spelling, the revision and the network ({error})"
        ) from error


def _data(subject: _Subject, dataset: str | None, asked: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The dataset, and its arguments that are not None."""
    given = {name: value for name, value in asked.items() if value is not None}
    if subject.manifest is None:
        if dataset is None:
            raise ValueError(
                f"dataset: got none, and there is no {MANIFEST_NAME} beside {os.fspath(subject.source)!r} that would "
                "say what it was measured on, expected a name or folder; give --dataset."
            )
        return dataset, given
    spec = subject.manifest.spec
    known = {name: value for name, value in spec.data_args.items() if value is not None}
    for name, value in known.items():
        kind = _KINDS.get(name)
        if kind is not None and type(value) is not kind:
            raise ValueError(
                f"{name}: {subject.manifest.path} has {value!r:.80}, expected one of type {kind.__name__}; restore "
                "the file from a copy."
            )
    if dataset not in (None, spec.dataset):
        known.pop("dataset_revision", None)
    if dataset is None and _is_gone(spec.dataset):
        raise ValueError(
            f"dataset: got none, and the lineage was measured on {spec.dataset!r}, which is not on this machine, "
            "expected the place where the same data is here; give --dataset. What is compared is its sha256."
        )
    return dataset or spec.dataset, {**known, **given}


def _is_gone(dataset: str) -> bool:
    """Whether a data set is certainly a path, and not there; "owner/name" may be of the Hub."""
    is_path = dataset.startswith((".", "~")) or os.path.isabs(dataset) or dataset.count("/") > 1
    return is_path and not os.path.exists(os.path.expanduser(dataset))


def _read(load: Callable[..., Any], dataset: str, *, is_recorded: bool, **options: Any) -> Any:
    """Reads the data; of "folder/name" in a record nobody knows whether it was a folder where the lineage was trained.

    Raises:
        ValueError: what `load` raises; where it is for want of a folder, says from where that was looked for.
    """
    try:
        return load(dataset, **options)
    except (ValueError, ConnectionError) as error:
        if not is_recorded or dataset.count("/") != 1 or os.path.exists(os.path.expanduser(dataset)):
            raise
        raise ValueError(
            f"dataset: got none, and the lineage was measured on {dataset!r}, which cannot be read here ({error}). If "
            f"it is a folder, it is looked for from {os.getcwd()!r}: go where the lineage was trained, or give "
            "--dataset with the place where the same data is. What is compared is its sha256."
        ) from error


def _loader_arguments(arguments: Mapping[str, Any], own: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
    for name in others:
        if name in arguments:
            what = "a language model" if name in _OF_IMAGES else "an image classifier"
            raise ValueError(
                f"{name}: got {arguments[name]!r}, but this is {what}, whose data has none; leave it out."
            )
    taken = {name: arguments[name] for name in (*own, *_OF_BOTH) if name in arguments}
    if "dataset_revision" in taken:
        taken["revision"] = taken.pop("dataset_revision")
    return taken


_Measured = tuple[dict[str, dict[str, float]], dict[str, int], Mapping[str, Any]]


def _preprocessing(saved: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments of the data with the image size of a config.json, and what else that asks for and is not done."""
    sides = (saved.get("input_size") or [3, _IMAGE_SIZE, _IMAGE_SIZE])[1:]
    asked = read_otherwise(saved, "bilinear", "nearest")
    doubt = "" if asked is None else f"; config.json asks for {asked}, and images are squashed by bilinear here"
    if sides[0] != sides[1]:
        doubt += f"; config.json has images of {sides[0]} x {sides[1]}, and they are square here"
    # What was saved before a network's size was that of its training says another.
    is_ours = read_otherwise(saved) is None and sides[0] == sides[1]
    size = {"image_size": sides[0]} if is_ours and sides[0] != _IMAGE_SIZE else {}
    return {**size, **arguments}, doubt


def _measure_images(
    model: nn.Module,
    read: Callable[..., Any],
    dataset: str,
    arguments: Mapping[str, Any],
    batch_size: int,
    device: torch.device,
) -> _Measured:
    options = _loader_arguments(arguments, _OF_IMAGES, _OF_TEXT)
    saved = model.config.pretrained_cfg or {}
    mean, std = saved.get("mean"), saved.get("std")
    if not mean or not std:
        raise ValueError(
            "path: its config.json has no mean and std of the images it was trained on, expected both in "
            "pretrained_cfg; save it by save_image_classifier."
        )
    data = read(load_images, dataset, **options)
    names = dict(model.config.id2label)
    for index in range(max(len(names), len(data.label_names))):
        theirs = data.label_names[index] if index < len(data.label_names) else None
        if names.get(index) != theirs:
            raise ValueError(
                f"dataset: class {index} of {dataset!r} is {theirs!r}, that of the network {names.get(index)!r}; "
                "expected the same labels in the same order: give the data it was trained on."
            )
    test = images_to_measure(data.test, mean, std)
    metrics = evaluate_classifier(model, test, collate_batch, batch_size, device)
    return {"test": metrics}, {"test": len(test)}, data.fingerprint


def _measure_text(
    model: nn.Module,
    read: Callable[..., Any],
    subject: _Subject,
    dataset: str,
    arguments: Mapping[str, Any],
    batch_size: int | None,
    device: torch.device,
) -> _Measured:
    options = _loader_arguments(arguments, _OF_TEXT, _OF_IMAGES)
    tokenizer = AutoTokenizer.from_pretrained(subject.tokenizer, revision=subject.revision, trust_remote_code=False)
    data = read(load_text, dataset, **options)
    try:
        check_same_tokens(tokenizer, data.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"dataset: the words of {dataset!r} are not those that the network was trained on, expected the same in "
            f"the same order; give the data it was trained on, and all of its training split ({error})"
        ) from error
    carries = carries_state(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    recipe = {} if subject.manifest is None else subject.manifest.spec.training
    window = arguments.get("window", min(_WINDOW, positions or _WINDOW))
    streams = batch_size or recipe.get("per_device_eval_batch_size", _STREAMS)
    splits = texts_to_measure(data, carries, window, streams)
    metrics = {split: evaluate_language_model(model, text, device) for split, text in splits.items()}
    return metrics, {split: text.token_count for split, text in splits.items()}, data.fingerprint


def _is_same(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same data; images may be read from another place than they were."""
    if "sha256" in recorded and "sha256" in measured:
        return recorded["sha256"] == measured["sha256"]
    return recorded == measured


def _compared(
    measured: Mapping[str, Mapping[str, float]], recorded: Mapping[str, Mapping[str, Any]], tolerance: float
) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        split: {
            name: _pair(value, recorded.get(split, {}).get(name), name in recorded.get(split, {}), tolerance)
            for name, value in finite(metrics).items()
        }
        for split, metrics in measured.items()
    }


def _pair(measured: float | None, recorded: float | None, is_known: bool, tolerance: float) -> dict[str, Any]:
    difference, agrees = None, None
    if measured is not None and recorded is not None:
        # Room for the last digit of a difference that is the tolerance itself.
        room = tolerance * (1 + 1e-9)
        difference, agrees = measured - recorded, math.isclose(measured, recorded, rel_tol=room, abs_tol=room)
    elif is_known:  # a record has null for what is not finite
        agrees = measured is recorded
    return {"measured": measured, "recorded": recorded, "difference": difference, "agrees": agrees}


def _check_numbers(batch_size: int | None, tolerance: float) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected 1 or more; leave it out for the default.")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: got {tolerance}, expected a finite number of 0 or more, such as {TOLERANCE}.")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    # AssertionError: a torch that was built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device: got {name!r}, expected one that this machine has, such as 'cpu' or 'cuda:0' "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device
