"""Rows of equal size under integer keys: what both places where answers are kept have in common, and the memory."""

from __future__ import annotations

import numpy as np

NOWHERE = -1


class RowStore:
    """Rows of bytes under the keys 0 ... keys - 1, filled until a limit is reached.

    Args:
        keys: how many keys there are.
        row_bytes: of every row.
        limit_bytes: what all rows together may take.

    Attributes:
        kept: how many keys have a row.
        closed: no row is added any more: the limit is reached, or the disk took no more.
    """

    def __init__(self, keys: int, row_bytes: int, limit_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.limit_bytes = limit_bytes
        self.closed = False
        self._place = np.full(keys, NOWHERE, np.int64)  # where a key's row is

    @property
    def kept(self) -> int:
        return int(np.count_nonzero(self._place != NOWHERE))

    def read(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks rows up.

        Args:
            keys: (n,) int64.

        Returns:
            The rows (n, row_bytes) uint8, arbitrary where none is kept, and which are (n,) bool.
        """
        raise NotImplementedError

    def write(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Keeps rows; those that are kept already, or find no room, are passed over.

        Args:
            keys: (n,) int64.
            rows: (n, row_bytes) uint8.
        """
        new, first = np.unique(keys, return_index=True)
        missing = self._place[new] == NOWHERE
        new, first = new[missing], first[missing]
        if self.closed or not len(new):
            return
        room = self._room()
        if room < len(new):
            self.closed = True
        if room:
            self._append(new[:room], np.ascontiguousarray(rows[first[:room]]))

    def close(self) -> None:
        """Lets go of what reading does not need; writing takes it up again."""

    def _room(self) -> int:
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

    def _room(self) -> int:
        return len(self._rows) - self._used

    def _append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        end = self._used + len(keys)
        self._rows[self._used : end] = rows
        self._place[keys] = np.arange(self._used, end)
        self._used = end
