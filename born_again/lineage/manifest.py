"""lineage.json: the specification of a lineage and the record of each generation; its schema, reading and writing."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from born_again._files import write_atomically
from born_again.lineage.spec import LineageSpec, spec_sha256

__all__ = ["MANIFEST_NAME", "LineageError", "Manifest", "file_sha256"]

MANIFEST_NAME = "lineage.json"
FORMAT = "born_again.lineage"
VERSION = 1
# Far above any lineage, and low enough that reading another file cannot exhaust memory or stack.
MAX_BYTES = 64 << 20
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1


class LineageError(RuntimeError):
    """A lineage cannot be continued: another experiment's folder, changed weights, an unreadable manifest."""


_SEED_FOLDER = re.compile(r"seed(0|[1-9][0-9]*)")


def seed_folder_name(seed: int) -> str:
    """The folder of one lineage of several seeds, in their common folder."""
    return f"seed{seed}"


def seed_folders(folder: Path) -> list[Path]:
    """The folders seedN in a folder, in the order of seeds; lineages of --seeds are there."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _SEED_FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("seed")))


def check_one_lineage(name: str, folder: str | os.PathLike[str], part: str = "") -> None:
    """Refuses a folder that holds the lineages of several seeds, where that of one is expected.

    Args:
        name: of the argument.
        folder: that it got.
        part: of a lineage that is expected, such as "gen0".

    Raises:
        FileNotFoundError: it is such a folder; names what it holds and what to give instead.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists():
        return
    if lineages := [path for path in seed_folders(folder) if (path / MANIFEST_NAME).is_file()]:
        names = [path.name for path in lineages]
        shown = names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"]
        raise FileNotFoundError(
            f"{name}: got {str(folder)!r}, which holds a lineage for each seed ({', '.join(shown)}), expected "
            f"{'one of them' if not part else 'a network of one of them'}; give {str(lineages[0] / part)!r}, for one."
        )


def is_repo_id(value: Any) -> bool:
    """Whether this is a valid Hub repository id, namespace/name, which needs no escaping anywhere."""
    from huggingface_hub.errors import HFValidationError  # imported here, since both are slow to import
    from huggingface_hub.utils import validate_repo_id

    # Some versions of the validator accept a trailing newline, and letters that are not ASCII.
    if not isinstance(value, str) or "/" not in value or not value.isascii() or value != value.strip():
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


# ---- The schema; the description of a field is what an error says was expected ----


def _values_of(kind: Any) -> AfterValidator:
    """All values of an object are of one type; stops at the first error, which pydantic does in lists only."""
    adapter = TypeAdapter(kind, config=ConfigDict(strict=True))

    def check(values: dict[str, Any]) -> dict[str, Any]:
        for value in values.values():
            adapter.validate_python(value)
        return values

    return AfterValidator(check)


_Text = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Texts = Annotated[list[str], Field(fail_fast=True)]
_Numbers = Annotated[dict[str, Any], _values_of(float | None)]
_Metrics = Annotated[dict[str, Any], _values_of(_Numbers)]
_MISSING: Any = None  # the value of a field that may be missing, but not null

_TEXT = "a text that is not empty"
_COUNT = "a whole number of 0 or more"
_NUMBERS = "an object of numbers or null"
_SHA256 = "a SHA-256 (64 of 0-9 and a-f)"
_HUB_STATE = "an object with status 'pending' or 'published', and plain texts for its repository and commit"


