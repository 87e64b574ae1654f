"""--from_generation: a lineage starts again in the middle, and what that replaces is kept."""

from __future__ import annotations

import json
from pathlib import Path

from born_again.files import write_atomically
from born_again.lineage.folders import move_aside
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest


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
