"""The specification of a lineage, frozen and hashable."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# May change without making another lineage: more generations continue the existing ones.
_MAY_CHANGE = ("generations",)
# Fields that earlier versions did not have, and their defaults: a spec without them keeps its hash.
_LATER: dict[str, Any] = {
    "student_model": None,
    "student_model_args": {},
    "share_teacher_ends": False,
    "control": None,
    "control_generations": None,
    "task": None,
    "starting_point": None,
}
# What a lineage is compared with: one run on labels as long as the whole lineage, or independent runs on labels.
CONTROLS = ("equal-compute", "seeds")
TEACHER_OBJECTIVE = "label"
# Where data is found and how it is read; ignored where the data itself is the same. Fields of a spec, then fields of a
# fingerprint.
DATA_SOURCE = frozenset(
    {"dataset"}
    | {
        f"data_args.{name}"
        for name in (
            "dataset_revision image_column label_column text_column max_train_samples max_eval_samples".split()
        )
    }
)
_FINGERPRINT_SOURCE = frozenset("source revision image_column label_column text_column test_split label_names".split())
# Recorded for information only, or compared by `Lineage`; earlier versions did not.
_INFORMATIVE = frozenset({"coverage", "begun_with"})
# The objective of a teacher that was trained elsewhere, which is not known.
EXTERNAL = "external"
# Begins the name of a function that was the objective, see born_again.training.item_losses.
CUSTOM = "custom: "
# Folders and repositories are named after a lineage, so a name must not be a path.
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,89}")


@dataclass(frozen=True)
class LineageSpec:
    """The experiment: architecture, data, objective, seed and recipe. Two equal specs train equal weights.

    Args:
        name: of the lineage, such as "densenet-cifar100"; generation K is called NAME-genK. Letters, digits, ".", "_"
            and "-", at most 90 of them.
        model: of the architecture of generation 0, and of its students unless student_model names another.
        dataset: what it is trained on, as the user wrote it.
        generations: students after the teacher, 0 or more.
        objective: the loss that students are trained with; of a function of your own "custom: module.qualname".
        seed: of generation 0; generation k has seed + k.
        model_args: of the architecture, JSON-able.
        data_args: of the dataset (columns, limits), JSON-able.
        training: training arguments that affect the weights, JSON-able.
        teacher: folder or Hub repository of a network trained elsewhere, which generation 0 is a copy of; None trains
            generation 0 on labels.
        teacher_revision: branch, tag or commit of that repository.
        student_model: of the architecture of every student, None for that of generation 0.
        student_model_args: of the students' architecture, JSON-able; with student_model only.
        share_teacher_ends: whether students have their teacher's first convolution and classifier, frozen.
        control: "equal-compute", one training on labels that is as long as those of a lineage together; "seeds",
            independent trainings on labels, `generations` after the first, none of which teaches another; None is a
            lineage.
        control_generations: of "equal-compute", the students of the lineage that it is as long as.
        task: as the Hub names it, such as "text-classification"; None where the architecture tells.
        starting_point: of the pretrained weights that every generation starts from, folder or Hub id; None where
            they are trained from scratch.

    Raises:
        ValueError: generations below 0, an empty text, a name with other characters, student_model_args without
            student_model, values that are not JSON-able, an unknown control, or one with a teacher, with what students
            alone have, with an objective other than "label", or of "equal-compute" with students.

    Example:
        >>> spec = LineageSpec("mine", model="wide_resnet16_1_cifar", dataset="digits", generations=2, seed=10)
        >>> [(spec.seed_of(generation), spec.objective_of(generation)) for generation in range(3)]
        [(10, 'label'), (11, 'ban'), (12, 'ban')]
        >>> more = dataclasses.replace(spec, generations=5)  # goes on with the same lineage
        >>> more.sha256() == spec.sha256()
        True
    """

    name: str
    model: str
    dataset: str
    generations: int = 3
    objective: str = "ban"
    seed: int = 42
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data_args: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    teacher_revision: str | None = None
    student_model: str | None = None
    student_model_args: Mapping[str, Any] = field(default_factory=dict)
    share_teacher_ends: bool = False
    control: str | None = None
    control_generations: int | None = None
    task: str | None = None
    starting_point: str | None = None

    def __post_init__(self) -> None:
        for name in ("name", "model", "dataset", "objective"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a text that is not empty.")
        for name in ("teacher", "teacher_revision", "student_model", "task", "starting_point"):
            if getattr(self, name) is not None and not (isinstance(getattr(self, name), str) and getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a text that is not empty, or None.")
        if self.teacher_revision is not None and self.teacher is None:
            raise ValueError(
                f"teacher_revision: got {self.teacher_revision!r} without a teacher, expected that of its repository; "
                "give the teacher too, or leave it out."
            )
        if self.student_model_args and self.student_model is None:
            raise ValueError(
                f"student_model_args: got {dict(self.student_model_args)!r} without a student_model, expected the "
                "architecture that they are of; give it too, or leave them out."
            )
        if not isinstance(self.share_teacher_ends, bool):
            raise ValueError(f"share_teacher_ends: got {self.share_teacher_ends!r}, expected True or False.")
        if not _PLAIN_NAME.fullmatch(self.name):
            raise ValueError(
                f"name: got {self.name!r}, expected at most 90 letters, digits, '.', '_' and '-', since repositories "
                "are named after it; give a plain name, without a path."
            )
        for name in ("generations", "seed"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a whole number.")
        if self.generations < 0:
            raise ValueError(
                f"generations: got {self.generations}, expected 0 or more students after the teacher; 0 trains the "
                "teacher alone."
            )
        for name in ("model_args", "data_args", "training", "student_model_args"):
            try:
                copy = json.loads(json.dumps(dict(getattr(self, name)), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: expected a mapping of JSON values, but {error}.") from error
            object.__setattr__(self, name, copy)

        self._check_control()

    def _check_control(self) -> None:
        if self.control is None:
            if self.control_generations is not None:
                raise ValueError(
                    f"control_generations: got {self.control_generations!r} without a control, expected "
                    "control='equal-compute' beside it; leave it out."
                )
            return
        if self.control not in CONTROLS:
            near = difflib.get_close_matches(str(self.control), CONTROLS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"control: got {self.control!r}, expected {' or '.join(map(repr, CONTROLS))}{hint}")
        if self.teacher is not None or self.objective != TEACHER_OBJECTIVE:
            raise ValueError(
                f"control: got {self.control!r} with teacher {self.teacher!r} and objective {self.objective!r}, "
                f"expected no teacher and {TEACHER_OBJECTIVE!r}, since a control is trained on labels alone."
            )
        if self.student_model is not None or self.share_teacher_ends:
            raise ValueError(
                f"control: got {self.control!r} with student_model {self.student_model!r} and share_teacher_ends "
                f"{self.share_teacher_ends}, expected neither, since there are no students; give their architecture "
                "as model."
            )
        if self.control == "equal-compute" and self.generations:
            raise ValueError(
                f"generations: got {self.generations} with control 'equal-compute', expected 0, since it is one "
                "training; control_generations says how long the lineage is that it is compared with."
            )

    def parent_of(self, generation: int) -> int | None:
        """The generation that teaches one; None for what is trained on labels."""
        return None if generation == 0 or self.control is not None else generation - 1

    @property
    def has_students(self) -> bool:
        """Whether any generation is taught by another."""
        return self.parent_of(self.generations) is not None

    def seed_of(self, generation: int) -> int:
        """The seed of one generation, which depends on nothing that ran before."""
        return self.seed + generation

    def objective_of(self, generation: int) -> str:
        """The objective of one generation: "label", "external" (trained elsewhere), or the students' objective."""
        if generation == 0:
            return TEACHER_OBJECTIVE if self.teacher is None else EXTERNAL
        return self.objective

    def model_of(self, generation: int) -> str:
        """The architecture of one generation."""
        return self.student_model if generation and self.student_model is not None else self.model

    def model_args_of(self, generation: int) -> Mapping[str, Any]:
        """The arguments of one generation's architecture."""
        return self.student_model_args if generation and self.student_model is not None else self.model_args

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values, without the later fields that are at their defaults."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LineageSpec:
        """The spec written by `to_dict`.

        Raises:
            ValueError: a field is missing or unknown, or has no valid value.
        """
        known = {entry.name: entry for entry in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"spec: got the unknown field {name!r:.80}" + (f"; did you mean {near[0]!r}?" if near else ".")
                )
        for name in ("name", "model", "dataset"):
            if name not in values:
                raise ValueError(f"spec: the field {name!r} is missing.")
        return cls(**values)

    def sha256(self) -> str:
        """SHA-256 of everything that affects the weights; the number of generations is left out."""
        return spec_sha256(self.to_dict())

    def differences(self, other: LineageSpec, ignored: Collection[str] = ()) -> list[str]:
        """The fields in which two specs differ, a line each: "seed: 43 here, 42 there".

        Args:
            other: spec "there".
            ignored: fields that may differ, such as those of `DATA_SOURCE` where the data is known to be the same.
        """
        here, there = flat_spec(self), flat_spec(other)
        return [
            f"{name}: {here.get(name, 'default')!r} here, {there.get(name, 'default')!r} there"
            for name in sorted({*here, *there})
            if name not in (*_MAY_CHANGE, *ignored) and here.get(name, _flatten) != there.get(name, _flatten)
        ]


