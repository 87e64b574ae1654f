"""lineage.json: the one file that says what a lineage is and how far it has come."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from born_again.files import write_atomically
from born_again.lineage.schema import FORMAT, VERSION, LineageError, read_manifest
from born_again.lineage.spec import LineageSpec

__all__ = ["MANIFEST_NAME", "LineageError", "Manifest", "file_sha256"]

MANIFEST_NAME = "lineage.json"


class Manifest:
    """The content of lineage.json, written anew and atomically at every change.

    Layout: {"format", "version", "name", "spec", "spec_sha256", "data", "generations": [{"index", "status", "seed",
    "parent", "objective", "weights_sha256", "metrics", "seconds", "versions", "hub", ...}]}; metrics by split;
    accuracy and error are fractions, nll is nats per item, seconds are of training, over all of its starts.

    Args:
        path: of lineage.json.
        content: as read by `read` or made by `create`.

    Attributes:
        lock: held while content is changed or written, since generations are published in the background.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content
        self.lock = threading.RLock()

    @classmethod
    def create(cls, folder: Path, spec: LineageSpec, data: Mapping[str, Any]) -> Manifest:
        """The manifest of a lineage of which nothing is trained; `save` writes it."""
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
            FileNotFoundError: there is none.
            LineageError: it is no JSON, no manifest, of a newer version, or a field is wrong; names the field.
        """
        path = Path(folder) / MANIFEST_NAME
        return cls(path, read_manifest(path))

    @property
    def spec(self) -> LineageSpec:
        """What was asked."""
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
