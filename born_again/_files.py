"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_atomically(path: str | Path) -> Iterator[Path]:
    """Gives the path of a temporary file in the same folder, which takes the place of `path` when the block ends.

    A crash at any moment, also a loss of power, leaves the old content or the new, never a part. An exception in the
    block leaves the old content and no temporary file. The folder is made where there is none.

    Args:
        path: what is to be replaced; it need not exist.

    Raises:
        OSError: the folder is read-only, or the disk is full; the old content is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # writable: Windows syncs nothing else
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp and safetensors let nobody but the owner read
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, by `replaced_atomically`.

    Raises:
        OSError: the folder is read-only, or the disk is full; the old content is intact.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: str | Path) -> None:
    """Makes renames in a folder survive a loss of power, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