def spec_sha256(values: Mapping[str, Any]) -> str:
    """The hash of a spec from its JSON values, as `LineageSpec.to_dict` gives them."""
    kept = {name: value for name, value in values.items() if name not in _MAY_CHANGE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def flat_spec(spec: LineageSpec) -> dict[str, Any]:
    """The fields of a spec by their path, such as "training.learning_rate", those of earlier versions by today's."""
    return _current_names(dict(_flatten(spec.to_dict())))


def data_differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """The names of the fields in which two fingerprints show different data.

    If both have the same "sha256", only fields that both have are compared, and those that say where the data was read
    are ignored. "coverage" is never compared.

    Args:
        here: JSON-able, as `load_images` and `load_text` give it, or a user's own.
        there: likewise.
    """
    names = {*here, *there} - _INFORMATIVE
    if here.get("sha256") is not None and here.get("sha256") == there.get("sha256"):
        names = names & {*here} & {*there} - _FINGERPRINT_SOURCE
    return sorted(name for name in names if here.get(name) != there.get(name))


def plain_name(text: str) -> str:
    """The name of a lineage made from any text: "wide-resnet-my data" becomes "wide-resnet-my-data"."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-")[:90].rstrip(".-")


def _current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Flat values of a spec, those recorded under a name that an earlier version had under today's."""
    if "training.loss_form" not in values:
        return values
    form = values["training.loss_form"]
    renamed = {"training.loss_implementation": "full" if form == "plain" else form, **values}
    return {name: value for name, value in renamed.items() if name != "training.loss_form"}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
