"""From a lineage to the Hub and back: what is published when, what waits, and in the background of what."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from born_again.hub import FAILURES, Hub, HubError
from born_again.lineage.folders import check_weights
from born_again.lineage.lock import LOCK_NAME, FolderLock
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest
from born_again.lineage.publication import (
    HubSettings,
    ensemble_files,
    ensemble_to_publish,
    generation_card,
    generation_files,
    is_complete,
    is_published,
    notes,
    unpublished,
)

logger = logging.getLogger(__name__)


class HubPublisher:
    """Publishes the generations of one lineage, and writes into its manifest what became of it.

    The state of a generation is `hub` in its record: {"status": "pending" or "published", "repo", "commit",
    "message", "card_sha256"}. It is published once every file has been found on the Hub, at the commit that was made,
    with the hash it has here.

    Args:
        manifest: of the lineage; its content["hub"] becomes the settings, beside what is known of ensemble and
            collection.
        settings: where to publish.
        token: of the Hub; None takes the one that is logged in, or HF_TOKEN.

    Raises:
        HubError: some of the lineage is published already, in another place.
    """

    def __init__(self, manifest: Manifest, settings: HubSettings, token: str | None = None) -> None:
        self.manifest = manifest
        self.settings = settings
        self.name = manifest.spec.name
        self._hub = Hub(settings.namespace, settings.private, settings.branch, token)
        held = manifest.content.get("hub") or {}
        _refuse_another_place(settings, held, manifest)
        with manifest.lock:
            manifest.content["hub"] = {**held, **settings.to_dict()}

    def preflight(self) -> None:
        """Finds out before a training whether its generations can be published, and makes the first repository.

        Raises:
            HubError: no or a wrong token, a namespace that it may not write to, or a Hub that cannot be reached; with
                the remedy.
        """
        try:
            self._hub.check_rights()
            wanted = range(self.manifest.spec.generations + 1)
            waiting = [index for index in wanted if not self._is_published(index)]
            if waiting:
                self._hub.make_repo(self.settings.repo(self.name, waiting[0]))
        except HubError:
            raise
        except FAILURES as error:
            raise HubError(
                f"hub_namespace: {self.settings.namespace!r} cannot be published to: {self._hub.explain(error)} Or "
                "train now and publish later, with --hub_defer."
            ) from error

    def publish(self) -> dict[str, str]:
        """Publishes whatever is finished and not published, in order; a failure leaves the rest for the next call.

        Returns:
            What is left, from its name to why; see `born_again.lineage.publication.unpublished`.
        """
        for record in list(self.manifest.generations):
            index = record["index"]
            if record["status"] != "finished":
                break
            if self._is_published(index):
                continue
            if not self._attempt(self._generation(index), self._publish_generation, index):
                return unpublished(self.manifest)
        if is_complete(self.manifest):
            ensemble, done = ensemble_to_publish(self.manifest), True
            if ensemble is not None:
                done = self._attempt(self._extra("ensemble"), self._publish_ensemble, ensemble)
            if done and unpublished(self.manifest):  # the collection
                self._attempt(self._extra("collection"), self._publish_collection)
        return unpublished(self.manifest)

    # ---- One step ----

    def _attempt(self, keep: Callable[..., None], step: Callable[..., dict[str, Any]], *arguments: Any) -> bool:
        """Takes a step and keeps what became of it; whatever it raises must not end a training."""
        try:
            done = step(*arguments)
        except Exception as error:
            message = self._hub.explain(error)
            logger.warning("Not published yet: %s", message)
            keep(status="pending", message=message)
            if not isinstance(error, FAILURES):
                logger.exception("This is not the Hub's fault:")
            return False
        keep(status="published", message=None, **done)
        return True

    def _publish_generation(self, index: int) -> dict[str, Any]:
        repo = self.settings.repo(self.name, index)
        self._generation(index)(status="pending", repo=repo, commit=None, message="the upload was cut short")
        files = generation_files(self.manifest, index)
        self._hub.make_repo(repo)
        self._hub.refuse_other_weights(repo, self.manifest.generations[index]["weights_sha256"])
        commit = self._hub.upload(repo, files, f"Generation {index} of {self.name}")
        logger.info("Generation %d is published: %s at %s.", index, repo, commit)
        return {"repo": repo, "commit": commit, "card_sha256": _sha256(files["README.md"])}

    def _publish_ensemble(self, record: Mapping[str, Any]) -> dict[str, Any]:
        repo = self.settings.ensemble_repo(self.name)
        self._hub.make_repo(repo)
        members = ", ".join(map(str, record["members"]))
        commit = self._hub.upload(repo, ensemble_files(self.manifest, record), f"Ensemble of generations {members}")
        logger.info("The ensemble is published: %s at %s.", repo, commit)
        return {"repo": repo, "commit": commit, "weights_sha256": record["weights_sha256"]}

    def _publish_collection(self) -> dict[str, Any]:
        """Points the older generations to the newest, and gathers all in a collection."""
        with self.manifest.lock:
            self.manifest.content["hub"]["newest"] = self.manifest.generations[-1]["hub"]["repo"]
        for record in self.manifest.generations:
            self._renew_card(record["index"], record["hub"])
        gathered = notes(self.manifest)
        return {"slug": self._hub.collect(f"{self.name}: born again", gathered), "items": list(gathered)}

    def _renew_card(self, index: int, state: Mapping[str, Any]) -> None:
        folder = self.manifest.path.parent / f"gen{index}"
        card = generation_card(self.manifest.content, folder, index).encode()
        if _sha256(card) != state.get("card_sha256"):
            self._hub.upload(state["repo"], {"README.md": card}, "The card points to the newest generation")
            self._generation(index)(card_sha256=_sha256(card))

    # ---- The manifest ----

    def _is_published(self, index: int) -> bool:
        record = self.manifest.record(index)
        return record is not None and is_published(record["hub"])

    def _generation(self, index: int) -> Callable[..., None]:
        def keep(**fields: Any) -> None:
            with self.manifest.lock:
                self.manifest.update(index, hub={**(self.manifest.generations[index]["hub"] or {}), **fields})
                self.manifest.save()

        return keep

    def _extra(self, name: str) -> Callable[..., None]:
        def keep(**fields: Any) -> None:
            with self.manifest.lock:
                held = self.manifest.content["hub"]
                held[name] = {**held.get(name, {}), **fields}
                self.manifest.save()

        return keep


class BackgroundPublisher:
    """One thread that publishes the generations of a lineage, in order, while the next one trains.

    What fails is tried again after the next generation, and once more at the end. A process that ends early leaves
    the rest pending in lineage.json.

    Args:
        settings: where to publish.
        token: of the Hub; None takes the one that is logged in, or HF_TOKEN.
        defer: whether a Hub that cannot be published to is a warning before the training, in place of an error.
    """

    def __init__(self, settings: HubSettings, token: str | None = None, defer: bool = False) -> None:
        self.settings = settings
        self.token = token
        self.defer = defer
        self._publisher: HubPublisher | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ends = False

    def start(self, manifest: Manifest) -> None:
        """Looks whether the Hub can be published to, and begins with what a run before this one has left.

        Args:
            manifest: of the lineage, which the training goes on writing.

        Raises:
            HubError: see `HubPublisher.preflight`; not with `defer`.
        """
        self._publisher = HubPublisher(manifest, self.settings, self.token)
        manifest.save()
        try:
            self._publisher.preflight()
        except HubError as error:
            if not self.defer:
                raise
            logger.warning("%s Training goes on, and publishing is tried after each generation.", error)
        # A daemon: a training that is killed or fails ends, whatever the Hub is doing.
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Says that there is something new to publish; returns at once."""
        self._wake.set()

    def finish(self) -> dict[str, str]:
        """Waits for what is being published, and tries what failed once more.

        Returns:
            What is left, from its name to why.
        """
        self._ends = True
        self._wake.set()
        self._thread.join()
        left = unpublished(self._publisher.manifest)
        return self._publisher.publish() if left else {}

    def _work(self) -> None:
        while not self._ends:
            self._wake.wait()
            self._wake.clear()
            try:
                self._publisher.publish()
            except OSError as error:  # lineage.json cannot be written; the training will meet that too, and say so
                logger.warning("Publishing: %s", error)


