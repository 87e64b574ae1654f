"""The only module that talks to the Hub: preflight, uploads that are verified, collections, downloads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status

from born_again.hub.files import GENERATION_FILES
from born_again.lineage.folders import WEIGHTS_NAME
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, file_sha256
from born_again.models.saved import INDEX_NAME, read_settings

# What huggingface_hub talks HTTP with: httpx until 1.x, httpx2 from 2.0, with the same names in both.
HTTP_LIBRARY = sys.modules[HTTPError.__module__]
_LONGEST_TITLE = 59  # of a collection
# huggingface_hub has no timeout. This one is for a connection without data, not for the whole upload.
_TIMEOUT = HTTP_LIBRARY.Timeout(120.0, connect=30.0)  # seconds
_OTHER_WEIGHTS = (INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
_LARGE = (".safetensors", ".png")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # of a signed address, which is as good as a key


class HubError(RuntimeError):
    """Publishing to the Hub failed or is not possible; names the argument and the remedy."""


# What the Hub, the network and local files may raise. HfHubHTTPError is an OSError; a gateway's page instead of JSON,
# and a card that the Hub refuses, raise ValueErrors.
FAILURES = (OSError, HTTPError, HTTP_LIBRARY.InvalidURL, HFValidationError, ValueError, LineageError, HubError)


def without_progress_bars() -> contextlib.AbstractContextManager[Any]:
    """For background uploads, whose progress bars would mix with that of the training."""
    return disable_progress_bars()


class Hub:
    """A namespace of the Hub, accessed with one token; HF_ENDPOINT and HF_TOKEN are honoured.

    Args:
        namespace: user or organisation.
        private: whether new repositories and collections are private; False takes the namespace's default.
        branch: to commit to and read, created if missing; None is main.
        token: None takes that of the login, or HF_TOKEN.
    """

    def __init__(
        self, namespace: str, private: bool = False, branch: str | None = None, token: str | None = None
    ) -> None:
        self.namespace = namespace
        self.private = private
        self.branch = branch
        self._token = token
        self._client = HfApi(token=token)
        self._writes_everywhere = False

    @property
    def _api(self) -> HfApi:
        """Sets the timeout before each request, since huggingface_hub makes a new session after some errors."""
        _set_timeout()
        return self._client

    def _info(self, repo: str, revision: str | None = None) -> ModelInfo:
        # The only request whose default timeout is its own: none.
        return self._api.model_info(repo, revision=revision, timeout=_TIMEOUT.read)

    # ---- Preflight ----

    def check_permissions(self) -> None:
        """Checks that the token may write to the namespace.

        Raises:
            HubError: it may not; lists the namespaces that it may write to.
            OSError: no token, a wrong one, or the Hub cannot be reached.
        """
        who = self._api.whoami()
        roles = {organisation["name"]: organisation.get("roleInOrg") for organisation in who.get("orgs") or []}
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
        scope = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if scope == "read":
            raise HubError(
                f"hub_token: the token of {who['name']!r} may only read, expected one that may write to "
                f"{self.namespace!r}; make one in the settings of the account, and log in with it."
            )
        self._writes_everywhere = scope == "write"

    def check_license(self, license: str) -> None:
        """Checks that the Hub knows a license; it refuses cards with an unknown one.

        Raises:
            HubError: it does not know it.
            OSError: the Hub cannot be reached.
        """
        # Not ModelCard.validate(), which ignores HF_ENDPOINT before huggingface_hub 2.
        _set_timeout()
        response = get_session().post(
            f"{self._client.endpoint}/api/validate-yaml",
            json={"repoType": "model", "content": f"---\nlicense: {license}\n---\n"},
            headers={"Accept": "text/plain"},
        )
        if response.status_code == 400:
            raise HubError(
                f"hub_license: got {license!r}, expected one that the Hub knows, such as apache-2.0, or none: "
                f"{response.text}"
            )
        hf_raise_for_status(response)

    def make_repo(self, repo: str) -> None:
        """Creates a repository and its branch if missing.

        Raises:
            HubError: it exists and is public, but should be private.
            OSError: the Hub refuses, or cannot be reached.
        """
        # None, not False: the organisation's default may be private.
        self._api.create_repo(repo, private=self.private or None, exist_ok=True)
        if self.private and not self._info(repo).private:
            raise HubError(
                f"{repo} is public, expected a private repository; make it private in its settings, or publish "
                "without asking for private repositories."
            )
        if self.branch is not None:
            self._api.create_branch(repo, branch=self.branch, exist_ok=True)

    def check_writing(self, repo: str) -> None:
        """Checks that a fine-grained token may commit to a repository.

        `make_repo` does not show it: creating an existing repository succeeds without write permission.

        Raises:
            OSError: it may not, or the Hub cannot be reached.
        """
        if not self._writes_everywhere:
            self._api.auth_check(repo, write=True)

    # ---- Publishing ----

    def refuse_other_weights(self, repo: str, weights_sha256: str) -> None:
        """Checks that a repository holds no weights other than those to upload.

        Raises:
            HubError: it does.
            OSError: the Hub refuses, or cannot be reached.
        """
        found = self._api.get_paths_info(repo, [WEIGHTS_NAME, *_OTHER_WEIGHTS], revision=self.branch)
        others = [
            entry.path for entry in found if entry.path != WEIGHTS_NAME or not _has_sha256(entry, weights_sha256)
        ]
        if others:
            raise HubError(
                f"{repo} already holds other weights ({', '.join(others)}), which are not overwritten; give the "
                "lineage another name, another --hub_name_pattern or --hub_revision, or delete the repository."
            )

    def upload(self, repo: str, files: Mapping[str, bytes | Path], message: str) -> str:
        """Uploads files in one commit, and verifies their hashes on the Hub at that commit.

        If every file is already there, as after a lost response, no commit is made.

        Args:
            repo: namespace/name.
            files: from name to content, or path of the content.
            message: of the commit.

        Returns:
            The commit, 40 hexadecimal digits.

        Raises:
            HubError: a file on the Hub is not what was sent.
            OSError: the Hub refuses, or cannot be reached.
        """
        commit = self._commit(repo, files, message)
        found = {entry.path: entry for entry in self._api.get_paths_info(repo, list(files), revision=commit)}
        wrong = [name for name, content in files.items() if not _is_same(found.get(name), content)]
        if wrong:
            raise HubError(f"{repo} at {commit}: {', '.join(wrong)} is not what was uploaded. Try again later.")
        return commit

    def _commit(self, repo: str, files: Mapping[str, bytes | Path], message: str) -> str:
        # With the parent, a concurrent or delayed second commit of the same files is refused.
        parent = self._info(repo, self.branch).sha
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        try:
            # One at a time: several are uploaded by threads that keep the program from exiting.
            for operation in [own for own in operations if own.path_in_repo.endswith(_LARGE)][:-1]:
                self._api.preupload_lfs_files(repo, [operation], revision=self.branch, free_memory=False)
            return self._api.create_commit(
                repo, operations, commit_message=message, revision=self.branch, parent_commit=parent
            ).oid
        except RuntimeError as error:  # wraps the error of an upload of weights
            if isinstance(error.__cause__, FAILURES):
                raise error.__cause__ from None
            raise HubError(f"{repo}: {error} Try again later.") from error

    def collect(self, title: str, notes: Mapping[str, str], slug: str | None = None) -> str:
        """Adds repositories to a collection, created if missing.

        Args:
            title: of a new collection; truncated to the limit of the Hub.
            notes: from repository to its note, in order.
            slug: of the collection if known, since its title may have been changed.

        Returns:
            The collection's slug.

        Raises:
            HubError: a repository is not in it afterwards.
            OSError: the Hub refuses, or cannot be reached.
        """
        if slug is None or not self._is_collection(slug):
            slug = self._api.create_collection(
                title=title[:_LONGEST_TITLE], namespace=self.namespace, private=self.private, exists_ok=True
            ).slug
        for repo, note in notes.items():
            self._api.add_collection_item(slug, repo, "model", note=note, exists_ok=True)
        found = {item.item_id for item in self._api.get_collection(slug).items}
        missing = sorted(set(notes) - found)
        if missing:
            raise HubError(f"collection {slug}: {', '.join(missing)} was not added. Try again later.")
        return slug

    def _is_collection(self, slug: str) -> bool:
        try:
            self._api.get_collection(slug)
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return False
            raise
        return True

    # ---- Download ----

    def published_commit(self, repo: str) -> str | None:
        """The newest commit of a repository that holds a generation of a lineage, None where there is none.

        Raises:
            OSError: the Hub cannot be reached.
        """
        try:
            found = self._api.get_paths_info(repo, [WEIGHTS_NAME, "lineage.json"], revision=self.branch)
            return self._info(repo, self.branch).sha if len(found) == 2 else None
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None

    def manifest(self, repo: str, commit: str) -> dict[str, Any]:
        """The content of the lineage.json of a published generation, checked.

        Raises:
            LineageError: it is invalid.
            OSError: the Hub refuses, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:  # a copy, since the cache consists of links
            self._api.hf_hub_download(repo, MANIFEST_NAME, revision=commit, local_dir=folder)
            return Manifest.read(Path(folder)).content

    def download(self, repo: str, commit: str, folder: Path) -> Path:
        """Downloads a published generation into a new folder, without what publishing added.

        Returns:
            The folder of the snapshot, which also has lineage.json.

        Raises:
            OSError: the Hub refuses, or cannot be reached, or the folder cannot be written.
            ValueError: its config.json is invalid.
        """
        wanted = [*GENERATION_FILES, "README.md", "config.json", "lineage.json", "model-*.safetensors", INDEX_NAME]
        snapshot = Path(self._api.snapshot_download(repo, revision=commit, allow_patterns=wanted))
        folder.mkdir()
        for path in snapshot.iterdir():
            if path.name not in ("lineage.json", "config.json") and path.is_file():
                shutil.copyfile(path, folder / path.name)
        # auto_map refers to code that is published beside the weights only.
        settings = {key: value for key, value in read_settings(snapshot).items() if key != "auto_map"}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return snapshot

    # ---- Errors ----

    def explain(self, error: BaseException) -> str:
        """An error and its remedy in one line, without the token."""
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, HTTP_LIBRARY.TransportError):
            text = f"{self._client.endpoint} cannot be reached ({text})"
        token = self._token or get_token()
        if token and token.strip():
            text = text.replace(token.strip(), "***")
        text = _QUERY.sub(r"\1", _TOKEN.sub("***", text))
        return f"{text[:500].rstrip('. ')}. {_remedy(error)}".rstrip()


