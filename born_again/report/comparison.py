"""Compares finished lineages: means over seeds, and differences from the teacher of the same seed with intervals.

Reads lineage.json and the kept predictions alone; torch is not imported.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest
from born_again.lineage.predictions import (
    PREDICTIONS_NAME,
    Predictions,
    are_of_same_split,
    ensemble_predictions_name,
    item_count,
    read_predictions,
)
from born_again.lineage.spec import EXTERNAL, data_differences
from born_again.lineage.status import lineages_in
from born_again.report.experiments import TEACHER, experiment_names, spec_fields, teacher_experiments, unequal_compute
from born_again.report.statistics import ItemBootstrap, mean_and_deviation, percentile_interval, t_interval


@dataclass(frozen=True)
class Metric:
    """A column of the comparison.

    Args:
        title: of the column.
        split: of the metrics.
        name: of the metric.
        factor: that it is shown times.
        decimals: shown.
        is_higher_better: whether a larger value is better.
    """

    title: str
    split: str
    name: str
    factor: float
    decimals: int
    is_higher_better: bool = False


# The first of a task is the one that the figure shows.
METRICS = (
    Metric("accuracy", "test", "accuracy", 100, 2, True),
    Metric("test ppl", "test", "perplexity", 1, 2),
    Metric("NLL", "test", "nll", 1, 4),
    Metric("ECE", "test", "ece", 100, 2),
    Metric("valid. accuracy", "validation", "accuracy", 100, 2, True),
    Metric("valid. ppl", "validation", "perplexity", 1, 2),
)
_FEW = 3
_LISTED = 3  # paths in a note
_NETWORK = re.compile("gen[0-9]{1,6}|ensemble")


@dataclass
class _Run:
    """One evaluated network: a generation or an ensemble of one lineage."""

    lineage: _Lineage
    metrics: Mapping[str, Mapping[str, float | None]]
    weights: str | tuple[str, ...]
    seconds: float | None
    path: Path  # of its predictions
    objective: str | None = None
    reference: _Run | None = None

    def value(self, metric: Metric) -> float | None:
        return self.metrics.get(metric.split, {}).get(metric.name)


@dataclass
class _Lineage:
    """A lineage, and its runs by the row that they belong to: ("generation", 2), ("ensemble", (1, 2))."""

    folder: Path
    content: Mapping[str, Any]
    fields: dict[str, Any]  # of the spec, those that make an experiment, and the experiment of the teacher
    seed: int
    runs: dict[tuple[str, Any], _Run] = field(default_factory=dict)

    @property
    def generations(self) -> list[tuple[int, _Run]]:
        return [(key, run) for (kind, key), run in self.runs.items() if kind == "generation"]

    @property
    def students(self) -> list[tuple[int, _Run]]:
        return [(index, run) for index, run in self.generations if index and self.fields.get("control") is None]


@dataclass
class _Row:
    experiment: str
    network: str
    runs: list[_Run]
    short_name: str | None = None  # of the experiment, if no other row has it


def compare_lineages(
    folders: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    select_on_validation: bool = False,
    allow_unfinished: bool = False,
) -> dict[str, Any]:
    """Compares lineages that were trained and tested on the same data.

    A row is a generation or an ensemble of all lineages that differ by nothing but their seed. Their
    teachers have to be of one experiment too; one trained elsewhere is of the experiment of its own lineage, which is
    found if it is compared or beside the teacher's folder, and of none but its weights otherwise. The weights of every
    generation are those of its record, after the last step (or, with load_best_model_at_end, those that were best on
    validation): no generation is chosen by its test metrics. Differences are paired by seed: each network with
    generation 0 of its own lineage, or, for a lineage without students, with the generation 0 that taught the students
    of the same seed.

    Args:
        folders: of lineages; a folder with seedN stands for the lineages in it.
        against: a folder of the same kind, whose last generation of the same seed takes the place of the teacher;
            another network of it with /gen1 or /ensemble (that of the most members) at the end.
        select_on_validation: adds a row of the student that was best on the validation split, lineage by lineage.
        allow_unfinished: takes the finished generations of unfinished lineages, instead of refusing these.

    Returns:
        JSON values:
            data: the fingerprint's rows, or tokens of a text, by split. against: what differences are taken from.
            metrics: a list of the fields of `Metric`, for display; values are unscaled.
            rows: a list of experiment, network, runs (their number), seeds, seconds (mean of the training, None where
                it is not known), and metrics: {title: {values, mean, deviation, difference}}, where deviation is the
                sample standard deviation and difference is None or {values, mean, runs, t, items}: runs those with a
                reference, t the 95 % interval over runs, items that over resampled test items for these networks, None
                where it cannot be given.
            notes: sentences on what the numbers cannot say.

    Raises:
        FileNotFoundError: a folder without a lineage.
        LineageError: an unfinished lineage, other data, two lineages of one experiment and seed, or files that cannot
            be read.
        ValueError: no folders, or select_on_validation without a validation split.
    """
    if not folders:
        raise ValueError("folders: got none, expected those of one or more lineages.")
    paths = [path for folder in folders for path in lineages_in(folder)]
    reference, network = _network_of(against)
    references = [] if reference is None else lineages_in(reference)
    resolved = {path.resolve() for path in paths}
    # Of a folder with several seeds the lineages that are compared; all if none of them is.
    references = [path for path in references if path.resolve() in resolved] or references
    extra = [path for path in references if path.resolve() not in resolved]
    lineages, notes = _read_all([*paths, *extra], allow_unfinished)
    _check_data(lineages)
    _set_teachers(lineages)
    _check_seeds(lineages)
    if against is None:
        _pair_with_teachers(lineages)
    else:
        notes += _pair_with(network, lineages, {path.resolve() for path in references}, against)
    rows = _rows(lineages, select_on_validation)
    metrics = [metric for metric in METRICS if any(run.value(metric) is not None for row in rows for run in row.runs)]
    bootstrap = _Bootstrap()
    described = [_described(row, metrics, bootstrap) for row in rows]
    data = lineages[0].content["data"]
    what = "the teacher" if against is None else f"{network or 'the last generation'} of {reference}"
    return {
        "data": data.get("rows", data.get("tokens")),
        "against": f"{what} of the same seed",
        "metrics": [dataclasses.asdict(metric) for metric in metrics],
        "rows": described,
        "notes": [*notes, *bootstrap.notes, *_notes(described, lineages)],
    }


# ---- Reading and checking ----


def _read_all(paths: Sequence[Path], allow_unfinished: bool) -> tuple[list[_Lineage], list[str]]:
    unfinished, lineages, notes = [], [], []
    for path in paths:
        try:
            manifest = Manifest.read(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"folders: {path} has no {MANIFEST_NAME}, expected the folder of a lineage, or one with a seedN for "
                "each seed; check the spelling."
            ) from error
        count = manifest.spec.generations + 1
        finished = sum(record["status"] == "finished" for record in manifest.generations)
        if finished < count:
            unfinished.append(f"{path} ({finished} of {count} generations)")
        if finished:
            lineages.append(_lineage(path, manifest))
        else:
            notes.append(f"{path} has no finished generation and is left out.")
    if unfinished and not allow_unfinished:
        raise LineageError(
            f"folders: not finished: {', '.join(unfinished)}; expected finished lineages, since a comparison of what "
            "happens to be finished can mislead. Run their commands again, or give --allow_unfinished."
        )
    if not lineages:
        raise LineageError("folders: no lineage has a finished generation, so there is nothing to compare yet.")
    if unfinished:
        notes.insert(0, f"Not finished: {', '.join(unfinished)}.")
    return lineages, notes


def _lineage(path: Path, manifest: Manifest) -> _Lineage:
    spec = manifest.spec
    found = _Lineage(path, manifest.content, spec_fields(spec), spec.seed)
    for record in manifest.generations:
        if record["status"] == "finished":
            is_external = record["objective"] == EXTERNAL
            found.runs["generation", record["index"]] = _Run(
                found,
                record["metrics"],
                record["weights_sha256"],
                None if is_external else record["seconds"],
                path / f"gen{record['index']}" / PREDICTIONS_NAME,
                record["objective"],
            )
    for record in manifest.content.get("ensembles", []):
        if record["metrics"]:
            members = tuple(record["members"])
            found.runs["ensemble", members] = _Run(
                found,
                record["metrics"],
                tuple(record["weights_sha256"]),
                None,
                path / "ensemble" / ensemble_predictions_name(members),
            )
    return found


def _check_data(lineages: Sequence[_Lineage]) -> None:
    first = lineages[0]
    for other in lineages[1:]:
        if changed := data_differences(other.content["data"], first.content["data"]):
            raise LineageError(
                f"folders: {other.folder} and {first.folder} were not trained and tested on the same data (other "
                f"{', '.join(changed)}); expected the same training, validation and test items; compare them apart."
            )


def _set_teachers(lineages: Sequence[_Lineage]) -> None:
    """Adds the experiment of the teacher to the fields: with other teachers it is another experiment."""
    found = teacher_experiments([(own.folder, own.content) for own in lineages])
    for lineage, experiment in zip(lineages, found, strict=True):
        lineage.fields[TEACHER] = experiment
    experiments: dict[str, list[list[_Lineage]]] = {}
    beside = Counter(own.folder.parent for own in lineages)
    # Those with teachers of their own first, then those of most seeds, so that the others are what is set apart.
    for lineage in sorted(lineages, key=lambda own: (_is_taken(own), -beside[own.folder.parent])):
        groups = experiments.setdefault(json.dumps(lineage.fields, sort_keys=True), [[]])
        free = [group for group in groups if not any(_has_other_teacher(lineage, own) for own in group)]
        if not free:  # several teachers for one seed: seeds alone do not tell these apart
            groups.append([])
            free = groups[-1:]
        weights = lineage.runs["generation", 0].weights
        nearness = [
            (
                any(own.folder.parent == lineage.folder.parent for own in group),
                any(own.runs["generation", 0].weights == weights for own in group),
            )
            for group in free
        ]
        free[nearness.index(max(nearness))].append(lineage)
    for groups in experiments.values():
        for place, group in enumerate(groups[1:], 1):
            for lineage in group:
                lineage.fields[TEACHER] = f"{place} {lineage.fields[TEACHER]}"


def _is_taken(lineage: _Lineage) -> bool:
    """Whether its generation 0 was trained elsewhere."""
    return lineage.runs["generation", 0].objective == EXTERNAL


def _has_other_teacher(one: _Lineage, other: _Lineage) -> bool:
    """Whether two lineages of one seed have different teachers, of which one was trained elsewhere."""
    first, second = (own.runs["generation", 0].weights for own in (one, other))
    return one.seed == other.seed and first != second and (_is_taken(one) or _is_taken(other))


def _check_seeds(lineages: Sequence[_Lineage]) -> None:
    for index, one in enumerate(lineages):
        for other in lineages[:index]:
            if (one.fields, one.seed) == (other.fields, other.seed):
                raise LineageError(
                    f"folders: {other.folder} and {one.folder} are the same experiment with the same seed "
                    f"{one.seed}, expected each seed once; leave one out, or train it with another --seed."
                )


# ---- Pairing ----


def _pair_with_teachers(lineages: Sequence[_Lineage]) -> None:
    teachers: dict[int, dict[Any, _Run]] = {}  # by seed, then by weights
    for lineage in lineages:
        first = lineage.runs.get(("generation", 0))
        if lineage.students and first is not None:
            teachers.setdefault(lineage.seed, {})[first.weights] = first
            for key, run in lineage.runs.items():
                run.reference = None if key == ("generation", 0) else first
    for lineage in lineages:
        candidates = list(teachers.get(lineage.seed, {}).values())
        if not lineage.students and len(candidates) == 1:  # of several teachers none is the teacher
            for run in lineage.runs.values():
                run.reference = None if run.weights == candidates[0].weights else candidates[0]


def _network_of(against: str | Path | None) -> tuple[Path | None, str | None]:
    """The folder of lineages, and gen1 or ensemble where the path ends so."""
    if against is None:
        return None, None
    path = Path(against)
    return (path.parent, path.name) if _NETWORK.fullmatch(path.name) else (path, None)


def _pair_with(
    network: str | None, lineages: Sequence[_Lineage], references: set[Path], against: str | Path
) -> list[str]:
    """Sets the references; a note where some lineages have none."""
    by_seed = {own.seed: _reference(network, own) for own in lineages if own.folder.resolve() in references}
    for lineage in lineages:
        for run in lineage.runs.values():
            reference = by_seed.get(lineage.seed)
            run.reference = None if reference is None or reference.weights == run.weights else reference
    others = [own for own in lineages if own.folder.resolve() not in references]
    alone = [f"{own.folder} (seed {own.seed})" for own in others if own.seed not in by_seed]
    seeds = ", ".join(map(str, sorted(by_seed)))
    if others and len(alone) == len(others):
        raise LineageError(
            f"against: {against} has no lineage of the same seed as {', '.join(alone)}, expected one, since "
            f"differences are paired by seed, got seeds {seeds}; train it with the same "
            "--seeds, or leave --against out."
        )
    if not alone:
        return []
    return [
        f"Without a reference of the same seed, and so in no difference: {', '.join(alone)}; the reference has seeds "
        f"{seeds}."
    ]


def _reference(network: str | None, lineage: _Lineage) -> _Run:
    ensembles = [(len(key), run) for (kind, key), run in lineage.runs.items() if kind == "ensemble"]
    found = None
    if network is None:
        found = lineage.generations[-1][1]
    elif network == "ensemble" and ensembles:
        found = max(ensembles, key=lambda own: own[0])[1]
    elif network != "ensemble":
        found = lineage.runs.get(("generation", int(network.removeprefix("gen"))))
    if found is None:
        raise LineageError(
            f"against: {lineage.folder} has no finished {network}, expected one; give another network of it, or the "
            "folder alone for its last generation."
        )
    return found


# ---- Rows ----


def _rows(lineages: Sequence[_Lineage], select_on_validation: bool) -> list[_Row]:
    groups: list[list[_Lineage]] = []
    for lineage in lineages:
        own = next((group for group in groups if group[0].fields == lineage.fields), None)
        if own is None:
            groups.append(own := [])
        own.append(lineage)
    names = experiment_names([group[0].fields for group in groups], [_teacher_of(group) for group in groups])
    firsts: list[_Row] = []
    later: list[_Row] = []
    for name, group in zip(names, groups, strict=True):
        has_students = any(lineage.students for lineage in group)
        keys = sorted({key for lineage in group for key in lineage.runs}, key=lambda key: (key[0] == "ensemble", key))
        for key in keys:
            runs = [lineage.runs[key] for lineage in group if key in lineage.runs]
            if key == ("generation", 0):
                # The objective of its students does not affect it.
                first = _Row(name, "generation 0", runs, runs[0].objective if has_students else name)
                if not _merged(firsts, first):
                    firsts.append(first)
            else:
                later.append(_Row(name, _network_name(*key, group[0]), runs))
        if select_on_validation and has_students:
            later.append(_Row(name, "best on validation", [_best(lineage) for lineage in group if lineage.students]))
    short = Counter(row.short_name for row in firsts)
    for row in firsts:
        row.runs = list({run.weights: run for run in reversed(row.runs)}.values())[::-1]  # one teacher of all seeds
        if row.short_name is not None and short[row.short_name] == 1:
            row.experiment = row.short_name
    return [*firsts, *later]


def _teacher_of(group: Sequence[_Lineage]) -> tuple[str | None, str]:
    """The path of the teacher and its weights, of the first lineage that takes one."""
    taken = [own for own in group if own.content["spec"].get("teacher") is not None] or group
    first = taken[0].runs["generation", 0].weights
    return taken[0].content["spec"].get("teacher"), first if isinstance(first, str) else first[0]


def _merged(rows: Sequence[_Row], other: _Row) -> bool:
    """Adds networks to a row that has the same weights for a seed, such as one teacher of several objectives."""
    runs = other.runs
    for row in rows:
        known = {run.lineage.seed: run for run in row.runs}
        shared = [run for run in runs if run.lineage.seed in known]
        if not shared or any(known[run.lineage.seed].weights != run.weights for run in shared):
            continue
        for run in runs:
            if run.lineage.seed not in known:
                row.runs.append(run)
            elif known[run.lineage.seed].seconds is None:  # taken from elsewhere, while this one was trained here
                row.runs[row.runs.index(known[run.lineage.seed])] = run
        if row.short_name == EXTERNAL:  # where it was trained says what it is
            row.experiment, row.short_name = other.experiment, other.short_name
        return True
    return False


def _network_name(kind: str, key: Any, lineage: _Lineage) -> str:
    if kind == "ensemble":
        return f"mean of {', '.join(map(str, key))}"
    return f"run {key}" if lineage.fields.get("control") is not None else f"generation {key}"


def _best(lineage: _Lineage) -> _Run:
    for metric in METRICS:
        if metric.split == "validation" and all(run.value(metric) is not None for _, run in lineage.students):
            sign = 1 if metric.is_higher_better else -1
            return max((run for _, run in lineage.students), key=lambda run: sign * (run.value(metric) or 0.0))
    raise ValueError(
        f"select_on_validation: {lineage.folder} has no metrics on a validation split, expected some; train with "
        "--validation_fraction 0.1, or leave it out: selecting by the test split would report a gain that is none."
    )


# ---- Numbers ----


class _Bootstrap:
    """Resampled metrics of runs, computed once for each."""

    def __init__(self) -> None:
        self._by_size: dict[int, ItemBootstrap] = {}
        self._predictions: dict[Path, dict[str, Predictions]] = {}
        self._metrics: dict[tuple[Path, str], dict[str, np.ndarray]] = {}
        self._problems: dict[str, None] = {}  # in order, each once
        self._missing: dict[Path, None] = {}

    def difference(self, pairs: Sequence[tuple[_Run, _Run]], metric: Metric) -> tuple[float, float] | None:
        """The interval of the mean difference over the pairs; None where predictions are missing."""
        for ours, theirs in pairs:
            one, other = self._read(ours, metric), self._read(theirs, metric)
            if one is not None and other is not None and not are_of_same_split(one, other):
                self._problems[
                    f"No interval over items of {ours.path} beside {theirs.path}: they hold predictions of other "
                    "items, or of blocks of other lengths, as another --window makes them."
                ] = None
                return None
        sampled = [(self._sampled(ours, metric), self._sampled(theirs, metric)) for ours, theirs in pairs]
        if any(one is None or other is None for one, other in sampled):
            return None
        with np.errstate(invalid="ignore"):
            return percentile_interval(np.mean([one - other for one, other in sampled], axis=0))  # type: ignore

    @property
    def notes(self) -> list[str]:
        """What is left out of the intervals, and why; nothing where no predictions at all are kept."""
        missing = [str(path) for path in self._missing]
        if not missing or len(missing) == len(self._predictions):
            return list(self._problems)
        listed = ", ".join(missing[:_LISTED]) + (f" and {rest} more" if (rest := len(missing) - _LISTED) > 0 else "")
        return [*self._problems, f"Left out of the intervals over items, missing or of other weights: {listed}."]

    def _read(self, run: _Run, metric: Metric) -> Predictions | None:
        if run.path not in self._predictions:
            try:
                self._predictions[run.path] = read_predictions(run.path, run.weights)
                if not self._predictions[run.path]:
                    self._missing[run.path] = None
            except LineageError as error:
                self._predictions[run.path] = {}
                self._problems[f"Left out of the intervals over items: {error}"] = None
        return self._predictions[run.path].get(metric.split)

    def _sampled(self, run: _Run, metric: Metric) -> np.ndarray | None:
        own = self._read(run, metric)
        if own is None:
            return None
        if (run.path, metric.split) not in self._metrics:
            items = item_count(own)
            if items not in self._by_size:
                self._by_size[items] = ItemBootstrap(items)
            self._metrics[run.path, metric.split] = self._by_size[items].metrics(own)
        return self._metrics[run.path, metric.split].get(metric.name)


def _described(row: _Row, metrics: Sequence[Metric], bootstrap: _Bootstrap) -> dict[str, Any]:
    seconds = [run.seconds for run in row.runs if run.seconds is not None]
    return {
        "experiment": row.experiment,
        "network": row.network,
        "runs": len(row.runs),
        "seeds": [run.lineage.seed for run in row.runs],
        "seconds": mean_and_deviation(seconds)[0] if seconds else None,
        "metrics": {metric.title: _values(row, metric, bootstrap) for metric in metrics},
    }


def _values(row: _Row, metric: Metric, bootstrap: _Bootstrap) -> dict[str, Any]:
    values = [run.value(metric) for run in row.runs]
    known = [value for value in values if value is not None]
    # A number that is not finite, null in the record, has no mean.
    mean, deviation = mean_and_deviation(known) if known and len(known) == len(values) else (None, None)
    pairs = [(run, run.reference) for run in row.runs if run.reference is not None]
    differences = [
        ours - theirs
        for run, reference in pairs
        if (ours := run.value(metric)) is not None and (theirs := reference.value(metric)) is not None
    ]
    difference = None
    if differences and len(differences) == len(pairs):
        difference = {
            "values": differences,
            "mean": mean_and_deviation(differences)[0],
            "runs": len(differences),
            "t": t_interval(differences),
            "items": bootstrap.difference(pairs, metric),
        }
    return {"values": values, "mean": mean, "deviation": deviation, "difference": difference}


def _notes(rows: Sequence[Mapping[str, Any]], lineages: Sequence[_Lineage]) -> list[str]:
    notes = []
    fewest = min(row["runs"] for row in rows)
    if fewest == 1:
        which = sorted({row["experiment"] for row in rows if row["runs"] == 1})
        notes.append(
            f"One run only ({'; '.join(which)}): it has no spread and no interval over runs, so nothing can be said "
            f"about other seeds; train {_FEW} or more with --seeds."
        )
    if any(1 < row["runs"] < _FEW for row in rows):
        notes.append(
            f"Fewer than {_FEW} runs: the interval over runs is very wide, and says little; train more with --seeds."
        )
    if unknown := [own for own in lineages if _is_apart(own, lineages)]:
        notes.append(
            f"The lineages of the teachers of {', '.join(str(own.folder) for own in unknown)} are not found, so it is "
            "not known whether they are of one experiment: each teacher has rows of its own. Give their lineages too."
        )
    teachers, others = _shared(lineages)
    if teachers:
        notes.append(
            "Lineages of the same experiment have the same teacher, so the intervals over runs say nothing about "
            "other teachers; --teacher 'DIR/seed{seed}/gen0' takes one for each seed."
        )
    if others:
        notes.append(
            f"Networks that are in more than one lineage of the same experiment: {others}; these lineages are not "
            "independent: generation k of seed s has seed s + k. Give seeds further apart, such as --seeds 0 10 20."
        )
    stopped = [str(own.folder) for own in lineages if "stopped_when_worse" in own.content]
    if stopped:
        notes.append(
            f"--stop_when_worse ended {', '.join(stopped)} early: the rows after that hold the other lineages alone, "
            "which is biased in their favour."
        )
    notes += unequal_compute([own.content for own in lineages])
    if any(own.content["spec"]["training"].get("load_best_model_at_end") for own in lineages):
        notes.append("Weights are those of the epoch that was best on the validation split, not of the last one.")
    return notes


def _is_apart(own: _Lineage, lineages: Sequence[_Lineage]) -> bool:
    """Whether a lineage is another experiment only since nothing but the weights of its teacher is known."""
    if own.fields[TEACHER] != own.runs["generation", 0].weights:
        return False
    return any(
        {**other.fields, TEACHER: None} == {**own.fields, TEACHER: None} and other.fields != own.fields
        for other in lineages
    )


def _shared(lineages: Sequence[_Lineage]) -> tuple[int, int]:
    """The numbers of networks that lineages of one experiment share: those that one took from elsewhere, others."""
    owners: dict[Any, list[_Run]] = {}
    for lineage in lineages:
        for _, run in lineage.generations:
            owners.setdefault(run.weights, []).append(run)
    counts = Counter()
    for own in owners.values():
        pairs = [
            (one, other)
            for index, one in enumerate(own)
            for other in own[:index]
            if one.lineage.fields == other.lineage.fields
        ]
        if pairs:
            counts[any(EXTERNAL in (one.objective, other.objective) for one, other in pairs)] += 1
    return counts[True], counts[False]