def publish_lineage(
    output_dir: str | Path,
    namespace: str | None = None,
    *,
    name_pattern: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
    license: str | None = None,
    token: str | None = None,
) -> dict[str, str]:
    """Publishes what is finished of a lineage and not on the Hub: generations, ensemble, collection.

    What lineage.json holds of an earlier publication stands in for what is not given.

    Args:
        output_dir: of the lineage.
        namespace: user or organisation.
        name_pattern: of the repositories, "{name}-gen{index}".
        private: whether new repositories are.
        branch: to commit to.
        license: for the cards.
        token: of the Hub; None takes the one that is logged in, or HF_TOKEN.

    Returns:
        What could not be published, from its name to why; empty when all is.

    Raises:
        FileNotFoundError: there is no lineage.
        ValueError: no namespace anywhere, or a wrong value.
        LineageError: lineage.json cannot be read, or another run uses the folder.
        HubError: the Hub cannot be published to as asked, see `HubPublisher.preflight`.
    """
    folder = Path(output_dir)
    Manifest.read(folder)  # before a lock is made in what is no lineage
    with FolderLock(folder):
        manifest = Manifest.read(folder)
        held = manifest.content.get("hub") or {}
        given = {
            "namespace": namespace,
            "pattern": name_pattern,
            "private": private,
            "branch": branch,
            "license": license,
        }
        values = {**held, **{name: value for name, value in given.items() if value is not None}}
        if "namespace" not in values:
            raise ValueError("namespace: got None, expected the user or organisation to publish to; give it.")
        settings = HubSettings(**{name: values[name] for name in given if name in values})
        publisher = HubPublisher(manifest, settings, token)
        if unpublished(manifest):
            publisher.preflight()
        return publisher.publish()