class _Fields(BaseModel):
    """An object in the file: values are not converted, and fields of later versions are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _HubState(_Fields):
    status: Literal["pending", "published"]
    repo: str | None = None
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    slug: str | None = None
    message: str | None = None
    card_sha256: str | None = None
    items: _Texts = []

    @model_validator(mode="after")
    def _is_somewhere(self) -> _HubState:
        # A pending one may have a name that the Hub refuses.
        if self.status == "published" and self.repo is not None and not is_repo_id(self.repo):
            raise ValueError("repo")
        return self


class _Hub(_Fields):
    namespace: _Text = Field(description=_TEXT)
    pattern: _Text = Field(description=_TEXT)
    ensemble: _HubState = Field(_MISSING, description=_HUB_STATE)
    collection: _HubState = Field(_MISSING, description=_HUB_STATE)


class _Restart(_Fields):
    from_generation: _Count


class _Stopped(_Fields):
    generations: _Count


class _Computation(_Fields):
    mixed_precision: _Text


class _ResumedOn(_Fields):
    step: _Count
    processes: _Count
    gradient_accumulation_steps: _Count
    micro_batch_size: _Count


class _Finished(_Fields):
    index: Any = Field(description="its place in the list")
    status: Literal["training", "finished"] = Field(description="'training' or 'finished'")
    weights_sha256: _Sha256 = Field(description=_SHA256)
    metrics: _Metrics = Field(description=f"{_NUMBERS}, by split")
    seed: int | None = Field(description="a whole number, or null where it is not known")
    objective: _Text = Field(description=_TEXT)
    seconds: Annotated[float, Field(ge=0)] = Field(description="a number of 0 or more")
    versions: Annotated[dict[str, Any], _values_of(str)] = Field(description="an object of texts")
    parent: Any = Field(description="the generation that taught it")
    hardware: str = Field("", description="a text")
    hub: _HubState | None = Field(None, description=f"{_HUB_STATE}, or null")
    teacher_fit: _Numbers | None = Field(None, description=_NUMBERS)
    train_fit: _Numbers | None = Field(None, description=_NUMBERS)
    nll_difference: _Numbers | None = Field(None, description=_NUMBERS)
    loss_normalization: Literal["trainer", "step"] = Field("step", description="'trainer' or 'step'")
    parameters: _Count = Field(0, description=_COUNT)
    steps: _Count = Field(0, description=_COUNT)
    checkpoints: _Texts = Field([], description="a list of texts")
    source: dict[str, Any] = Field({}, description="an object")
    computation: _Computation = Field(_MISSING, description="an object with mixed_precision, a text")
    resumed_on: Annotated[list[_ResumedOn], Field(fail_fast=True)] = Field(
        [], description="a list of objects with step, processes, gradient_accumulation_steps and micro_batch_size"
    )
    peak_memory_mib: _Count | None = Field(None, description=f"{_COUNT}, or null")


class _Training(_Finished):
    weights_sha256: _Sha256 | None = Field(description=f"{_SHA256} or null")


class _Ensemble(_Fields):
    members: Annotated[list[_Count], Field(min_length=1, fail_fast=True)] = Field(description="indices of generations")
    weights_sha256: Any = Field(description="the hashes of its members")
    average: _Text = Field(description=_TEXT)
    metrics: _Metrics = Field(description=f"{_NUMBERS}, by split")


class _Header(_Fields):
    format: Literal["born_again.lineage"] = Field(description=repr(FORMAT))
    version: Annotated[int, Field(ge=1)] = Field(description="a whole number above 0")


class _Manifest(_Fields):
    spec: dict[str, Any] = Field(description="an object")
    name: Any = Field(description="that of the spec")
    spec_sha256: Any = Field(description="the hash of the spec")
    data: dict[str, Any] = Field(description="an object")
    generations: list[Any] = Field(description="a list")
    ensembles: list[Any] = Field([], description="a list")
    hub: dict[str, Any] = Field({}, description="an object")
    restart: _Restart = Field(_MISSING, description=f"an object with from_generation, {_COUNT}")
    stopped_when_worse: _Stopped = Field(_MISSING, description=f"an object with generations, {_COUNT}")


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks a lineage.json.

    Unknown fields are kept: a later version may have added them.

    Args:
        path: of the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is none.
        LineageError: it is a link out of its folder, no strict JSON, of a newer version, or a field is missing or
            wrong; names the field, its value and what was expected.
    """
    content = _decode(path, _read_bytes(path))
    try:
        _check_limits(content)
        if not isinstance(content, dict):
            raise _FieldError("format", f"an object with {FORMAT!r} in it", content)
        _check_fields(_Header, content)
        if content["version"] > VERSION:
            raise LineageError(
                f"{path}: has version {content['version']}, this born_again reads up to {VERSION}; upgrade born-again."
            )
        _check_fields(_Manifest, content)
        spec = _check_spec(path, content)
        for index, record in enumerate(content["generations"]):
            _check_record(index, record, spec.parent_of(index), is_last=index == len(content["generations"]) - 1)
        for index, record in enumerate(content.get("ensembles", [])):
            _check_ensemble(f"ensembles[{index}]", record, content["generations"])
        if "hub" in content:
            _check_fields(_Hub, content["hub"], "hub")
    except _FieldError as error:
        raise LineageError(f"{path}: {error}; restore the file from a copy.") from None
    return content


