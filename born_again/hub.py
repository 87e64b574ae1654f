"""The only module that talks to the Hub: preflight, uploads that are verified, collections, downloads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from born_again.lineage.folders import WEIGHTS_NAME
from born_again.lineage.manifest import LineageError, file_sha256
from born_again.lineage.publication import GENERATION_FILES
from born_again.models.saved import read_settings

_LONGEST_TITLE = 59  # of a collection


class HubError(RuntimeError):
    """The Hub cannot be published to as asked; names what was asked and the remedy."""


# What the Hub, the way to it, and the files here may raise. HfHubHTTPError is an OSError.
FAILURES = (OSError, httpx2.HTTPError, HFValidationError, ValueError, LineageError, HubError)


class Hub:
    """One namespace of the Hub, by one token; HF_ENDPOINT and HF_TOKEN are honoured.

    Args:
        namespace: user or organisation.
        private: whether new repositories and collections are.
        branch: that is committed to and read, made where it is missing; None is the main one.
        token: None takes the one that is logged in, or HF_TOKEN.
    """

    def __init__(
        self, namespace: str, private: bool = False, branch: str | None = None, token: str | None = None
    ) -> None:
        self.namespace = namespace
        self.private = private
        self.branch = branch
        self._token = token
        self._api = HfApi(token=token)

    def check_rights(self) -> None:
        """Finds out whether the token may write to the namespace.

        Raises:
            HubError: it may not; says to which it may.
            OSError: no token, a wrong one, or a Hub that cannot be reached.
        """
        who = self._api.whoami()
        roles = {organisation["name"]: organisation.get("roleInOrg") for organisation in who.get("orgs", [])}
        if self.namespace != who["name"] and self.namespace not in roles:
            raise HubError(
                f"hub_namespace: got {self.namespace!r}, expected {who['name']!r} or an organisation of theirs "
                f"({', '.join(sorted(roles)) or 'none'}); give one of these, or the token of another user."
            )
        if roles.get(self.namespace) == "read":
            raise HubError(
                f"hub_namespace: {who['name']!r} may only read in {self.namespace!r}, expected the role of a "
                "contributor or more; ask its administrators, or give another namespace."
            )

    def make_repo(self, repo: str) -> None:
        """Makes a repository, and its branch, where they are missing.

        Raises:
            OSError: the Hub refuses, or cannot be reached.
        """
        self._api.create_repo(repo, private=self.private, exist_ok=True)
        if self.branch is not None:
            self._api.create_branch(repo, branch=self.branch, exist_ok=True)

    def refuse_other_weights(self, repo: str, weights_sha256: str) -> None:
        """Refuses to write over weights that are not those that are about to be uploaded.

        Raises:
            HubError: the repository holds others.
            OSError: the Hub refuses, or cannot be reached.
        """
        found = self._api.get_paths_info(repo, [WEIGHTS_NAME], revision=self.branch)
        if found and not _has_sha256(found[0], weights_sha256):
            raise HubError(
                f"{repo} already holds other weights ({WEIGHTS_NAME}), which are not overwritten; give the lineage "
                "another name, another --hub_name_pattern or --hub_revision, or delete the repository."
            )

    def upload(self, repo: str, files: Mapping[str, bytes | Path], message: str) -> str:
        """Commits files in one commit, and finds them again at that commit with the hashes they have here.

        Where every file is there already, as after an answer that got lost, no commit is made.

        Args:
            repo: namespace/name.
            files: content, or a file to read, by name.
            message: of the commit.

        Returns:
            The commit, 40 hexadecimal digits.

        Raises:
            HubError: a file on the Hub is not what was sent.
            OSError: the Hub refuses, or cannot be reached.
        """
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        commit = self._api.create_commit(repo, operations, commit_message=message, revision=self.branch).oid
        found = {entry.path: entry for entry in self._api.get_paths_info(repo, list(files), revision=commit)}
        wrong = [name for name, content in files.items() if not _is_same(found.get(name), content)]
        if wrong:
            raise HubError(f"{repo} at {commit}: {', '.join(wrong)} is not what was uploaded. Try again later.")
        return commit

    def collect(self, title: str, notes: Mapping[str, str]) -> str:
        """Gathers repositories in a collection, made where it is missing.

        Args:
            title: of the collection; cut to what the Hub takes.
            notes: on each repository, by its name, in their order.

        Returns:
            The collection's slug.

        Raises:
            HubError: one is not in it afterwards.
            OSError: the Hub refuses, or cannot be reached.
        """
        slug = self._api.create_collection(
            title=title[:_LONGEST_TITLE], namespace=self.namespace, private=self.private, exists_ok=True
        ).slug
        for repo, note in notes.items():
            self._api.add_collection_item(slug, repo, "model", note=note, exists_ok=True)
        found = {item.item_id for item in self._api.get_collection(slug).items}
        missing = sorted(set(notes) - found)
        if missing:
            raise HubError(f"collection {slug}: {', '.join(missing)} did not get into it. Try again later.")
        return slug

    def published_commit(self, repo: str) -> str | None:
        """The newest commit of a repository that holds a generation of a lineage, None where there is none.

        Raises:
            OSError: the Hub cannot be reached.
        """
        try:
            found = self._api.get_paths_info(repo, [WEIGHTS_NAME, "lineage.json"], revision=self.branch)
            return self._api.model_info(repo, revision=self.branch).sha if len(found) == 2 else None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    def download(self, repo: str, commit: str, folder: Path) -> Path:
        """Copies a published generation into a new folder as it was before it was published.

        Returns:
            The folder of the download, which has lineage.json too.

        Raises:
            OSError: the Hub refuses, or cannot be reached, or the folder cannot be written.
        """
        wanted = [*GENERATION_FILES, "README.md", "config.json", "lineage.json", "model-*.safetensors", "*.index.json"]
        snapshot = Path(snapshot_download(repo, revision=commit, allow_patterns=wanted, token=self._token))
        folder.mkdir()
        for path in snapshot.iterdir():
            if path.name not in ("lineage.json", "config.json") and path.is_file():
                shutil.copyfile(path, folder / path.name)
        # The code that it names is beside the published weights alone.
        settings = {key: value for key, value in read_settings(snapshot).items() if key != "auto_map"}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return snapshot

    def explain(self, error: Exception) -> str:
        """What went wrong in one line and what to do, without the token in it."""
        text = " ".join(str(error).split()) or type(error).__name__
        remedy = "Try again later."
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            remedy = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        elif status == 403:
            remedy = "Give a namespace that the token may write to, or a token that may."
        elif isinstance(error, LineageError | HubError):
            remedy = ""
        token = self._token or get_token()
        if token:
            text = text.replace(token, "***")
        return f"{text[:500].rstrip('. ')}. {remedy}".rstrip()


def _has_sha256(entry: Any, sha256: str) -> bool:
    return entry.lfs is not None and entry.lfs.sha256 == sha256


def _is_same(entry: Any, content: bytes | Path) -> bool:
    """Whether a file on the Hub, by its hash, is one that is here."""
    if entry is None:
        return False
    if entry.lfs is not None:
        sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return entry.lfs.sha256 == sha256
    raw = content if isinstance(content, bytes) else content.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()  # as git names files
