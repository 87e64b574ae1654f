"""Publishes a lineage to the Hub, at once or in a background thread while it trains."""

from __future__ import annotations

import hashlib
import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from born_again.hub.client import FAILURES, Hub, HubError, without_progress_bars
from born_again.hub.files import (
    HubSettings,
    collection_notes,
    ensemble_files,
    ensemble_to_publish,
    generation_card,
    generation_files,
    is_complete,
    is_published,
    report_files,
    unpublished,
)
from born_again.hub.restoring import restore_lineage
from born_again.lineage.lock import FolderLock
from born_again.lineage.manifest import Manifest

__all__ = ["BackgroundPublisher", "HubPublisher", "publish_lineage", "restore_lineage"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # seconds between two looks at whether to go on waiting


class HubPublisher:
    """Publishes the generations of one lineage, and records the state of each in its manifest.

    The state of a generation is `hub` in its record: {"status": "pending" or "published", "repo", "commit",
    "message", "card_sha256"}. It is published once every file has been found on the Hub, at the new commit, with
    its local hash.

    Args:
        manifest: of the lineage; the settings are stored in its content["hub"], beside the states of ensemble and
            collection.
        settings: where to publish.
        token: of the Hub; None takes that of the login, or HF_TOKEN.

    Raises:
        HubError: a part of the lineage is already published elsewhere.
    """

    def __init__(self, manifest: Manifest, settings: HubSettings, token: str | None = None) -> None:
        self.manifest = manifest
        self.settings = settings
        self.name = manifest.spec.name
        self._hub = Hub(settings.namespace, settings.private, settings.branch, token)
        self._is_detached = False
        held = manifest.content.get("hub") or {}
        _check_same_destination(settings, held, manifest)
        with manifest.lock:
            manifest.content["hub"] = {**_mark_outdated_cards(settings, held), **settings.to_dict()}

    def preflight(self) -> None:
        """Checks before a training that its generations can be published, and creates the first repository.

        Raises:
            HubError: no token or a wrong one, a namespace that it may not write to, an unknown license, or a Hub that
                cannot be reached; with the remedy.
        """
        try:
            self._hub.check_permissions()
            if self.settings.license is not None:
                self._hub.check_license(self.settings.license)
            wanted = range(self.manifest.spec.generations + 1)
            waiting = [index for index in wanted if not self._is_published(index)]
            if waiting:
                repo = self.settings.repo(self.name, waiting[0])
                self._hub.make_repo(repo)
                self._hub.check_writing(repo)
        except HubError:
            raise
        except FAILURES as error:
            raise HubError(
                f"hub_namespace: {self.settings.namespace!r} cannot be published to: {self._hub.explain(error)}"
            ) from error

    def publish(self) -> dict[str, str]:
        """Publishes what is finished and not published, in order, until a failure; the next call tries the rest again.

        Returns:
            What is not published, from its name to the reason; see `born_again.hub.files.unpublished`.
        """
        for index in self._finished():
            if not self._is_published(index) and not self._attempt(
                f"generation {index}", self._generation(index), self._publish_generation, index
            ):
                return unpublished(self.manifest)
        # A generation that finished during an upload is published by the next call.
        if is_complete(self.manifest) and all(map(self._is_published, self._finished())):
            ensemble, done = ensemble_to_publish(self.manifest), True
            if ensemble is not None:
                done = self._attempt("the ensemble", self._extra("ensemble"), self._publish_ensemble, ensemble)
            if done and unpublished(self.manifest):
                self._attempt("the collection", self._extra("collection"), self._publish_collection)
        return unpublished(self.manifest)

    def detach(self) -> None:
        """Stops writing to the manifest, which another run may use now; an upload in progress is not interrupted."""
        with self.manifest.lock:
            self._is_detached = True

    # ---- One step ----

    def _attempt(
        self, what: str, update_state: Callable[..., None], step: Callable[..., dict[str, Any]], *arguments: Any
    ) -> bool:
        """Runs a step and records its result; no exception of it must end a training."""
        if self._is_detached:
            return False
        try:
            done = step(*arguments)
        except Exception as error:
            message = self._hub.explain(error)
            logger.warning("%s of %s is not published yet: %s", what.capitalize(), self.name, message)
            if not isinstance(error, FAILURES):
                # Without the message of the error, which may hold the token.
                frames = "".join(traceback.format_tb(error.__traceback__))
                logger.error("%s is not an error of the Hub; it was raised in\n%s", type(error).__name__, frames)
            update_state(status="pending", message=message)
            return False
        update_state(status="published", message=None, **done)
        return True

    def _publish_generation(self, index: int) -> dict[str, Any]:
        repo = self.settings.repo(self.name, index)
        with self.manifest.lock:
            self.manifest.content["hub"].pop("newest", None)  # this generation or a later one will be the newest
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
        """Makes the older cards point to the newest generation, and adds all to a collection."""
        with self.manifest.lock:
            self.manifest.content["hub"]["newest"] = self.manifest.generations[-1]["hub"]["repo"]
        for record in self.manifest.generations:
            self._update_card(record["index"], record["hub"])
        gathered = collection_notes(self.manifest)
        known = self.manifest.content["hub"].get("collection", {}).get("slug")
        return {"slug": self._hub.collect(f"{self.name}: born again", gathered, known), "items": list(gathered)}

    def _update_card(self, index: int, state: Mapping[str, Any]) -> None:
        folder = self.manifest.path.parent / f"gen{index}"
        card = generation_card(self.manifest.content, folder, index, on_hub=True).encode()
        if _sha256(card) != state.get("card_sha256"):
            files = {"README.md": card, **report_files(self.manifest.content, folder.parent)}
            self._hub.upload(state["repo"], files, "The card points to the newest generation")
            self._generation(index)(card_sha256=_sha256(card))

    # ---- The manifest ----

    def _finished(self) -> list[int]:
        """The indices of the generations before the first that is not finished."""
        with self.manifest.lock:  # the training adds a record in several steps
            done = [record["status"] == "finished" for record in self.manifest.generations]
        return list(range([*done, False].index(False)))

    def _is_published(self, index: int) -> bool:
        with self.manifest.lock:
            record = self.manifest.record(index)
            return record is not None and is_published(record["hub"])

    def _generation(self, index: int) -> Callable[..., None]:
        def update_state(**fields: Any) -> None:
            with self.manifest.lock:
                if not self._is_detached:
                    self.manifest.update(index, hub={**(self.manifest.generations[index]["hub"] or {}), **fields})
                    self.manifest.save()

        return update_state

    def _extra(self, name: str) -> Callable[..., None]:
        def update_state(**fields: Any) -> None:
            with self.manifest.lock:
                if not self._is_detached:
                    held = self.manifest.content["hub"]
                    held[name] = {**held.get(name, {}), **fields}
                    self.manifest.save()

        return update_state


class BackgroundPublisher:
    """One thread that publishes the generations of a lineage, in order, while the next one trains.

    A failed step is tried again after the next generation, and once more at the end. If the process ends early, the
    rest stays pending in lineage.json.

    Args:
        settings: where to publish.
        token: of the Hub; None takes that of the login, or HF_TOKEN.
        defer: whether a failed preflight is a warning instead of an error.
    """

    def __init__(self, settings: HubSettings, token: str | None = None, defer: bool = False) -> None:
        self.settings = settings
        self.token = token
        self.defer = defer
        self._publisher: HubPublisher | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._ends = threading.Event()

    @staticmethod
    def unpublished(manifest: Manifest) -> dict[str, str]:
        """See `born_again.hub.files.unpublished`."""
        return unpublished(manifest)

    def start(self, manifest: Manifest) -> None:
        """Runs the preflight, and starts publishing what earlier runs left unpublished.

        Args:
            manifest: of the lineage, which the training keeps writing.

        Raises:
            HubError: see `HubPublisher.preflight`; not with `defer`.
        """
        publisher = HubPublisher(manifest, self.settings, self.token)
        try:
            publisher.preflight()
        except HubError as error:
            if not self.defer:
                raise HubError(f"{error} Or train now and publish later, with --hub_defer.") from error
            logger.warning("%s Training continues, and publishing is tried after each generation.", error)
        manifest.save()
        self._publisher = publisher
        self._wake, self._ends = threading.Event(), threading.Event()
        # A daemon: the process can exit while an upload hangs.
        self._thread = threading.Thread(
            target=_work, args=(publisher, self._wake, self._ends), name="publisher", daemon=True
        )
        self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Notifies the thread that there is something to publish; does not block."""
        self._wake.set()

    def finish(self, stop: Callable[[], Any] = lambda: None) -> dict[str, str]:
        """Waits for the upload in progress, and tries failed steps once more.

        Args:
            stop: called regularly; a true result ends the waiting.

        Returns:
            What is not published, from its name to the reason.
        """
        thread, publisher = self._thread, self._publisher
        if thread is None or publisher is None:
            return {}  # it was not started
        self._ends.set()
        self._wake.set()
        while thread.is_alive() and not stop():
            thread.join(_POLL_SECONDS)
        if thread.is_alive():
            self.detach()
        elif unpublished(publisher.manifest) and not stop():
            publisher.publish()
        return unpublished(publisher.manifest)

    def detach(self) -> None:
        """Ends without waiting, and stops writing to the manifest; for a training that ends early."""
        self._ends.set()
        self._wake.set()
        if self._publisher is not None:
            self._publisher.detach()


def _work(publisher: HubPublisher, wake: threading.Event, ends: threading.Event) -> None:
    while not ends.is_set():
        wake.wait()
        wake.clear()
        try:
            with without_progress_bars():
                publisher.publish()
        # lineage.json cannot be written, which the training reports too; or a bug.
        except Exception as error:
            logger.warning("Publishing: %s", error)


def publish_lineage(
    output_dir: str | Path,
    namespace: str | None = None,
    *,
    name_pattern: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
    license: str | None = None,
    report: bool | None = None,
    token: str | None = None,
) -> dict[str, str]:
    """Publishes the finished and unpublished parts of a lineage: generations, ensemble, collection.

    Arguments that are not given are those of the last publication, as recorded in lineage.json.

    Args:
        output_dir: of the lineage.
        namespace: user or organisation.
        name_pattern: of the repositories, "{name}-gen{index}".
        private: whether new repositories are private.
        branch: to commit to.
        license: for the cards.
        report: whether the picture of the lineage's report, report.png, goes into the repositories and their cards.
        token: of the Hub; None takes that of the login, or HF_TOKEN.

    Returns:
        What could not be published, from its name to the reason; empty if nothing.

    Raises:
        FileNotFoundError: there is no lineage.
        ValueError: no namespace given or recorded, or an invalid value.
        LineageError: lineage.json cannot be read, or another run uses the folder.
        HubError: the Hub cannot be published to, see `HubPublisher.preflight`.
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
            "report": report,
        }
        values = {**held, **{name: value for name, value in given.items() if value is not None}}
        if "namespace" not in values:
            raise ValueError("namespace: got None, expected the user or organisation to publish to; give it.")
        settings = HubSettings(**{name: values[name] for name in given if name in values})
        publisher = HubPublisher(manifest, settings, token)
        if unpublished(manifest):
            publisher.preflight()
        return publisher.publish()


def _check_same_destination(settings: HubSettings, held: Mapping[str, Any], manifest: Manifest) -> None:
    """Checks that a lineage is not published half in one place and half in another."""
    published = [record["hub"]["repo"] for record in manifest.generations if is_published(record["hub"])]
    for field in ("namespace", "pattern", "branch"):
        before, now = held.get(field), getattr(settings, field)
        if published and before != now:
            raise HubError(
                f"hub_{field}: got {now!r}, but {', '.join(published)} of this lineage is published already with "
                f"{before!r}; give the same, or train into another output_dir."
            )


def _mark_outdated_cards(settings: HubSettings, held: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded states of ensemble and collection, pending again where the license of the cards has changed."""
    if held.get("license") == settings.license:
        return dict(held)
    again = {"status": "pending", "message": "the license has changed"}
    return {name: {**value, **again} if name in ("ensemble", "collection") else value for name, value in held.items()}


def _sha256(content: bytes | Path) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()
