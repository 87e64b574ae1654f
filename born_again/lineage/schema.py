"""What may stand in lineage.json: strict JSON, and every field by its type and range."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from born_again.lineage.spec import LineageSpec, spec_sha256

FORMAT = "born_again.lineage"
VERSION = 1
STATUSES = ("training", "finished")
# Far above any lineage, and low enough that reading a file that is none cannot fill the memory or the stack.
MAX_BYTES = 64 << 20
MAX_DEPTH = 32
MAX_INTEGER = 2**63 - 1

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class LineageError(RuntimeError):
    """A lineage that cannot go on as asked: another experiment's folder, changed weights, an unreadable manifest."""


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks a lineage.json.

    Fields that this version does not know are kept: a later one may have added them.

    Args:
        path: of the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is none.
        LineageError: it is no file of this folder, no strict JSON, of a newer version, or a field is wrong; names the
            field.
    """
    content = _decode(path, _read_bytes(path))
    check_manifest(path, content)
    return content


def check_manifest(path: Path, content: Any) -> None:
    """Checks the content of a lineage.json field by field.

    Args:
        path: of the file, for messages.
        content: JSON values.

    Raises:
        LineageError: a newer version, or a field that is missing or wrong; names the field, what it holds and what was
            expected.
    """
    check = _Checks(path)
    check.plain("", content)
    check.that(isinstance(content, dict), "format", content, f"an object with {FORMAT!r} in it")
    check.field(content, "", "format", lambda value: value == FORMAT, repr(FORMAT))
    check.field(content, "", "version", lambda value: _whole(value, 1), "a whole number above 0")
    if content["version"] > VERSION:
        raise LineageError(
            f"{path}: has version {content['version']}, this born_again reads up to {VERSION}; upgrade born-again."
        )
    check.field(content, "", "spec", _is_object, "an object")
    try:
        spec = LineageSpec.from_dict(content["spec"])
    except ValueError as error:
        raise LineageError(
            f"{path}: the field 'spec' is wrong: {str(error):.1000} Restore the file from a copy."
        ) from error
    check.field(content, "", "name", lambda value: value == spec.name, f"that of the spec, {spec.name!r}")
    # The spec as it stands: fields that later versions add have defaults, which are not part of an older hash.
    expected = spec_sha256(content["spec"])
    check.field(content, "", "spec_sha256", lambda value: value == expected, f"the hash of the spec, {expected}")
    check.field(content, "", "data", _is_object, "an object")
    check.field(content, "", "generations", lambda value: isinstance(value, list), "a list")
    check.that(
        len(content["generations"]) <= spec.generations + 1,
        "generations",
        None,
        f"at most the teacher and the {spec.generations} students of the spec",
        f"{len(content['generations'])} of them",
    )
    for index, record in enumerate(content["generations"]):
        _check_record(check, index, record, is_last=index == len(content["generations"]) - 1)
    if "ensembles" in content:
        _check_ensembles(check, content)
    if "hub" in content:
        check.field(content, "", "hub", _is_object, "an object")
        for name in ("namespace", "pattern"):
            check.field(content["hub"], "hub", name, _is_name, "a text that is not empty")
        for name in ("ensemble", "collection"):
            if name in content["hub"]:
                check.field(content["hub"], "hub", name, _is_hub_state, _HUB_STATE)
    if "restart" in content:
        check.field(
            content,
            "",
            "restart",
            lambda value: _is_object(value) and _whole(value.get("from_generation"), 0),
            "an object with from_generation, a whole number of 0 or more",
        )


def _check_record(check: _Checks, index: int, record: Any, is_last: bool) -> None:
    place = f"generations[{index}]"
    check.that(_is_object(record), place, record, "an object")
    parent = index - 1 if index else None
    check.field(record, place, "index", _only(index), str(index))
    check.field(record, place, "status", lambda value: value in STATUSES, " or ".join(map(repr, STATUSES)))
    finished = record["status"] == "finished"
    check.that(
        finished or is_last, f"{place}.status", record["status"], "'finished', since the generation after it has begun"
    )
    check.field(
        record,
        place,
        "weights_sha256",
        lambda value: _is_sha256(value) or (value is None and not finished),
        "a SHA-256 (64 of 0-9 and a-f)" + ("" if finished else " or null"),
    )
    check.field(record, place, "metrics", _is_metrics, "an object of numbers or null, by split")
    for name, (is_right, expected) in _RECORD.items():
        check.field(record, place, name, is_right, expected)
    check.field(record, place, "parent", _only(parent), json.dumps(parent))
    for name, (is_right, expected) in _OPTIONAL.items():
        if name in record:
            check.field(record, place, name, is_right, expected)


def _check_ensembles(check: _Checks, content: Mapping[str, Any]) -> None:
    weights = [record["weights_sha256"] for record in content["generations"]]
    check.field(content, "", "ensembles", lambda value: isinstance(value, list), "a list")
    for index, record in enumerate(content["ensembles"]):
        place = f"ensembles[{index}]"
        check.that(_is_object(record), place, record, "an object")
        check.field(record, place, "members", lambda value: _is_some_of(value, weights), "indices of generations")
        own = [weights[member] for member in record["members"]]
        check.field(record, place, "weights_sha256", lambda value, own=own: value == own, "the hashes of its members")
        check.field(record, place, "average", _is_name, "a text that is not empty")
        check.field(record, place, "metrics", _is_metrics, "an object of numbers or null, by split")


class _Checks:
    """Raises where a value is not what it should be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def that(self, is_right: bool, field: str, got: Any, expected: str, shown: str | None = None) -> None:
        if not is_right:
            raise LineageError(
                f"{self.path}: the field {_shown(field)} is wrong, expected {expected}, got {shown or _shown(got)}; "
                "restore the file from a copy."
            )

    def field(
        self, values: Mapping[str, Any], place: str, name: str, is_right: Callable[[Any], bool], expected: str
    ) -> None:
        field = f"{place}.{name}" if place else name
        if name not in values:
            raise LineageError(
                f"{self.path}: the field {field!r} is wrong, expected {expected}, got nothing; restore the file from "
                "a copy."
            )
        self.that(is_right(values[name]), field, values[name], expected)

    def plain(self, field: str, content: Any) -> None:
        """Nothing that could not be computed with, walked through or written again."""
        pending = [(field, content, 1)]  # no recursion: the depth is what is in question
        while pending:
            field, value, depth = pending.pop()
            if isinstance(value, dict | list):
                self.that(depth <= MAX_DEPTH, field, None, f"at most {MAX_DEPTH} levels of objects and lists", "more")
                items = value.items() if isinstance(value, dict) else enumerate(value)
                for key, item in items:
                    if isinstance(key, str):
                        self.that(_is_text(key), field, key, "names of valid Unicode")
                        pending.append((f"{field}.{key}" if field else key, item, depth + 1))
                    else:
                        pending.append((f"{field}[{key}]", item, depth + 1))
            elif isinstance(value, str):
                self.that(_is_text(value), field, value, "valid Unicode")
            elif isinstance(value, int):
                self.that(abs(value) <= MAX_INTEGER, field, value, "a number of at most 64 bits")
            elif isinstance(value, float):
                self.that(math.isfinite(value), field, value, "a finite number")


