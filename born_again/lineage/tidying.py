"""What killed runs leave in a lineage's folder and nobody needs: recognised, and deleted under the lock."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from born_again.lineage.checkpoints import checkpoint_flaw, checkpoint_step, has_usual_files, is_torn
from born_again.lineage.folders import free_name
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


def clear_checkpoints_after(folder: Path, checkpoint: Path | None, recorded: Collection[str]) -> None:
    """Takes the checkpoints out of the way that stand after the one that a training goes on from.

    Trainer takes the checkpoint of the highest step for the newest, and would delete those that it writes on the way
    there. What a kill has left half-written is deleted. All else is moved aside, as gen2.replaced-1/checkpoint-100,
    and warned of: it may hold trained work, and why it cannot be gone on from may be one file with another name. So is
    a checkpoint in a folder of another name, which Trainer does not find.

    Args:
        folder: of the generation's checkpoints.
        checkpoint: that the training goes on from, None where it begins.
        recorded: names of the checkpoints that were once written to their end, as the manifest tells.

    Raises:
        OSError: something cannot be moved.
    """
    last = -1 if checkpoint is None else checkpoint_step(checkpoint)
    aside = None
    for path in sorted(folder.glob("*")):
        if not path.is_dir() or path.is_symlink():
            continue
        step = checkpoint_step(path)
        if step is None:
            if not (path / "trainer_state.json").exists() and not any(path.glob("*.safetensors")):
                continue
            why = "is called otherwise than Trainer calls a checkpoint"
        elif step <= last:
            continue
        elif path.name not in recorded and is_torn(path):
            shutil.rmtree(path, ignore_errors=True)
            continue
        elif checkpoint is not None and not has_usual_files(path):
            why = "holds files that are none of a checkpoint's"
        else:
            why = f"cannot be gone on from ({checkpoint_flaw(path, step)})"
        if aside is None:
            aside = free_name(folder)
            aside.mkdir()
        os.rename(path, aside / path.name)
        logger.warning("%s %s; it is kept as %s.", path, why, os.path.join(aside.name, path.name))
    if aside is not None and checkpoint is None:
        logger.warning(
            "%s: no checkpoint is left to go on from, so that the training begins again at step 0. To use one of %s, "
            "stop this run, mend the checkpoint and move it back.",
            folder,
            aside,
        )


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
