"""A file lock that allows one run at a time in the folder of a lineage."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from born_again.lineage.manifest import LineageError

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_NAME = ".lineage.lock"
_HOLDER_FIELDS = {"pid": int, "host": str, "since": str, "command": str}
# lock_holder takes a shared lock for some microseconds, which must not make a run that begins just then fail.
_ATTEMPTS, _PAUSE = 5, 0.01


class FolderLock:
    """A context manager that holds FOLDER/.lineage.lock; makes the folder if needed.

    The operating system releases the lock when the process ends in any way, so a stale lock cannot exist: processes
    forked from it, such as the workers of a DataLoader, which outlive a killed run by seconds, do not hold the lock.
    The file exists while the lock is held, and says who holds it.

    It is not reentrant: a second lock on the folder is refused in the same process too. filelock is not used: its
    older versions follow a link in the file's place and truncate its target, and may lock a file that its last holder
    has deleted; no version says who holds a folder that is read-only.

    On a file system without locks (some network mounts) it logs a warning. On an operating system without fcntl the
    file itself is the lock; after a kill it must be deleted by hand, as the error then says.

    Args:
        folder: of the lineage.

    Raises:
        LineageError: on entering, if another run holds it or the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / LOCK_NAME
        self._descriptor: int | None = None
        _in_this_process.add(self)

    def __enter__(self) -> FolderLock:
        if self._descriptor is not None:
            raise LineageError(self._in_use())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire_file() if fcntl is None else self._acquire_lock()
        except OSError as error:
            raise LineageError(
                f"output_dir: {self.folder} cannot be written ({error.strerror or error}), expected a folder that "
                "this run may write to; change its permissions, make room, or use another output_dir."
            ) from error
        with contextlib.suppress(OSError):  # a full disk; the lock is held anyway
            os.ftruncate(self._descriptor, 0)
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": Path(sys.argv[0]).name if sys.argv else "",  # without its flags, which may hold a token
            }
            os.write(self._descriptor, json.dumps(holder).encode())
        return self

    def __exit__(self, *exception: Any) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:  # a forked process, which holds nothing
            return
        # Before the lock is released: a process that waits for the deleted file notices, and makes a new one.
        with contextlib.suppress(OSError):
            self.path.unlink()
        if fcntl is not None:
            with contextlib.suppress(OSError):
                # Not by closing alone: C code may have forked past Python's hooks.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def _close_copy(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _acquire_lock(self) -> int:
        blocked = 0
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                blocked += 1
                if blocked == _ATTEMPTS:
                    raise LineageError(self._in_use()) from error
                time.sleep(_PAUSE)
                continue
            except OSError as error:
                logger.warning(
                    "%s: the file system has no locks (%s); make sure that one run at a time uses it.",
                    self.folder,
                    error,
                )
                return descriptor
            if _is_same_file(descriptor, self.path):
                return descriptor
            os.close(descriptor)  # its holder has deleted it meanwhile

    def _acquire_file(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError as error:
            raise LineageError(f"{self._in_use()} If that process is gone, delete {self.path}.") from error

    def _in_use(self) -> str:
        holder, who = lock_holder(self.folder), "another process"  # it has just taken the lock, or released it
        if holder and None not in holder.values():
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
        return f"output_dir: {self.folder} is in use by {who}; wait for it or use another output_dir."


_in_this_process: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _close_copies() -> None:
    """In a forked process: the lock is held as long as any copy of its descriptor is open."""
    for lock in list(_in_this_process):
        lock._close_copy()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_copies)


def lock_holder(folder: str | Path) -> dict[str, Any] | None:
    """Which process holds the folder of a lineage now; writes and deletes nothing, and does not block.

    Args:
        folder: of the lineage; it may be read-only or missing.

    Returns:
        None where no process does, even if a killed run left its file. Else "pid", "host", "since" (ISO 8601, UTC) and
        "command" of the holder, each None where its file does not say; and "certain", False where the system has no
        locks (or the file cannot be opened), so that the run may have ended.
    """
    path = Path(folder) / LOCK_NAME
    # Never follows a link, and never blocks on a pipe in the file's place.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    for _ in range(_ATTEMPTS):
        try:
            descriptor = os.open(path, flags)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return {**dict.fromkeys(_HOLDER_FIELDS), "certain": False}
        try:
            held = _is_held(descriptor)
            if _is_same_file(descriptor, path):
                return None if held is False else {**_read_holder(descriptor), "certain": held is True}
        finally:
            os.close(descriptor)
    return None  # taken and released at every attempt


def _is_held(descriptor: int) -> bool | None:
    """Whether a run holds the lock; None where the system cannot tell."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: it works on a read-only file
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.read(descriptor, 4096).decode("utf-8"))
    except (OSError, ValueError, RecursionError):  # it has just been taken
        holder = None
    values = holder if isinstance(holder, dict) else {}
    return {name: values[name] if type(values.get(name)) is kind else None for name, kind in _HOLDER_FIELDS.items()}


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
