"""Evaluates a generation or an ensemble again, and compares the metrics with its record."""

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
from born_again.lineage.evaluation import evaluate_classifier, evaluate_language_model, finite_or_none, load_generation
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, check_one_lineage, file_sha256
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
# The data arguments, by their names in the spec and on the command line.
_IMAGE_ARGS = {"image_column": str, "label_column": str, "image_size": int, "test_samples": int}
_IMAGE_ARGS |= {"validation_fraction": float}
_TEXT_ARGS = {"text_column": str}
_COMMON_ARGS = {"dataset_revision": str, "max_train_samples": int, "max_eval_samples": int}
_ARG_TYPES = {**_IMAGE_ARGS, **_TEXT_ARGS, **_COMMON_ARGS, "window": int}


def evaluation_images(split: ImageSplit, mean: Sequence[float], std: Sequence[float]) -> ImageDataset:
    """The dataset on which image classifiers are evaluated: every image without augmentation.

    Args:
        split: usually the test split.
        mean: of each channel, on the scale where 255 is 1, that the network was trained with.
        std: likewise.
    """
    return ImageDataset(split, tuple(mean), tuple(std), augment=False, flip=False, seed=0)


def evaluation_streams(data: TextData, carries: bool, window: int, streams: int) -> dict[str, TokenStreams]:
    """The token streams on which language models are evaluated.

    Args:
        data: the corpus.
        carries: whether the network carries a state, see `born_again.teacher.carries_state`. With a state one stream
            is read, and the window does not matter; without one the window is the context.
        window: of the training, in steps.
        streams: number of streams, for a network without a state.

    Returns:
        Streams of the validation and the test split.

    Raises:
        ValueError: a split is too short for the number of streams.
    """
    count, steps = (1, 10 * window) if carries else (streams, window)
    before = data.tokenizer.eos_token_id
    splits = {"validation": data.validation, "test": data.test}
    return {
        split: TokenStreams(tokens, count, min(steps, len(tokens)), before=before) for split, tokens in splits.items()
    }


