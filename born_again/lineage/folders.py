"""The folders of a lineage: checkpoints that are whole, files that survive a loss of power, nothing deleted."""

from __future__ import annotations

import itertools
import json
import logging
import os
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from born_again.lineage.manifest import sync_folder

logger = logging.getLogger(__name__)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a training, None where there is none.

    A checkpoint is whole when its trainer_state.json, which is written last, can be read.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for checkpoint in reversed(found):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s was not written to its end; the checkpoint before it is used.", checkpoint)
        else:
            return checkpoint
    return None


def sync_files(folder: Path) -> None:
    """Makes the files of a folder survive a loss of power."""
    for path in folder.iterdir():
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
    numbered = (folder.with_name(f"{folder.name}.replaced-{number}") for number in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    logger.warning("%s %s; it is kept as %s.", folder, why, aside.name)
    os.rename(folder, aside)