class _FieldError(Exception):
    """A field is missing or wrong."""

    def __init__(self, field: str, expected: str, *got: Any, shown: str = "nothing") -> None:
        shown = _abbreviated(got[0]) if got else shown
        super().__init__(f"the field {_abbreviated(field)} is wrong, expected {expected}, got {shown}")


def _check_fields(model: type[_Fields], values: Any, place: str = "") -> None:
    if not isinstance(values, dict):
        raise _FieldError(place, "an object", values)
    try:
        model.model_validate(values)
    except ValidationError as error:
        name = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
        got = [values[name]] if name in values else []
        expected = model.model_fields[name].description or ""
        raise _FieldError(f"{place}.{name}" if place else name, expected, *got) from None


def _check_spec(path: Path, content: Mapping[str, Any]) -> LineageSpec:
    try:
        spec = LineageSpec.from_dict(content["spec"])
    except ValueError as error:
        raise LineageError(
            f"{path}: the field 'spec' is wrong: {str(error):.1000} Restore the file from a copy."
        ) from error
    if content["name"] != spec.name:
        raise _FieldError("name", f"that of the spec, {spec.name!r}", content["name"])
    # The hash of the spec as written: defaults of fields that later versions added are not part of it.
    expected, count = spec_sha256(content["spec"]), len(content["generations"])
    if content["spec_sha256"] != expected:
        raise _FieldError("spec_sha256", f"the hash of the spec, {expected}", content["spec_sha256"])
    if count > spec.generations + 1:
        at_most = f"at most the teacher and the {spec.generations} students of the spec"
        raise _FieldError("generations", at_most, shown=f"{count} of them")
    return spec


def _check_record(index: int, record: Any, parent: int | None, is_last: bool) -> None:
    place = f"generations[{index}]"
    is_training = isinstance(record, dict) and record.get("status") == "training"
    _check_fields(_Training if is_training else _Finished, record, place)
    for name, expected in (("index", index), ("parent", parent)):
        if type(record[name]) is not type(expected) or record[name] != expected:  # True is no 1
            raise _FieldError(f"{place}.{name}", json.dumps(expected), record[name])
    if is_training and not is_last:
        raise _FieldError(f"{place}.status", "'finished', since the generation after it has begun", record["status"])


def _check_ensemble(place: str, record: Any, generations: list[dict[str, Any]]) -> None:
    _check_fields(_Ensemble, record, place)
    weights = {index: own["weights_sha256"] for index, own in enumerate(generations) if own["weights_sha256"]}
    members = record["members"]
    if len(set(members)) < len(members) or not weights.keys() >= {*members}:
        raise _FieldError(f"{place}.members", "indices of generations", members)
    if record["weights_sha256"] != [weights[member] for member in members]:
        raise _FieldError(f"{place}.weights_sha256", "the hashes of its members", record["weights_sha256"])