def reevaluate(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dataset: str | None = None,
    data_args: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Evaluates a generation or an ensemble of a folder or the Hub, and compares with its record if there is one.

    A number agrees if it is within `tolerance` of the record, absolutely or relative to the larger of the two. On the
    same machine it is equal to the last digits; 1e-4 is one image in ten thousand.

    Args:
        path: of a generation, such as OUTPUT_DIR/gen2, or of an ensemble, such as OUTPUT_DIR/ensemble; or a Hub
            repository of a generation.
        revision: of the Hub repository.
        dataset: to evaluate on; None takes the lineage's. The lineage's data arguments apply to it, except the
            revision.
        data_args: dataset_revision, image_column, label_column, image_size, text_column, max_eval_samples; None or
            missing takes the lineage's. Without a lineage, image_size is that of config.json.
        batch_size: images at once (256), which does not affect the result; or the number of streams of a language
            model without a state (the lineage's), which affects the context of their first tokens.
        device: to evaluate on; None takes the accelerator if there is one.
        tolerance: 0 or more.

    Returns:
        JSON values:
            path: as given. kind: "generation" or "ensemble". generations: the indices; [] where they are not known.
            lineage: its name, None where there is no lineage.json. average: of an ensemble, else None.
            model: the architecture of the network, of an ensemble's first member; None where it does not load.
            dataset, data_args: of the evaluation. device: of the evaluation.
            items: number of images or tokens, by split. test_split: the dataset's name for the split "test".
            weights: a list of file, sha256 (None where it is missing), recorded (None without a record), agrees.
            splits: {split: {metric: {measured, recorded, difference, agrees}}}; the last three are None where there is
                no record, and a number that is not finite is None.
            compared: whether metrics were compared. note: why not, or what is wrong with the weights; else None.
            tolerance: as given.
            agrees: False if a metric or a file of weights differs from the record, True if all agree, None if metrics
                could not be compared.

    Raises:
        FileNotFoundError: a folder that is missing or lacks a file.
        LineageError: a lineage.json or ensemble.json that is wrong.
        ValueError: an argument that is wrong or missing, or data of other labels or another vocabulary than the
            network's.
        OSError: the Hub is needed and cannot be reached, or has no such repository or dataset.
    """
    _check_numbers(batch_size, tolerance)
    target = _resolve_target(path, revision)
    if target.manifest is not None and target.manifest.spec.task is not None:
        raise ValueError(
            f"path: {os.fspath(path)!r} is of a lineage that a program trained on data of its own, expected one of "
            "the scripts'; measure it there, with Lineage(...).evaluate(INDEX) of the same arguments."
        )
    name, arguments = _data(target, dataset, data_args or {})
    place = _device(device)
    result = {
        "path": os.fspath(path),
        "kind": "generation" if target.average is None else "ensemble",
        "generations": target.generations,
        "average": target.average,
        "lineage": target.manifest and target.manifest.content["name"],
        "model": None,
        "dataset": name,
        "data_args": arguments,
        "device": str(place),
        "items": {},
        "test_split": "test",
        "weights": target.weights,
        "splits": {},
        "compared": False,
        "note": target.note,
        "tolerance": tolerance,
        "agrees": None,
    }
    is_changed = any(entry["agrees"] is False for entry in target.weights)
    if is_changed:
        result |= {"note": "the weights do not match the recorded hash", "agrees": False}
    try:
        model = _load(target)
    except (ValueError, OSError, LineageError) as error:
        if not is_changed:
            raise
        result["note"] += f", and do not load ({error})"
        return result
    result["model"] = getattr(model.config, "architecture", None) or getattr(model.config, "model_type", None)
    read = partial(_read, is_recorded=dataset is None)
    if getattr(model.config, "model_type", None) == "timm_wrapper":
        if target.manifest is None:
            arguments, difference = _preprocessing(model.config.pretrained_cfg or {}, arguments)
            result |= {"data_args": arguments, "note": f"{result['note']}{difference}"}
        measured, items, fingerprint = _measure_images(model, read, name, arguments, batch_size or _IMAGE_BATCH, place)
    else:
        measured, items, fingerprint = _measure_text(model, read, target, name, arguments, batch_size, place)
    result |= {"items": items, "test_split": fingerprint.get("test_split", "test")}
    recorded = None
    if target.recorded is not None and not is_changed:
        recorded = target.recorded if _is_same(target.manifest.content["data"], fingerprint) else None
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
class _Target:
    """What is evaluated, and its record.

    Args:
        source: folder or Hub repository.
        revision: of the repository.
        tokenizer: folder or repository of a language model's tokenizer.
        manifest: of the lineage, None where there is none.
        generations: indices, if known.
        average: of an ensemble, else None.
        recorded: metrics by split, None without a record.
        note: why there is no record, else None.
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


def _resolve_target(path: str | os.PathLike[str], revision: str | None) -> _Target:
    source = os.fspath(path)
    if not os.path.isdir(source):
        beside = Path(source).parent
        if _GENERATION.fullmatch(Path(source).name) or (beside / MANIFEST_NAME).is_file() or os.path.exists(source):
            raise FileNotFoundError(
                f"path: got {source!r}, which is no folder, expected that of a generation such as OUTPUT_DIR/gen2, or "
                "a Hub repository; check the spelling."
            )
        return _Target(source, revision, source)
    if revision is not None:
        raise ValueError(f"revision: got {revision!r} for the folder {source!r}, expected it for the Hub; drop it.")
    folder = Path(source).resolve()
    check_one_lineage("path", source, "gen0")
    if (folder / MANIFEST_NAME).is_file():
        raise ValueError(
            f"path: {source!r} is the folder of a lineage, expected one of its generations or its ensemble; give "
            f"{os.path.join(source, 'gen0')!r}, for one."
        )
    manifest = Manifest.read(folder.parent) if (folder.parent / MANIFEST_NAME).is_file() else None
    if (folder / ENSEMBLE_NAME).is_file():
        return _ensemble(folder, manifest)
    target = _Target(source, None, source, manifest)
    match = _GENERATION.fullmatch(folder.name)
    if match is None or manifest is None:
        return target
    index = int(match[1])
    record = manifest.record(index)
    target.generations = [index]
    if record is None or record["status"] != "finished":
        target.note = f"generation {index} is not finished in {MANIFEST_NAME}: there is no record to compare with"
        return target
    target.recorded, target.note = record["metrics"], None
    target.weights = [_weights_entry(folder, record["weights_sha256"])]
    return target


def _ensemble(folder: Path, manifest: Manifest | None) -> _Target:
    members, average = read_ensemble(folder / ENSEMBLE_NAME)
    indices = [member.generation for member in members]
    target = _Target(folder, None, folder.parent / f"gen{indices[0]}", manifest, indices, average)
    target.weights = [_weights_entry(folder.parent / f"gen{each.generation}", each.weights_sha256) for each in members]
    for record in [] if manifest is None else manifest.content.get("ensembles", []):
        written = dict(zip(record["members"], record["weights_sha256"], strict=True))
        # The order of the members does not matter; with other weights it is another ensemble.
        if written == {each.generation: each.weights_sha256 for each in members} and record["average"] == average:
            target.recorded, target.note = record["metrics"], None
    return target


def _weights_entry(folder: Path, recorded: str) -> dict[str, Any]:
    path = folder / _WEIGHTS_NAME
    sha256 = file_sha256(path) if path.is_file() else None
    name = f"{folder.name}/{_WEIGHTS_NAME}"
    return {"file": name, "sha256": sha256, "recorded": recorded, "agrees": sha256 == recorded}


def _load(target: _Target) -> nn.Module:
    if target.average is not None:
        return LineageEnsemble.from_pretrained(target.source)
    try:
        return load_generation(target.source, revision=target.revision)
    except OSError as error:
        if os.path.isdir(target.source):
            raise
        raise OSError(
            f"path: got {target.source!r}, which is no folder here and cannot be read from the Hub, expected either; "
            f"check the spelling, the revision and the network ({error})"
        ) from error


def _data(target: _Target, dataset: str | None, requested: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the dataset, and the data arguments that are not None."""
    given = {name: value for name, value in requested.items() if value is not None}
    if target.manifest is None:
        if dataset is None:
            raise ValueError(
                f"dataset: got none, and there is no {MANIFEST_NAME} beside {os.fspath(target.source)!r} that would "
                "say what it was evaluated on, expected a name or folder; give --dataset."
            )
        return dataset, given
    spec = target.manifest.spec
    known = {name: value for name, value in spec.data_args.items() if value is not None}
    for name, value in known.items():
        kind = _ARG_TYPES.get(name)
        if kind is not None and type(value) is not kind:
            raise ValueError(
                f"{name}: {target.manifest.path} has {value!r:.80}, expected one of type {kind.__name__}; restore "
                "the file from a copy."
            )
    if dataset not in (None, spec.dataset):
        known.pop("dataset_revision", None)
    if dataset is None and _is_missing_path(spec.dataset):
        raise ValueError(
            f"dataset: got none, and the lineage was evaluated on {spec.dataset!r}, which is not on this machine, "
            "expected the path of the same data here; give --dataset. Its sha256 is compared."
        )
    return dataset or spec.dataset, {**known, **given}


def _is_missing_path(dataset: str) -> bool:
    """Whether a dataset is certainly a path, and does not exist; "owner/name" may be on the Hub."""
    is_path = dataset.startswith((".", "~")) or os.path.isabs(dataset) or dataset.count("/") > 1
    return is_path and not os.path.exists(os.path.expanduser(dataset))


def _read(load: Callable[..., Any], dataset: str, *, is_recorded: bool, **options: Any) -> Any:
    """Reads the data. A recorded "folder/name" may have been a folder where the lineage was trained, or a Hub id.

    Raises:
        ValueError: what `load` raises; if a folder may be missing, names the folder that relative paths start from.
    """
    try:
        return load(dataset, **options)
    except (ValueError, ConnectionError) as error:
        if not is_recorded or dataset.count("/") != 1 or os.path.exists(os.path.expanduser(dataset)):
            raise
        raise ValueError(
            f"dataset: got none, and the lineage was evaluated on {dataset!r}, which cannot be read here ({error}). "
            f"If it is a folder, it is looked for from {os.getcwd()!r}: go where the lineage was trained, or give "
            "--dataset with the path of the same data. Its sha256 is compared."
        ) from error


def _loader_arguments(arguments: Mapping[str, Any], own: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
    for name in others:
        if name in arguments:
            what = "a language model" if name in _IMAGE_ARGS else "an image classifier"
            raise ValueError(
                f"{name}: got {arguments[name]!r}, but this is {what}, whose data has none; leave it out."
            )
    taken = {name: arguments[name] for name in (*own, *_COMMON_ARGS) if name in arguments}
    if "dataset_revision" in taken:
        taken["revision"] = taken.pop("dataset_revision")
    return taken


_Measured = tuple[dict[str, dict[str, float]], dict[str, int], Mapping[str, Any]]


def _preprocessing(saved: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The data arguments with the image size of a config.json, and how its preprocessing differs from ours."""
    sides = (saved.get("input_size") or [3, _IMAGE_SIZE, _IMAGE_SIZE])[1:]
    requested = read_otherwise(saved, "bilinear", "nearest")
    difference = (
        "" if requested is None else f"; config.json asks for {requested}, and images are squashed by bilinear here"
    )
    if sides[0] != sides[1]:
        difference += f"; config.json has images of {sides[0]} x {sides[1]}, and they are square here"
    # Earlier versions saved the size of the architecture, not that of the training.
    is_ours = read_otherwise(saved) is None and sides[0] == sides[1]
    size = {"image_size": sides[0]} if is_ours and sides[0] != _IMAGE_SIZE else {}
    return {**size, **arguments}, difference


def _measure_images(
    model: nn.Module,
    read: Callable[..., Any],
    dataset: str,
    arguments: Mapping[str, Any],
    batch_size: int,
    device: torch.device,
) -> _Measured:
    options = _loader_arguments(arguments, _IMAGE_ARGS, _TEXT_ARGS)
    saved = model.config.pretrained_cfg or {}
    mean, std = saved.get("mean"), saved.get("std")
    if not mean or not std:
        raise ValueError(
            "path: its config.json has no mean and std of the images it was trained on, expected both in "
            "pretrained_cfg; save it with save_image_classifier."
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
    splits = {"test": data.test} if data.validation is None else {"validation": data.validation, "test": data.test}
    metrics = {
        name: evaluate_classifier(model, evaluation_images(split, mean, std), collate_batch, batch_size, device)
        for name, split in splits.items()
    }
    return metrics, {name: len(split) for name, split in splits.items()}, data.fingerprint


def _measure_text(
    model: nn.Module,
    read: Callable[..., Any],
    target: _Target,
    dataset: str,
    arguments: Mapping[str, Any],
    batch_size: int | None,
    device: torch.device,
) -> _Measured:
    options = _loader_arguments(arguments, _TEXT_ARGS, _IMAGE_ARGS)
    tokenizer = AutoTokenizer.from_pretrained(target.tokenizer, revision=target.revision, trust_remote_code=False)
    data = read(load_text, dataset, **options)
    try:
        check_same_tokens(tokenizer, data.tokenizer)
    except ValueError as error:
        raise ValueError(
            f"dataset: the vocabulary of {dataset!r} is not that of the network, expected the same tokens in the same "
            f"order; give the data it was trained on, with its whole training split ({error})"
        ) from error
    carries = carries_state(model)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    recipe = {} if target.manifest is None else target.manifest.spec.training
    window = arguments.get("window", min(_WINDOW, positions or _WINDOW))
    streams = batch_size or recipe.get("per_device_eval_batch_size", _STREAMS)
    splits = evaluation_streams(data, carries, window, streams)
    metrics = {split: evaluate_language_model(model, text, device) for split, text in splits.items()}
    return metrics, {split: text.token_count for split, text in splits.items()}, data.fingerprint


def _is_same(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same data, which may have been read from different places."""
    if "sha256" in recorded and "sha256" in measured:
        return recorded["sha256"] == measured["sha256"]
    return recorded == measured


def _compared(
    measured: Mapping[str, Mapping[str, float]], recorded: Mapping[str, Mapping[str, Any]], tolerance: float
) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        split: {
            name: _pair(value, recorded.get(split, {}).get(name), name in recorded.get(split, {}), tolerance)
            for name, value in finite_or_none(metrics).items()
        }
        for split, metrics in measured.items()
    }


def _pair(measured: float | None, recorded: float | None, is_known: bool, tolerance: float) -> dict[str, Any]:
    difference, agrees = None, None
    if measured is not None and recorded is not None:
        # Allows rounding where the difference equals the tolerance.
        allowed = tolerance * (1 + 1e-9)
        difference, agrees = measured - recorded, math.isclose(measured, recorded, rel_tol=allowed, abs_tol=allowed)
    elif is_known:  # null in a record: not finite
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