def _set_timeout() -> None:
    session = get_session()
    if session.timeout == HTTP_LIBRARY.Timeout(None):  # else the user has set one
        session.timeout = _TIMEOUT


def _remedy(error: BaseException) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    if status == 403:
        return "Give a namespace that the token may write to, or a token that may."
    if status == 429 and (seconds := response.headers.get("Retry-After", "")).isdigit():
        return f"Try again in {seconds} seconds."
    is_garbled = isinstance(error, json.JSONDecodeError)  # as from a gateway
    if status == 400 or (isinstance(error, ValueError) and not is_garbled):
        return "Correct that, and publish again."
    if isinstance(error, LineageError | HubError | OfflineModeIsEnabled):  # which name their remedy
        return ""
    is_local = isinstance(error, OSError) and error.errno is not None and status is None
    return "" if is_local else "Try again later."


def _has_sha256(entry: Any, sha256: str) -> bool:
    return entry.lfs is not None and entry.lfs.sha256 == sha256


def _is_same(entry: Any, content: bytes | Path) -> bool:
    """Whether a file on the Hub has the hash of a local one."""
    if entry is None:
        return False
    if entry.lfs is not None:
        return _has_sha256(
            entry, hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        )
    raw = content if isinstance(content, bytes) else content.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()  # the hash of a git blob