def _whole(value: Any, least: int = -MAX_INTEGER) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _only(allowed: int | None) -> Callable[[Any], bool]:
    return lambda value: type(value) is type(allowed) and value == allowed  # True is no 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _is_numbers(value: Any) -> bool:
    return _is_object(value) and all(number is None or _number(number) for number in value.values())


def _is_metrics(value: Any) -> bool:
    return _is_object(value) and all(_is_numbers(numbers) for numbers in value.values())


def _is_some_of(value: Any, weights: list[str | None]) -> bool:
    """A list of indices of trained generations, each once."""
    if not isinstance(value, list) or not value or not all(_whole(index, 0) for index in value):
        return False
    return len(set(value)) == len(value) and all(
        index < len(weights) and weights[index] is not None for index in value
    )


_HUB_STATE = "an object with status 'pending' or 'published', and plain texts for its repository and commit"


def _is_hub_state(value: Any) -> bool:
    if not _is_object(value) or value.get("status") not in ("pending", "published"):
        return False
    known = [value.get(name) for name in ("repo", "commit", "slug", "message", "card_sha256")]
    if not all(text is None or isinstance(text, str) for text in known):
        return False
    repo, commit = value.get("repo"), value.get("commit")
    if repo is not None and (not _REPO.fullmatch(repo) or ".." in repo):
        return False
    if commit is not None and not _COMMIT.fullmatch(commit):
        return False
    items = value.get("items", [])
    return isinstance(items, list) and all(isinstance(item, str) for item in items)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write and UTF-8 cannot
        return False
    return True


_Rule = tuple[Callable[[Any], bool], str]
_RECORD: dict[str, _Rule] = {
    "seed": (lambda value: value is None or _whole(value), "a whole number, or null where it is not known"),
    "objective": (_is_name, "a text that is not empty"),
    "seconds": (lambda value: _number(value) and value >= 0, "a number of 0 or more"),
    "versions": (
        lambda value: _is_object(value) and all(isinstance(version, str) for version in value.values()),
        "an object of texts",
    ),
}
_OPTIONAL: dict[str, _Rule] = {
    "hardware": (lambda value: isinstance(value, str), "a text"),
    "hub": (lambda value: value is None or _is_hub_state(value), f"{_HUB_STATE}, or null"),
    "teacher_fit": (lambda value: value is None or _is_numbers(value), "an object of numbers or null"),
    "loss_normalization": (lambda value: value in ("trainer", "step"), "'trainer' or 'step'"),
    "parameters": (lambda value: _whole(value, 0), "a whole number of 0 or more"),
    "steps": (lambda value: _whole(value, 0), "a whole number of 0 or more"),
    "checkpoints": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of texts",
    ),
    "source": (_is_object, "an object"),
    "computation": (
        lambda value: _is_object(value) and _is_name(value.get("mixed_precision")),
        "an object with mixed_precision, a text",
    ),
    "peak_memory_mib": (lambda value: value is None or _whole(value, 0), "a whole number of 0 or more, or null"),
}


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
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {_shown(repeated)} stands twice in one object")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    # ValueError is also what an integer of thousands of digits gives.
    except (ValueError, RecursionError) as error:
        raise LineageError(f"{path}: is not JSON ({error}); restore it from a copy, or use another folder.") from error


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
