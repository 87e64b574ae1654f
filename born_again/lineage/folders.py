"""The folders of a lineage: files that survive a loss of power, leftovers removed, nothing of worth deleted."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from born_again.files import sync_folder
from born_again.lineage.checkpoints import last_checkpoint
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, file_sha256

__all__ = ["check_weights", "last_checkpoint", "move_aside", "put_in_place", "sync_checkpoint", "sync_files"]

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CURVE_NAME = "training.png"


def sync_checkpoint(checkpoint: Path) -> None:
    """Makes a checkpoint survive a loss of power: its files, and its name in the folders that the runner made.

    Called once every process has written its part; the files of a checkpoint are not synced by who writes them.

    Args:
        checkpoint: OUTPUT_DIR/checkpoints/gen2/checkpoint-100.

    Raises:
        OSError: something cannot be written, or not be opened.
    """
    sync_files(checkpoint)
    for folder in list(checkpoint.absolute().parents)[:3]:
        sync_folder(folder)


def sync_files(folder: Path) -> None:
    """Makes the files of a folder, and of those in it, survive a loss of power; follows no links."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_files(path)
        elif path.is_file():  # nothing that opening would wait for
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def move_aside(folder: Path, why: str) -> None:
    """Renames a folder that is in the way to NAME.replaced-1 and so on; nothing happens where there is none.

    Args:
        folder: what may be in the way.
        why: for the log, after the folder's name.
    """
    if not folder.exists():
        return
    aside = free_name(folder)
    logger.warning("%s %s; it is kept as %s.", folder, why, aside.name)
    os.rename(folder, aside)


def free_name(folder: Path) -> Path:
    """The first of NAME.replaced-1, NAME.replaced-2 and so on that nothing has."""
    numbered = (folder.with_name(f"{folder.name}.replaced-{number}") for number in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


def put_in_place(partial: Path, folder: Path, weights_sha256: str) -> None:
    """Gives a generation that is written to its end its own name, in one step.

    Args:
        partial: where it was written.
        folder: what it is to be called. What has that name is moved aside, unless it is this very generation: then a
            crash came between an earlier renaming and the record of it.
        weights_sha256: of its weights.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors lets nobody but the owner read
    sync_files(partial)
    weights = folder / WEIGHTS_NAME
    if not folder.is_symlink() and weights.is_file() and file_sha256(weights) == weights_sha256:
        os.rename(folder, old := partial.with_suffix(".old"))  # a crash must not leave a part of it under its name
        shutil.rmtree(old)
    move_aside(folder, f"is not in {MANIFEST_NAME}")
    os.rename(partial, folder)
    sync_folder(folder.parent)


def check_weights(folder: Path, record: Mapping[str, Any]) -> None:
    """Refuses a generation whose weights are not those of its record.

    Raises:
        LineageError: they are missing, or changed.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise LineageError(
            f"{path}: is missing, though {MANIFEST_NAME} says that generation {record['index']} is finished; put it "
            "back, or start again in another output_dir."
        )
    expected = record["weights_sha256"]
    if file_sha256(path) != expected:
        raise LineageError(
            f"{path}: does not hash to what {MANIFEST_NAME} holds ({expected[:12]}...), so it is not the generation "
            "that was trained here; put the file back, or start again in another output_dir."
        )
