"""--from_generation: a lineage starts again in the middle, and what that replaces is kept."""

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
from born_again.lineage.checkpoints import checkpoint_flaw, checkpoint_step, has_usual_files, is_torn, last_checkpoint
from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256

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


def check_restart(manifest: Manifest, index: int) -> None:
    """Refuses a generation that a lineage cannot start again from.

    Args:
        manifest: of the lineage.
        index: of the first generation that is trained anew.

    Raises:
        ValueError: no whole number from 0 on, or beyond what is asked for.
        LineageError: a generation before it is not finished.
    """
    asked = manifest.spec.generations
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= asked:
        raise ValueError(
            f"from_generation: got {index!r}, expected a generation from 0 (the teacher) to {asked}, the last of this "
            "lineage; --generations asks for more."
        )
    unfinished = [record["index"] for record in manifest.generations[:index] if record["status"] != "finished"]
    first = min([*unfinished, len(manifest.generations)])
    if first < index:
        raise LineageError(
            f"from_generation: got {index}, but generation {first} before it is not finished, expected at most "
            f"{first}; leave from_generation out to go on with the lineage."
        )


def start_again(manifest: Manifest, index: int) -> None:
    """Takes a generation and those after it out of the lineage, so that they are trained anew.

    Their folders and checkpoints are renamed to gen2.replaced-1 and so on, the ensembles that they are in to
    ensemble.replaced-1, and the manifest as it was is copied to lineage.replaced-1.json. Nothing is deleted.

    A restart that a crash has interrupted goes on: called again with the same generation before every generation is
    finished, it does nothing.

    Args:
        manifest: of the lineage; changed, and written.
        index: of the first generation that is trained anew.

    Raises:
        ValueError: see `check_restart`.
        LineageError: see `check_restart`.
    """
    if manifest.content.get("restart") == {"from_generation": index}:
        return
    check_restart(manifest, index)
    replaced = manifest.generations[index:]
    folder = manifest.path.parent
    # Each step can be repeated after a crash. The manifest comes before the folders: a folder that it does not name
    # is never overwritten, while one that it names must be there.
    if replaced:
        _keep_copy(manifest)
    for record in replaced:
        move_aside(folder / "checkpoints" / f"gen{record['index']}", "starts again")
    manifest.content["generations"] = manifest.generations[:index]
    ensembles = manifest.content.get("ensembles", [])
    kept = [ensemble for ensemble in ensembles if max(ensemble["members"]) < index]
    if ensembles:
        manifest.content["ensembles"] = kept
    manifest.content["restart"] = {"from_generation": index}
    manifest.save()
    for record in replaced:
        move_aside(folder / f"gen{record['index']}", "starts again")
    if len(kept) < len(ensembles):
        move_aside(folder / "ensemble", "has members that are trained again")


def _keep_copy(manifest: Manifest) -> None:
    number = 1
    stem = Path(MANIFEST_NAME).stem
    while (path := manifest.path.with_name(f"{stem}.replaced-{number}.json")).exists():
        number += 1
    write_atomically(path, json.dumps(manifest.content, indent=2, allow_nan=False) + "\n")
