"""The files of a lineage's folder: durable writes, integrity checks, cleanup of leftovers, and restarts.

Trained weights are never deleted: what is in the way is renamed to NAME.replaced-1. Only unfinished files of killed
runs, unneeded checkpoints and teacher caches are deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from born_again._files import sync_folder, write_atomically
from born_again.lineage.checkpoints import (
    checkpoint_error,
    checkpoint_step,
    has_only_checkpoint_files,
    is_incomplete,
    last_checkpoint,
)
from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256

__all__ = ["check_weights", "last_checkpoint", "move_aside", "put_in_place", "sync_checkpoint", "sync_files"]

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CURVE_NAME = "training.png"
REPORT_NAME, REPORT_PICTURE_NAME = "report.html", "report.png"
REPORT_IMAGES_NAME = "report_images.safetensors"
CHECKPOINTS_NAME = "checkpoints"
TEACHER_CACHE_NAME = "teacher_cache"
# The names of unfinished folders of the runner, and of temporary files of write_atomically (tempfile adds 8 letters).
_PARTIAL = re.compile(r"\.gen[0-9]+\.(partial|old)")
_TEMPORARY = re.compile(
    r"\.(lineage(\.replaced-[0-9]+)?\.json|ensemble\.json|README\.md|predictions(-[0-9]+)+\.safetensors"
    r"|report\.html|report\.png|report_images\.safetensors)\.[a-z0-9_]{8}"
)


# ---- Durable writes and integrity ----


def sync_checkpoint(checkpoint: Path) -> None:
    """Syncs a checkpoint to the disk: its files, and its entries in the folders that the runner made.

    Called after every process has written its files, which Trainer does not sync.

    Args:
        checkpoint: OUTPUT_DIR/checkpoints/gen2/checkpoint-100.

    Raises:
        OSError: a file cannot be opened or synced.
    """
    sync_files(checkpoint)
    for folder in list(checkpoint.absolute().parents)[:3]:
        sync_folder(folder)


def sync_files(folder: Path) -> None:
    """Syncs the files of a folder and its subfolders to the disk; does not follow links."""
    for path in folder.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_files(path)
        elif path.is_file():  # opening a pipe would block
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def put_in_place(partial: Path, folder: Path, weights_sha256: str) -> None:
    """Renames a completely written generation to its final name, in one step.

    Args:
        partial: where it was written.
        folder: its final name. A folder of that name is moved aside, unless it holds this very generation: then a
            crash came between an earlier renaming and its record.
        weights_sha256: of its weights.

    Raises:
        OSError: the folder cannot be written.
    """
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors lets nobody but the owner read
    sync_files(partial)
    weights = folder / WEIGHTS_NAME
    if not folder.is_symlink() and weights.is_file() and file_sha256(weights) == weights_sha256:
        os.rename(folder, old := partial.with_suffix(".old"))  # a crash must not leave half of it under its name
        shutil.rmtree(old)
    move_aside(folder, f"is not in {MANIFEST_NAME}")
    os.rename(partial, folder)
    sync_folder(folder.parent)


def move_aside(folder: Path, why: str) -> None:
    """Renames a folder to NAME.replaced-1 and so on; does nothing where it does not exist.

    Args:
        folder: to rename.
        why: for the log, after the folder's name.
    """
    if not folder.exists():
        return
    aside = free_name(folder)
    logger.warning("%s %s; it is kept as %s.", folder, why, aside.name)
    os.rename(folder, aside)


def free_name(folder: Path) -> Path:
    """The first unused name of NAME.replaced-1, NAME.replaced-2 and so on."""
    numbered = (folder.with_name(f"{folder.name}.replaced-{number}") for number in itertools.count(1))
    return next(path for path in numbered if not os.path.lexists(path))


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


# ---- Checkpoints and cleanup ----


def set_aside_later_checkpoints(folder: Path, checkpoint: Path | None, recorded: Collection[str]) -> None:
    """Moves the checkpoints after the one that a training resumes from out of its folder.

    Trainer takes the checkpoint of the highest step for the newest, and would delete the new ones that it writes
    before that step. A checkpoint that a kill left incomplete is deleted. Any other is moved to
    gen2.replaced-1/checkpoint-100 with a warning, since it may hold trained weights. So is a checkpoint under another
    name, which Trainer ignores.

    Args:
        folder: of the generation's checkpoints.
        checkpoint: that the training resumes from, None where it begins.
        recorded: names of the checkpoints that the manifest records as complete.

    Raises:
        OSError: a checkpoint cannot be moved.
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
            why = "does not have the name of a checkpoint"
        elif step <= last:
            continue
        elif path.name not in recorded and is_incomplete(path):
            shutil.rmtree(path, ignore_errors=True)
            continue
        elif checkpoint is not None and not has_only_checkpoint_files(path):
            why = "holds files that do not belong to a checkpoint"
        else:
            why = f"cannot be resumed from ({checkpoint_error(path, step)})"
        if aside is None:
            aside = free_name(folder)
            aside.mkdir()
        os.rename(path, aside / path.name)
        logger.warning("%s %s; it is kept as %s.", path, why, os.path.join(aside.name, path.name))
    if aside is not None and checkpoint is None:
        logger.warning(
            "%s: no checkpoint is left to resume from, so the training begins again at step 0. To use one of %s, stop "
            "this run, repair the checkpoint and move it back.",
            folder,
            aside,
        )