def _check_limits(content: Any) -> None:
    """Checks depth, Unicode and the range of numbers, so that the content can be traversed and written again."""
    pending = [("", content, 1)]  # without recursion, since the depth is checked
    while pending:
        field, value, depth = pending.pop()
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise _FieldError(field, f"at most {MAX_DEPTH} levels of objects and lists", shown="more")
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, int):
                    pending.append((f"{field}[{key}]", item, depth + 1))
                    continue
                if not _is_unicode(key):
                    raise _FieldError(field, "names of valid Unicode", key)
                pending.append((f"{field}.{key}" if field else key, item, depth + 1))
        elif isinstance(value, str) and not _is_unicode(value):
            raise _FieldError(field, "valid Unicode", value)
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise _FieldError(field, "a number of at most 64 bits", value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise _FieldError(field, "a finite number", value)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: possible in JSON, not in UTF-8
        return False
    return True


def _read_bytes(path: Path) -> bytes:
    remedy = "restore it from a copy, or use another folder."
    try:
        if path.is_symlink() and path.resolve().parent != path.parent.resolve():
            raise LineageError(
                f"{path}: is a link out of its folder, expected a file in it; put the file itself there, or use "
                "another folder."
            )
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file, expected that of a lineage; check the folder.")
        if not path.is_file():
            raise LineageError(f"{path}: is no file, expected the manifest of a lineage; {remedy}")
        if path.stat().st_size > MAX_BYTES:
            raise LineageError(
                f"{path}: has {path.stat().st_size:,} bytes, expected at most {MAX_BYTES:,} of a manifest; {remedy}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        if isinstance(error, LineageError):
            raise
        raise LineageError(
            f"{path}: cannot be read ({error}), expected the manifest of a lineage; {remedy}"
        ) from error


def _decode(path: Path, raw: bytes) -> Any:
    def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {_abbreviated(repeated)} stands twice in one object")
        return dict(pairs)

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique_names, parse_constant=refuse_constant)
    # ValueError also for an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise LineageError(f"{path}: is not JSON ({error}); restore it from a copy, or use another folder.") from error


def _abbreviated(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Manifest:
    """The content of lineage.json; `save` writes it atomically.

    Layout: {"format", "version", "name", "spec", "spec_sha256", "data", "generations": [{"index", "status", "seed",
    "parent", "objective", "weights_sha256", "metrics", "seconds", "versions", "hub", ...}]}; metrics by split;
    accuracy and error are fractions, nll is nats per item, seconds are of training, over all runs. Where a student
    clearly worse than its teacher ended it, "stopped_when_worse": {"generations"} holds how many were asked for.

    Args:
        path: of lineage.json.
        content: as read by `read` or made by `create`.

    Attributes:
        lock: to hold while content is changed or written, since a background thread publishes generations.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content
        self.lock = threading.RLock()

    @classmethod
    def create(cls, folder: Path, spec: LineageSpec, data: Mapping[str, Any]) -> Manifest:
        """The manifest of a new lineage; `save` writes it."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "name": spec.name,
            "spec": spec.to_dict(),
            "spec_sha256": spec.sha256(),
            "data": dict(data),
            "generations": [],
        }
        return cls(folder / MANIFEST_NAME, content)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks OUTPUT_DIR/lineage.json.

        Raises:
            FileNotFoundError: there is none, or there are those of several seeds.
            LineageError: it is no JSON, no manifest, of a newer version, or a field is wrong; names the field.
        """
        path = Path(folder) / MANIFEST_NAME
        check_one_lineage("output_dir", folder)
        return cls(path, read_manifest(path))

    @property
    def spec(self) -> LineageSpec:
        """The specification of the lineage."""
        return LineageSpec.from_dict(self.content["spec"])

    @property
    def generations(self) -> list[dict[str, Any]]:
        """The records of the generations, in order."""
        return self.content["generations"]

    def record(self, index: int) -> dict[str, Any] | None:
        """The record of one generation, None where it has not begun."""
        return self.generations[index] if index < len(self.generations) else None

    def update(self, index: int, **fields: Any) -> None:
        """Sets fields of one generation's record, appending the record where it is the next one."""
        with self.lock:
            if index == len(self.generations):
                self.generations.append({"index": index})
            self.generations[index].update(fields)

    def content_with(self, index: int, **fields: Any) -> dict[str, Any]:
        """A copy of the content in which one generation's record has other fields."""
        with self.lock:
            content = copy.deepcopy(self.content)
        content["generations"][index].update(fields)
        return content

    def save(self) -> None:
        """Writes the file atomically."""
        with self.lock:
            write_atomically(self.path, json.dumps(self.content, indent=2, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