def restore_lineage(name: str, settings: HubSettings, output_dir: str | Path, token: str | None = None) -> int:
    """Brings a published lineage back into a new or empty folder, so that it can go on from there.

    Generations are taken as far as they are published without a gap. Weights must hash to what the lineage says.

    Args:
        name: of the lineage.
        settings: where it was published.
        output_dir: the folder; where it holds anything, nothing is done.
        token: of the Hub; None takes the one that is logged in, or HF_TOKEN.

    Returns:
        How many generations were brought back, 0 where none was published.

    Raises:
        LineageError: what was published is no lineage, or has other weights.
        OSError: the Hub cannot be reached, or the folder not be written.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(path.name != LOCK_NAME for path in folder.iterdir())):
        return 0
    hub = Hub(settings.namespace, settings.private, settings.branch, token)
    commits: list[str] = []
    while (commit := hub.published_commit(settings.repo(name, len(commits)))) is not None:
        commits.append(commit)
    if not commits:
        return 0
    partial = folder.absolute().with_name(f".{folder.name}.restoring")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for index, commit in enumerate(commits):
        newest = hub.download(settings.repo(name, index), commit, partial / f"gen{index}")
    shutil.copyfile(newest / MANIFEST_NAME, partial / MANIFEST_NAME)
    manifest = Manifest.read(partial)
    if len(manifest.generations) != len(commits):
        raise LineageError(
            f"{settings.repo(name, len(commits) - 1)}: its {MANIFEST_NAME} has {len(manifest.generations)} "
            f"generations, expected {len(commits)}; it is no generation of {name!r}."
        )
    for record, commit in zip(manifest.generations, commits, strict=True):
        index = record["index"]
        check_weights(partial / f"gen{index}", record)
        manifest.update(
            index,
            hub={
                "status": "published",
                "repo": settings.repo(name, index),
                "commit": (record["hub"] or {}).get("commit") or commit,
                "message": None,
                "card_sha256": _sha256((partial / f"gen{index}" / "README.md").read_bytes()),
            },
        )
    manifest.save()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_NAME).unlink(missing_ok=True)
    os.replace(partial, folder)  # all of it or nothing
    logger.info("%s: %d generations are brought back from the Hub.", name, len(commits))
    return len(commits)


def _refuse_another_place(settings: HubSettings, held: Mapping[str, Any], manifest: Manifest) -> None:
    """Half of a lineage in one place and half in another would be neither."""
    published = [record["hub"]["repo"] for record in manifest.generations if is_published(record["hub"])]
    for field in ("namespace", "pattern", "branch"):
        before, now = held.get(field), getattr(settings, field)
        if published and before != now:
            raise HubError(
                f"hub_{field}: got {now!r}, but {', '.join(published)} of this lineage is published already with "
                f"{before!r}; give the same, or train into another output_dir."
            )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
