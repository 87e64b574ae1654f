"""Restores a lineage on disk from its published generations, so that it can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from born_again.hub.client import FAILURES, Hub, HubError
from born_again.hub.files import HubSettings
from born_again.lineage.folders import check_weights
from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest

logger = logging.getLogger(__name__)


def restore_lineage(name: str, settings: HubSettings, output_dir: str | Path, token: str | None = None) -> int:
    """Downloads a published lineage into a new or empty folder, so that it can be resumed.

    Generations are downloaded up to the first that is not published. Weights are verified by their hashes. The folder
    is filled atomically: completely or not at all.

    Args:
        name: of the lineage.
        settings: where it was published.
        output_dir: the folder; nothing is done unless it is empty or missing.
        token: of the Hub; None takes that of the login, or HF_TOKEN.

    Returns:
        The number of restored generations, 0 if none is published.

    Raises:
        LineageError: the repositories hold no lineage, another one, or other weights; the folder is in use or cannot
            be written.
        HubError: the Hub cannot be reached.
    """
    folder = Path(output_dir)
    if not _is_empty(folder):
        return 0
    hub = Hub(settings.namespace, settings.private, settings.branch, token)
    existed = folder.exists()
    try:
        commits: list[str] = []
        while (commit := hub.published_commit(settings.repo(name, len(commits)))) is not None:
            commits.append(commit)
        if not commits:
            return 0
        with FolderLock(folder):
            if not _is_empty(folder):  # another run was faster
                return 0
            _restore(hub, name, settings, folder, commits)
    except FAILURES as error:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, LineageError):
            raise
        raise HubError(
            f"output_dir: {settings.namespace}'s lineage {name!r} cannot be restored: {hub.explain(error)}"
        ) from error
    logger.info("%s: %d generations are restored from the Hub.", name, len(commits))
    return len(commits)


def download_lineage(source: str, output_dir: str | Path, token: str | None = None) -> int:
    """Downloads a published lineage that is known by a name alone, as `restore_lineage` does.

    Args:
        source: the repository of any of its generations, or NAMESPACE/NAME of one with the default names.
        output_dir: new or empty folder.
        token: of the Hub; None takes that of the login, or HF_TOKEN.

    Returns:
        The number of generations.

    Raises:
        FileNotFoundError: there is no such lineage.
        LineageError: see `restore_lineage`.
        HubError: the Hub cannot be reached.
    """
    namespace = source.partition("/")[0]
    hub = Hub(namespace, token=token)
    first = f"{source.removesuffix('-ensemble')}-gen0"
    try:
        for repo in (source, first):
            if (commit := hub.published_commit(repo)) is not None:
                content = hub.manifest(repo, commit)
                pattern = (content.get("hub") or {}).get("pattern", HubSettings.pattern)
                if count := restore_lineage(content["name"], HubSettings(namespace, pattern), output_dir, token):
                    return count
    except FAILURES as error:
        if isinstance(error, HubError | LineageError):
            raise
        raise HubError(f"lineage: {source!r} cannot be read from the Hub: {hub.explain(error)}") from error
    raise FileNotFoundError(
        f"lineage: got {source!r}, which is no folder here, and neither it nor {first!r} is a generation on the Hub, "
        "expected a lineage; check the spelling, and log in where it is private."
    )


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK_NAME for path in folder.iterdir()))


def _restore(hub: Hub, name: str, settings: HubSettings, folder: Path, commits: Sequence[str]) -> None:
    partial = folder.absolute().with_name(f".{folder.absolute().name}.restoring")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    try:
        for index, commit in enumerate(commits):
            newest = hub.download(settings.repo(name, index), commit, partial / f"gen{index}")
        shutil.copyfile(newest / MANIFEST_NAME, partial / MANIFEST_NAME)
        _write_manifest(name, settings, partial, commits)
        # The lock file moves along, so that the folder is locked at every moment.
        with contextlib.suppress(OSError):
            os.link(folder / LOCK_NAME, partial / LOCK_NAME)
        (folder / LOCK_NAME).unlink(missing_ok=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_manifest(name: str, settings: HubSettings, folder: Path, commits: Sequence[str]) -> None:
    """Checks the manifest of the newest generation against the downloads, and records where each was published."""
    manifest, newest = Manifest.read(folder), settings.repo(name, len(commits) - 1)
    if manifest.content["name"] != name or len(manifest.generations) != len(commits):
        raise LineageError(
            f"{newest}: its {MANIFEST_NAME} is of generation {len(manifest.generations) - 1} of "
            f"{manifest.content['name']!r}, expected generation {len(commits) - 1} of {name!r}; give the lineage "
            "another name, or publish into another namespace."
        )
    for record, commit in zip(manifest.generations, commits, strict=True):
        own = folder / f"gen{record['index']}"
        check_weights(own, record)
        state = {
            "status": "published",
            "repo": settings.repo(name, record["index"]),
            "commit": (record["hub"] or {}).get("commit") or commit,
            "message": None,
            "card_sha256": hashlib.sha256((own / "README.md").read_bytes()).hexdigest(),
        }
        manifest.update(record["index"], hub=state)
    manifest.save()