def remove_training_files(output_dir: Path, index: int, keep_checkpoints: bool) -> None:
    """Deletes the teacher cache of a finished generation and, unless they are to be kept, its checkpoints.

    Args:
        output_dir: of the lineage. A teacher cache in another folder stays.
        index: of the generation.
        keep_checkpoints: whether its checkpoints stay.
    """
    shutil.rmtree(output_dir / TEACHER_CACHE_NAME, ignore_errors=True)
    if not keep_checkpoints:
        remove_checkpoints(output_dir, index)


def remove_checkpoints(output_dir: Path, index: int) -> None:
    """Deletes the checkpoints of one generation, and the checkpoints folder if it is then empty."""
    shutil.rmtree(output_dir / CHECKPOINTS_NAME / f"gen{index}", ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty
        (output_dir / CHECKPOINTS_NAME).rmdir()


def clean_up(manifest: Manifest) -> None:
    """Deletes the leftovers of a run that was killed while it finished, unless another run holds the folder.

    Writes nothing where there is nothing to delete: the folder may be read-only.

    Args:
        manifest: of a finished lineage.
    """
    folder = manifest.path.parent
    if (folder / LOCK_NAME).exists() or _leftovers(manifest):
        with contextlib.suppress(LineageError), FolderLock(folder):
            remove_leftovers(manifest)


def remove_leftovers(manifest: Manifest) -> list[Path]:
    """Deletes the leftovers of killed runs.

    They are unfinished files (see `is_leftover`), checkpoints of finished generations that are not to be kept, and the
    teacher cache of a finished generation. Call it with the folder's lock held: files that another run is writing look
    the same. Links are not followed. What cannot be deleted is logged.

    Args:
        manifest: of the lineage.

    Returns:
        The deleted paths.
    """
    return [path for path in _leftovers(manifest) if _remove(path)]


def is_free(folder: Path) -> bool:
    """Whether a lineage can begin in a folder: there is none, or nothing in it but what a killed run can have left."""
    return not folder.exists() or (folder.is_dir() and all(map(_is_ignorable, folder.iterdir())))


def _is_ignorable(path: Path) -> bool:
    """Whether a run that ended before it wrote its first manifest can have left this path in a new folder."""
    if path.name == CHECKPOINTS_NAME and path.is_dir() and not path.is_symlink():
        return all(inner.is_dir() and not inner.is_symlink() for inner in path.rglob("*"))  # empty
    return path.name == LOCK_NAME or is_leftover(path)


def is_leftover(path: Path) -> bool:
    """Whether a path in a lineage's folder is an unfinished file or folder of a killed run.

    That is a folder .gen2.partial, or a temporary file of lineage.json, of the ensemble or of the report; never a
    link.
    """
    if path.is_symlink():
        return False
    if _PARTIAL.fullmatch(path.name):
        return path.is_dir()
    return _TEMPORARY.fullmatch(path.name) is not None and path.is_file()


def _leftovers(manifest: Manifest) -> list[Path]:
    output_dir = manifest.path.parent
    found = []
    for folder in (output_dir, output_dir / "ensemble"):
        if folder.is_dir() and not folder.is_symlink():
            found += sorted(path for path in folder.iterdir() if is_leftover(path))
    checkpoints = output_dir / CHECKPOINTS_NAME
    for record in manifest.generations:
        # Records of earlier versions do not say whether checkpoints are kept.
        if record["status"] == "finished" and record.get("checkpoints") == []:
            found += [path for path in [checkpoints / f"gen{record['index']}"] if path.is_dir()]
    cache = output_dir / TEACHER_CACHE_NAME
    if cache.is_dir() and not cache.is_symlink():
        if manifest.generations and manifest.generations[-1]["status"] == "finished":
            found.append(cache)
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
        logger.warning("%s, a leftover of a killed run, cannot be deleted (%s).", path, error.strerror or error)
        return False
    logger.info("%s, a leftover of a killed run, is deleted.", path)
    return True


# ---- Restarts ----


def check_restart(manifest: Manifest, index: int) -> None:
    """Checks that a lineage can restart from a generation.

    Args:
        manifest: of the lineage.
        index: of the first generation to train again.

    Raises:
        ValueError: no whole number from 0 to the generations of the spec.
        LineageError: a generation before it is not finished.
    """
    requested = manifest.spec.generations
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= requested:
        raise ValueError(
            f"from_generation: got {index!r}, expected a generation from 0 (the teacher) to {requested}, the last of "
            "this lineage; a larger --generations adds more."
        )
    unfinished = [record["index"] for record in manifest.generations[:index] if record["status"] != "finished"]
    first = min([*unfinished, len(manifest.generations)])
    if first < index:
        raise LineageError(
            f"from_generation: got {index}, but generation {first} before it is not finished, expected at most "
            f"{first}; leave from_generation out to resume the lineage."
        )


def restart_from(manifest: Manifest, index: int) -> None:
    """Removes a generation and those after it from the lineage, so that they are trained again.

    Their folders and checkpoints are renamed to gen2.replaced-1 and so on, ensembles that contain them to
    ensemble.replaced-1, and the old manifest is copied to lineage.replaced-1.json. Nothing is deleted.

    Called again with the same generation before every generation is finished, as after a crash, it does nothing.

    Args:
        manifest: of the lineage; changed, and written.
        index: of the first generation to train again.

    Raises:
        ValueError: see `check_restart`.
        LineageError: see `check_restart`.
    """
    if manifest.content.get("restart") == {"from_generation": index}:
        return
    check_restart(manifest, index)
    replaced = manifest.generations[index:]
    folder = manifest.path.parent
    # Each step can be repeated after a crash. The manifest comes before the folders: a folder that it does not list is
    # never overwritten, while one that it lists must exist.
    if replaced:
        _backup_manifest(manifest)
    for record in replaced:
        move_aside(folder / "checkpoints" / f"gen{record['index']}", "is trained again")
    manifest.content["generations"] = manifest.generations[:index]
    ensembles = manifest.content.get("ensembles", [])
    kept = [ensemble for ensemble in ensembles if max(ensemble["members"]) < index]
    if ensembles:
        manifest.content["ensembles"] = kept
    manifest.content["restart"] = {"from_generation": index}
    manifest.save()
    for record in replaced:
        move_aside(folder / f"gen{record['index']}", "is trained again")
    if len(kept) < len(ensembles):
        move_aside(folder / "ensemble", "has members that are trained again")


def _backup_manifest(manifest: Manifest) -> None:
    number = 1
    stem = Path(MANIFEST_NAME).stem
    while (path := manifest.path.with_name(f"{stem}.replaced-{number}.json")).exists():
        number += 1
    write_atomically(path, json.dumps(manifest.content, indent=2, allow_nan=False) + "\n")
