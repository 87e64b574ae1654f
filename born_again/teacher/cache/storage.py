"""Rows in files that several processes, runs and students share, and that survive kill -9 at any moment.

Every writing process has a pair of files of its own, to which it only appends: rows, and index entries ("marks") that
say which key a row is for. A row is written before its mark, and the mark holds a checksum of key and row. So a reader
of a mark finds the whole row of that key, or notices that it does not: the row then counts as missing and is computed
again. There is no lock: two processes that compute the same row at once both store it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """The parts of one row: dtype and shape of each, one after the other.

    Args:
        parts: (name of a torch dtype such as "bfloat16", shape without the axis of rows) of each tensor.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> RowLayout:
        """The layout of tensors (rows, ...)."""
        return cls(tuple((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:])) for tensor in tensors))

    @classmethod
    def from_json(cls, parts: list[Any]) -> RowLayout:
        return cls(tuple((dtype, tuple(shape)) for dtype, shape in parts))

    def to_json(self) -> list[Any]:
        return [[dtype, list(shape)] for dtype, shape in self.parts]

    @property
    def row_bytes(self) -> int:
        return sum(self._sizes())

    def pack(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """Rows of bytes.

        Args:
            tensors: one for each part, (n, ...) of its dtype and shape.

        Returns:
            (n, row_bytes) uint8.

        Raises:
            ValueError: tensors of another dtype or shape.
        """
        if RowLayout.of(tensors) != self:
            raise ValueError(
                f"teacher_cache: the teacher's output for a sample is {RowLayout.of(tensors).to_json()} after "
                f"{self.to_json()} for others, expected the same dtype and shape for all; use teacher_cache='off'."
            )
        rows = [part.detach().cpu().reshape(len(part), -1).contiguous().view(torch.uint8).numpy() for part in tensors]
        return rows[0] if len(rows) == 1 else np.concatenate(rows, 1)

    def unpack(self, rows: np.ndarray, device: torch.device) -> list[Tensor]:
        """The tensors of rows (n, row_bytes) uint8, contiguous, on a device."""
        tensors, start = [], 0
        for (dtype, shape), size in zip(self.parts, self._sizes(), strict=True):
            # Into memory of torch's own: a kernel may round otherwise at an address that is aligned otherwise.
            tensor = torch.empty((len(rows), math.prod(shape)), dtype=getattr(torch, dtype))
            tensor.view(torch.uint8).copy_(torch.from_numpy(rows[:, start : start + size]))
            tensors.append(tensor.view(len(rows), *shape).to(device, non_blocking=True))
            start += size
        return tensors

    def _sizes(self) -> list[int]:
        return [math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in self.parts]


NOWHERE = -1


class RowStore:
    """Rows of bytes under the keys 0 ... keys - 1, filled until a limit is reached.

    Args:
        keys: how many keys there are.
        row_bytes: of every row.
        limit_bytes: what all rows together may take.

    Attributes:
        count: how many keys have a row.
        closed: no row is added any more: the limit is reached, or a write failed.
    """

    def __init__(self, keys: int, row_bytes: int, limit_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.limit_bytes = limit_bytes
        self.closed = False
        self._place = np.full(keys, NOWHERE, np.int64)  # where a key's row is

    @property
    def count(self) -> int:
        return int(np.count_nonzero(self._place != NOWHERE))

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks rows up.

        Args:
            keys: (n,) int64.

        Returns:
            The rows (n, row_bytes) uint8, arbitrary where there is none, and which there are (n,) bool.
        """
        raise NotImplementedError

    def write(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Adds rows; those that are there already, or beyond the limit, are skipped.

        Args:
            keys: (n,) int64.
            rows: (n, row_bytes) uint8.
        """
        new, first = np.unique(keys, return_index=True)
        missing = self._place[new] == NOWHERE
        new, first = new[missing], first[missing]
        if self.closed or not len(new):
            return
        free = self._free_rows()
        if free < len(new):
            self.closed = True
        if free:
            self._append(new[:free], np.ascontiguousarray(rows[first[:free]]))

    def close(self) -> None:
        """Releases what only writing needs; the next write opens it again."""

    def _free_rows(self) -> int:
        """Rows that may be added."""
        raise NotImplementedError

    def _append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        raise NotImplementedError


class MemoryRows(RowStore):
    """Rows in the memory of this process, which grows as they come."""

    def __init__(self, keys: int, row_bytes: int, limit_bytes: int) -> None:
        super().__init__(keys, row_bytes, limit_bytes)
        self._used = 0
        # The system gives pages of an untouched array when they are written.
        self._rows = np.empty((min(keys, limit_bytes // row_bytes), row_bytes), np.uint8)

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = self._place[keys]
        found = places != NOWHERE
        rows = np.empty((len(keys), self.row_bytes), np.uint8)
        rows[found] = self._rows[places[found]]
        return rows, found

    def _free_rows(self) -> int:
        return len(self._rows) - self._used

    def _append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        end = self._used + len(keys)
        self._rows[self._used : end] = rows
        self._place[keys] = np.arange(self._used, end)
        self._used = end


logger = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0
_MARK = np.dtype([("key", "<i8"), ("row", "<u4"), ("checksum", "<u4")])
_SHARD_SHIFT = 32  # a place is the shard's number and, below, that of the mark in it


class _Shard:
    """One writer's pair of files, as seen by a reader."""

    def __init__(self, stem: Path, row_bytes: int) -> None:
        self.rows_path, self.marks_path = stem.with_suffix(".rows"), stem.with_suffix(".marks")
        self.row_bytes = row_bytes
        self.marks_seen = 0
        self._marks = np.empty(0, _MARK)
        self._rows = np.empty((0, row_bytes), np.uint8)

    def new_keys(self) -> np.ndarray:
        """Keys of the marks that were written since the last call, whole ones only."""
        self._marks = _mapped(self.marks_path, _MARK, (), self._marks)
        first, self.marks_seen = self.marks_seen, len(self._marks)
        return self._marks["key"][first:].copy()

    def read(self, numbers: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Fills rows (n, row_bytes) by the marks of these numbers; which are whole and of these keys (n,) bool."""
        marks = self._marks[numbers]
        wanted = marks["row"].astype(np.int64)
        if len(wanted) and wanted.max() >= len(self._rows):
            self._rows = _mapped(self.rows_path, np.dtype(np.uint8), (self.row_bytes,), self._rows)
        there = (wanted < len(self._rows)) & (marks["key"] == keys)
        rows[there] = self._rows[wanted[there]]
        for index in np.flatnonzero(there):
            there[index] = checksum(keys[index], rows[index]) == marks["checksum"][index]
        return there


class DiskRows(RowStore):
    """A `RowStore` in a folder, memory-mapped for reading.

    Args:
        folder: there already; of rows of this size and meaning only.
        keys: see `RowStore`.
        row_bytes: see `RowStore`.
        limit_bytes: of all files in the folder together, as far as this process has seen them.
    """

    def __init__(self, folder: Path, keys: int, row_bytes: int, limit_bytes: int) -> None:
        super().__init__(keys, row_bytes, limit_bytes)
        self.folder = Path(folder)
        self._shards: list[_Shard] = []
        self._stems: set[str] = set()
        self._own: _Shard | None = None
        self._files: list = []
        self._own_rows = 0
        self._refreshed = -float("inf")
        self.refresh()

    def refresh(self) -> None:
        """Looks for what other processes have written meanwhile."""
        for path in sorted(self.folder.glob("*.marks")):
            if path.stem not in self._stems:
                self._add(_Shard(path.with_suffix(""), self.row_bytes))
        for number, shard in enumerate(self._shards):
            self._index(number, shard)
        self._used_bytes = sum(shard.marks_seen for shard in self._shards) * (self.row_bytes + _MARK.itemsize)
        self._refreshed = time.monotonic()

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = self._place[keys]
        if (places == NOWHERE).any() and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.refresh()
            places = self._place[keys]
        rows = np.empty((len(keys), self.row_bytes), np.uint8)
        found = places != NOWHERE
        for number in np.unique(places[found] >> _SHARD_SHIFT):
            of_shard = np.flatnonzero(found & (places >> _SHARD_SHIFT == number))
            part = np.empty((len(of_shard), self.row_bytes), np.uint8)
            marks = places[of_shard] & ((1 << _SHARD_SHIFT) - 1)
            found[of_shard] = self._shards[number].read(marks, keys[of_shard], part)
            rows[of_shard] = part
        self._place[keys[~found]] = NOWHERE  # a torn row is missing, and may be written anew
        return rows, found

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files, self._own = [], None

    def _add(self, shard: _Shard) -> None:
        self._shards.append(shard)
        self._stems.add(shard.marks_path.stem)

    def _index(self, number: int, shard: _Shard) -> None:
        first = shard.marks_seen
        keys = shard.new_keys()
        places = (number << _SHARD_SHIFT) + np.arange(first, first + len(keys))
        possible = (keys >= 0) & (keys < len(self._place))
        keys, places = keys[possible], places[possible]
        missing = self._place[keys] == NOWHERE
        self._place[keys[missing]] = places[missing]

    def _free_rows(self) -> int:
        return max(0, (self.limit_bytes - self._used_bytes) // (self.row_bytes + _MARK.itemsize))

    def _append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        try:
            if self._own is None:
                self._begin()
            marks = np.empty(len(keys), _MARK)
            marks["key"] = keys
            marks["row"] = np.arange(self._own_rows, self._own_rows + len(keys))
            marks["checksum"] = [checksum(key, row) for key, row in zip(keys, rows, strict=True)]
            for file, content in zip(self._files, (rows, marks), strict=True):
                _write_all(file, content.tobytes())
        except OSError as error:
            self._stop(error)
            return
        self._own_rows += len(keys)
        self._used_bytes += len(keys) * (self.row_bytes + _MARK.itemsize)
        self._index(self._shards.index(self._own), self._own)

    def _begin(self) -> None:
        descriptor, name = tempfile.mkstemp(".rows", "shard-", self.folder)
        self._own = _Shard(Path(name).with_suffix(""), self.row_bytes)
        self._own_rows = 0
        self._add(self._own)
        self._files = [os.fdopen(descriptor, "ab", buffering=0)]
        self._files.append(open(self._own.marks_path, "xb", buffering=0))

    def _stop(self, error: OSError) -> None:
        """Stops writing and frees the disk space: the next thing to be written is a checkpoint."""
        self.closed = True
        logger.warning(
            "teacher_cache: %s cannot be written (%s). What this process wrote there is deleted, and the teacher "
            "computes every output from here on; the training is not affected.",
            self.folder,
            error.strerror or error,
        )
        own = self._own
        self.close()
        if own is None:
            return
        number = self._shards.index(own)
        self._place[(self._place != NOWHERE) & (self._place >> _SHARD_SHIFT == number)] = NOWHERE
        for path in (own.marks_path, own.rows_path):
            with contextlib.suppress(OSError):  # it may be what the disk refuses
                path.unlink(missing_ok=True)


def checksum(key: int, row: np.ndarray) -> int:
    """CRC-32 of a key and its row of bytes."""
    return zlib.crc32(row, zlib.crc32(int(key).to_bytes(8, "little")))


def _write_all(file, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], before: np.ndarray) -> np.ndarray:
    """A file as an array of what is in it now (beyond its end a mapping is no memory), or what it was before."""
    with contextlib.suppress(FileNotFoundError):  # deleted by its writer: see _stop
        count = os.path.getsize(path) // (dtype.itemsize * math.prod(shape))
        if count > len(before):
            return np.memmap(path, dtype, "r", shape=(count, *shape))
    return before
