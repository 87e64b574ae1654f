"""What makes lineages one experiment: their specs without the seed, and what their teachers are; and their names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from born_again.lineage.manifest import LineageError, Manifest
from born_again.lineage.spec import DATA_SOURCE, EXTERNAL, TEACHER_OBJECTIVE, LineageSpec, flat_spec

# The field of the teacher's experiment, beside those of the spec.
TEACHER = "teacher"
# Do not make another experiment: which run it is, where it and its data are, how many generations there are.
_NOT_COMPARED = frozenset({"name", "seed", "generations", "teacher", "teacher_revision"})
# What students alone read: a teacher is the same without them.
_OF_STUDENTS = frozenset(
    {"objective", "student_model", "student_model_args", "share_teacher_ends", "control", "control_generations"}
    | {
        f"training.{name}"
        for name in "temperature label_weight permutation teacher_annealing teacher_precision".split()
    }
)
# An equal-compute control has these times the number of generations that it is as long as.
_LENGTHS = ("training.num_train_epochs", "training.max_steps", "training.warmup_steps")
_NAMED_APART = frozenset({"objective", "control", "control_generations", TEACHER})
# Teachers whose own teachers were trained elsewhere, and so on, are followed so far.
_MOST_LINEAGES = 32

_Content = Mapping[str, Any]


def spec_fields(spec: LineageSpec) -> dict[str, Any]:
    """The fields of a spec that make an experiment, by their path; without the teacher."""
    fields = {name: value for name, value in flat_spec(spec).items() if name not in (*_NOT_COMPARED, *DATA_SOURCE)}
    if not spec.generations:
        fields["objective"] = TEACHER_OBJECTIVE  # that of students it does not have
    return fields


def teacher_experiments(lineages: Sequence[tuple[Path, _Content]]) -> list[str | None]:
    """Of each lineage the experiment that its generation 0 is of, as text; None for one without students.

    The lineage of a teacher trained elsewhere is looked for by the hash of its weights, among these lineages and
    beside the folder of the teacher. Where it is not found the hash stands for it.

    Args:
        lineages: folder and content of lineage.json.
    """
    found = [
        (record["index"], content["spec"].get("control") is not None, place)
        for place, (_, content) in enumerate(lineages)
        for record in content["generations"]
        if record["status"] == "finished" and record["objective"] != EXTERNAL
    ]
    trained: dict[str, tuple[_Content, int]] = {}
    for index, _, place in sorted(found):  # of equal weights generation 0, rather than a run of a control
        content = lineages[place][1]
        trained.setdefault(content["generations"][index]["weights_sha256"], (content, index))
    return [
        _experiment(content, 0, trained, _MOST_LINEAGES)
        if content["spec"].get("generations") and content["spec"].get("control") is None
        else None
        for _, content in lineages
    ]


def _experiment(content: _Content, index: int, trained: Mapping[str, tuple[_Content, int]], left: int) -> str:
    """The experiment of one generation: spec, place and teacher, or its hash."""
    record = content["generations"][index]
    if record["objective"] == EXTERNAL:
        weights = record["weights_sha256"]
        found = trained.get(weights) or _beside(content["spec"].get("teacher"), weights)
        return weights if found is None or not left else _experiment(*found, trained, left - 1)
    fields = spec_fields(LineageSpec.from_dict(content["spec"]))
    if index == 0:
        own = {
            name: value
            for name, value in fields.items()
            if name not in _OF_STUDENTS and name.partition(".")[0] not in _OF_STUDENTS
        }
        return json.dumps([0, own])
    own = None if content["spec"].get("control") else _experiment(content, 0, trained, left)
    return json.dumps([index, fields, own])


def _beside(teacher: str | None, weights: str) -> tuple[_Content, int] | None:
    """The lineage of a teacher's folder, and the generation with these weights; None where there is none."""
    try:
        content = Manifest.read(Path(teacher or "").resolve().parent).content
    except (LineageError, OSError, ValueError):
        return None
    for record in content["generations"]:
        if record["status"] == "finished" and record["weights_sha256"] == weights:
            return content, record["index"]
    return None


# ---- Names ----


def experiment_names(fields: Sequence[Mapping[str, Any]], teachers: Sequence[tuple[str | None, str]]) -> list[str]:
    """The objective (or control) of each experiment, and the other fields in which it differs from most.

    Args:
        fields: of each experiment, with its teacher's.
        teachers: path of each teacher, None where it was trained in the lineage, and hash of its weights.
    """
    shown = [_shown_fields(own, fields) for own in fields]
    known = sorted({name for own in shown for name in own})
    usual = {}
    for name in known:
        texts = [
            json.dumps(values[name]) if name in values else ""
            for own, values in zip(fields, shown, strict=True)
            if name in values or name not in _LENGTHS or not _is_as_long(own)
        ]
        # A field that one lacks is shown of those that have it.
        usual[name] = "" if "" in texts else Counter(texts).most_common(1)[0][0]
    names = []
    for own, values in zip(fields, shown, strict=True):
        control, generations = own.get("control"), own.get("control_generations")
        parts = [own["objective"] if control is None else f"control: {control}"]
        if len({other.get("control_generations") for other in fields} - {None}) > 1 and generations is not None:
            parts[0] += f" of {generations + 1} generations"
        differing = [name for name in known if name in values and json.dumps(values[name]) != usual[name]]
        parts += [f"{name.rpartition('.')[2]} {values[name]}" for name in differing]
        names.append(", ".join(parts))
    for steps in (0, 1):  # with the path, then with the hash too
        count = Counter(names)
        for place, (path, weights) in enumerate(teachers):
            if count[names[place]] > 1 and fields[place].get(TEACHER) is not None:
                names[place] += f" ({weights[:8]})" if steps else "" if path is None else f", teacher {path}"
    return names


def _shown_fields(own: Mapping[str, Any], fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that a name may show; the length of an equal-compute control only to tell it from another one."""
    shown = {name: value for name, value in own.items() if name not in _NAMED_APART}
    if not _is_as_long(own):
        return shown
    similar = [other for other in fields if other.get("control_generations") == own["control_generations"]]
    equal = {name for name in _LENGTHS if all(other.get(name) == own.get(name) for other in similar)}
    return {name: value for name, value in shown.items() if name not in equal}


def _is_as_long(own: Mapping[str, Any]) -> bool:
    return own.get("control_generations") is not None


# ---- Compute ----


def unequal_compute(contents: Sequence[_Content]) -> list[str]:
    """Sentences on equal-compute controls and lineages that did not take the same number of steps; [] without both."""
    taken = {
        record["weights_sha256"]: record.get("steps", 0)
        for content in contents
        for record in content["generations"]
        if record["objective"] != EXTERNAL
    }
    controls: dict[int, str] = {}
    lineages: dict[int, str] = {}
    for content in contents:
        spec = content["spec"]
        steps = [taken.get(record["weights_sha256"], 0) for record in content["generations"]]
        if spec.get("control") == "equal-compute" and all(steps):
            controls[sum(steps)] = f"as long as {spec['control_generations'] + 1} generations"
        elif spec.get("control") is None and spec["generations"] and all(steps):
            lineages[sum(steps)] = f"{spec['objective']} of {len(steps)} generations"
    if not controls or not lineages or controls.keys() == lineages.keys():
        return []
    ours, theirs = (
        ", ".join(f"{count:,} ({what})" for count, what in sorted(own.items())) for own in (controls, lineages)
    )
    return [
        f"Not of equal compute: steps of the controls {ours}; of all generations of the lineages {theirs}. Compare "
        "only those of as many steps, or train a control with the flags of each lineage."
    ]
