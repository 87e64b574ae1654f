"""What killed runs leave in a lineage's folder and nobody needs: recognised, and deleted under the lock."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from pathlib import Path

from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.manifest import LineageError, Manifest

logger = logging.getLogger(__name__)

CHECKPOINTS_NAME = "checkpoints"
TEACHER_CACHE_NAME = "teacher_cache"
# What a runner and write_atomically name what they have not finished: tempfile adds eight characters.
_PARTIAL = re.compile(r"\.gen[0-9]+\.(partial|old)")
_TEMPORARY = re.compile(r"\.(lineage(\.replaced-[0-9]+)?\.json|ensemble\.json|README\.md)\.[a-z0-9_]{8}")


def is_leftover(path: Path) -> bool:
    """Whether something in a lineage's folder is what a killed run left half-written, of no use to anyone.

    That is a folder .gen2.partial, or a temporary file of lineage.json or of the ensemble; never a link.
    """
    if path.is_symlink():
        return False
    if _PARTIAL.fullmatch(path.name):
        return path.is_dir()
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


def remove_leftovers(manifest: Manifest) -> list[Path]:
    """Deletes what killed runs left: see `is_leftover`, checkpoints of finished generations that are not kept, and
    the answers of a teacher that teaches no more.

    To be called by the one process that holds the folder's lock: what another run is writing looks the same. Follows
    no links. What cannot be deleted is named in the log, and stays.

    Args:
        manifest: of the lineage.

    Returns:
        What was deleted.
    """
    return [path for path in _leftovers(manifest) if _remove(path)]


def tidy(manifest: Manifest) -> None:
    """Deletes what a run left that was killed while it finished; where that cannot be done, all stays as it is.

    Where there is nothing to delete, nothing is written: the folder may be read-only.

    Args:
        manifest: of a lineage of which nothing is left to do.
    """
    folder = manifest.path.parent
    if (folder / LOCK_NAME).exists() or _leftovers(manifest):
        with contextlib.suppress(LineageError), FolderLock(folder):
            remove_leftovers(manifest)


def remove_checkpoints_after(folder: Path, checkpoint: Path | None) -> None:
    """Deletes the checkpoints that were begun after the one that a training goes on from.

    They were not written to their end. Trainer takes the checkpoint of the highest step for the newest, and would
    delete those that it writes on the way there.

    Args:
        folder: of the generation's checkpoints.
        checkpoint: that the training goes on from, None where it begins.
    """
    last = -1 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    for path in folder.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and int(step) > last and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def remove_what_served(output_dir: Path, index: int, keep_checkpoints: bool) -> None:
    """Deletes what a finished generation was trained with: its teacher's answers, and checkpoints if not kept.

    Args:
        output_dir: of the lineage. Answers kept elsewhere stay.
        index: of the generation.
        keep_checkpoints: they stay.
    """
    shutil.rmtree(output_dir / TEACHER_CACHE_NAME, ignore_errors=True)
    if not keep_checkpoints:
        remove_checkpoints(output_dir, index)


def remove_checkpoints(output_dir: Path, index: int) -> None:
    """Deletes the checkpoints of one generation, and their folder where it is empty then."""
    shutil.rmtree(output_dir / CHECKPOINTS_NAME / f"gen{index}", ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds the checkpoints of another generation
        (output_dir / CHECKPOINTS_NAME).rmdir()


def _leftovers(manifest: Manifest) -> list[Path]:
    output_dir = manifest.path.parent
    found = []
    for folder in (output_dir, output_dir / "ensemble"):
        if folder.is_dir() and not folder.is_symlink():
            found += sorted(path for path in folder.iterdir() if is_leftover(path))
    checkpoints = output_dir / CHECKPOINTS_NAME
    for record in manifest.generations:
        # Records of earlier versions do not tell whether checkpoints are kept.
        if record["status"] == "finished" and record.get("checkpoints") == []:
            found += [path for path in [checkpoints / f"gen{record['index']}"] if path.is_dir()]
    answers = output_dir / TEACHER_CACHE_NAME
    if answers.is_dir() and not answers.is_symlink():
        if manifest.generations and manifest.generations[-1]["status"] == "finished":
            found.append(answers)
    if checkpoints.is_dir() and not checkpoints.is_symlink() and set(checkpoints.iterdir()) <= set(found):
        found.append(checkpoints)
    return found


def _remove(path: Path) -> bool:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logger.warning("%s, which a killed run left, cannot be deleted (%s).", path, error.strerror or error)
        return False
    logger.info("%s, which a killed run left, is deleted.", path)
    return True
