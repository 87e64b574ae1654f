"""What a small Hub remembers: accounts, repositories with their history, collections; and what it refuses.

Nothing here knows HTTP: hub_server.py speaks it. Tests may also fill a store and look into it directly.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import yaml

GIT_ATTRIBUTES = b"".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for suffix in ("arrow", "bin", "gz", "npz", "parquet", "pkl", "pt", "pth", "safetensors", "zip")
)
LARGEST_REGULAR_FILE = 10 * 2**20
REPOSITORY_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
# Of the ids that the Hub knows, those that a test may want.
LICENSES = ["apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "other", "unknown"]
RELATIONS = ["adapter", "merge", "quantized", "finetune"]


class HubError(Exception):
    """A refusal.

    Args:
        status: HTTP status.
        message: for the body and the header X-Error-Message.
        code: for the header X-Error-Code, by which the client tells errors apart.
        body: further keys of the JSON body.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **body: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


def now() -> str:
    """The only format of a date that huggingface_hub reads."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@dataclass(frozen=True)
class Blob:
    """A file at one commit; `sha256` is set for a file in LFS, whose git blob is a pointer."""

    data: bytes
    sha256: str | None = None

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        """Git's own hash, of the pointer where the file is in LFS."""
        content = self.data if self.sha256 is None else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """A commit with its whole file map, by path."""

    oid: str
    parent: str | None
    files: dict[str, Blob]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repository:
    """A model or a dataset. Branch names such as "refs/convert/parquet" are kept whole."""

    id: str
    type: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS contents by sha256

    @property
    def prefix(self) -> str:
        return "" if self.type == "model" else f"{self.type}s/"

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id names.

        Raises:
            HubError: 404 for a revision that does not exist.
        """
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """From the newest commit to the first."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def last_change(self, revision: str, path: str) -> Commit:
        """The commit that gave a file the content it has at `revision`."""
        newest, *older = self.history(revision)
        for commit in older:
            if commit.files.get(path) != newest.files[path]:
                break
            newest = commit
        return newest

    def file_info(self, commit: Commit, path: str, expand: bool = False) -> dict:
        """A file or a folder as the tree and paths-info endpoints show it, with its last commit if `expand`."""
        if path not in commit.files:
            folder = sorted((name, blob.oid) for name, blob in commit.files.items() if name.startswith(path + "/"))
            oid = hashlib.sha1(json.dumps(folder).encode()).hexdigest()
            return {"type": "directory", "oid": oid, "size": 0, "path": path}
        blob = commit.files[path]
        info: dict = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
        if blob.sha256:
            info["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        if expand:
            last = self.last_change(commit.oid, path)
            info["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
        return info

    def info(self, revision: str, blobs: bool = False) -> dict:
        """The repository at a revision, with hashes and sizes if `blobs`."""
        commit = self.at(revision)
        siblings = []
        for path, blob in sorted(commit.files.items()):
            sibling: dict = {"rfilename": path}
            if blobs:
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
            if blobs and blob.sha256:
                sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
            siblings.append(sibling)
        card = card_data(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        tags = card.get("tags") or []
        return {
            "_id": hashlib.sha1(self.id.encode()).hexdigest()[:24],
            "id": self.id,
            "author": self.id.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": [*self.history(revision)][-1].date,
            "private": self.private,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags if isinstance(tags, list) else [tags],
            "siblings": siblings,
            "cardData": {key: value for key, value in card.items() if key != "model-index"},
            **{key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card},
        }

    def write(
        self,
        branch: str,
        files: dict[str, Blob],
        title: str,
        message: str = "",
        author: str = "",
        oid: str | None = None,
    ) -> Commit:
        """A new commit at the head of a branch, with `files` as its whole content.

        Args:
            branch: made if there is none of this name.
            files: the file map.
            title: first line of the message.
            message: the rest of it.
            author: user name.
            oid: the commit's id, for a test that pins one.
        """
        parent = self.branches.get(branch)
        tree = {path: blob.oid for path, blob in sorted(files.items())}
        made = json.dumps([self.id, parent, tree, title, message, len(self.commits)])
        oid = oid or hashlib.sha1(made.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, dict(files), title, message, author, now())
        self.branches[branch] = oid
        return self.commits[oid]

    def in_lfs(self, path: str, size: int, sample: bytes) -> bool:
        """Whether a file has to be stored in LFS: by .gitattributes, by size, or because it is binary."""
        attributes = self.at("main").files.get(".gitattributes", Blob(GIT_ATTRIBUTES)).data.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        named = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        return size > 0 and (named or size > LARGEST_REGULAR_FILE or b"\0" in sample)

    def blob(self, path: str, data: bytes) -> Blob:
        if not self.in_lfs(path, len(data), data[:512]):
            return Blob(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.objects[sha256] = data
        return Blob(data, sha256)


@dataclass
class Account:
    """A user, as one access token of theirs sees them; `orgs` maps an organization to the user's role there."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)

    def may_write(self, namespace: str) -> bool:
        member = namespace == self.name or self.orgs.get(namespace) in ("admin", "write")
        return member and self.role == "write"

    def may_read(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Collection:
    """`items` are {"_id", "id", "type", "note"}, in order."""

    slug: str
    title: str
    owner: str
    description: str | None
    private: bool
    items: list[dict] = field(default_factory=list)
    updated: str = field(default_factory=now)

    def as_json(self) -> dict:
        items = [
            {**item, "position": position, "note": {"text": item["note"], "html": item["note"]}}
            if item["note"] is not None
            else {"_id": item["_id"], "id": item["id"], "type": item["type"], "position": position}
            for position, item in enumerate(self.items)
        ]
        return {
            "slug": self.slug,
            "title": self.title,
            "owner": {"name": self.owner, "type": "user"},
            "description": self.description,
            "private": self.private,
            "items": items,
            "lastUpdated": self.updated,
            "position": 0,
            "theme": "blue",
            "upvotes": 0,
        }


class Store:
    """Everything of one Hub. Account "tester", with the first token, is an admin of the organization "born-again"."""

    def __init__(self, token: str) -> None:
        self.accounts: dict[str, Account] = {token: Account("tester", orgs={"born-again": "admin"})}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.collections: dict[str, Collection] = {}

    def account(self, token: str | None) -> Account | None:
        """Raises HubError 401 for a token that nobody has."""
        if token is not None and token not in self.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.accounts.get(token or "")

    def put(
        self,
        type: str,
        id: str,
        files: dict[str, bytes],
        message: str = "Add files",
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        oid: str | None = None,
    ) -> Commit:
        """Adds files to a repository without any request, and makes the repository if it is missing."""
        repository = self.repositories.get((type, id)) or self.make(type, id, private, gated)
        start = repository.commits.get(repository.branches.get(branch, ""))
        added = {path: repository.blob(path, data) for path, data in files.items()}
        return repository.write(branch, {**(start.files if start else {}), **added}, message, "", "tester", oid)

    def make(self, type: str, id: str, private: bool = False, gated: bool = False, author: str = "") -> Repository:
        """A repository as the Hub makes it: with a first commit that holds .gitattributes."""
        if not REPOSITORY_ID.fullmatch(id) or ".." in id or "--" in id:
            raise HubError(400, f"Invalid repository id: {id}")
        repository = self.repositories[type, id] = Repository(id, type, private, gated)
        repository.write("main", {".gitattributes": Blob(GIT_ATTRIBUTES)}, "initial commit", "", author)
        return repository

    def find(self, type: str, id: str, account: Account | None, *, files: bool = False) -> Repository:
        """A repository that the account may see.

        Args:
            type: "model" or "dataset".
            id: "name" or "namespace/name".
            account: None for a request without a token.
            files: whether the request reads files, which a gated repository refuses.

        Raises:
            HubError: 401 without a token and 404 with one, for what is missing as for what is private; for a gated
                repository 401 or 403.
        """
        repository = self.repositories.get((type, id))
        member = account is not None and account.may_read(id.split("/")[0])
        if repository is None or (repository.private and not member):
            if account is not None:
                raise HubError(404, "Repository not found", "RepoNotFound")
            # The Hub leaves the code out, and the client then goes by the URL, but only by one that starts with https.
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if files and repository.gated and not member:
            status = 401 if account is None else 403
            raise HubError(status, f"Access to {type} {id} is restricted.", "GatedRepo")
        return repository

    def find_for_writing(self, type: str, id: str, account: Account | None) -> Repository:
        """The same, for an account that may write to it: raises HubError 401 or 403 otherwise."""
        repository = self.find(type, id, account)
        self.check_permissions(account, id.split("/")[0], f"write to the {type} {id}")
        return repository

    def check_permissions(self, account: Account | None, namespace: str, what: str) -> Account:
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if not account.may_write(namespace):
            raise HubError(403, f"Forbidden: you don't have the rights to {what} under the namespace {namespace!r}")
        return account

    def collection(self, slug: str, account: Account | None) -> Collection:
        found = self.collections.get(slug)
        if found is None or (found.private and (account is None or not account.may_read(found.owner))):
            raise HubError(404, "Collection not found")
        return found


FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


def card_data(text: str) -> dict:
    """The YAML in front of a card, {} where there is none that can be read."""
    found = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def check_card(text: str, type: str = "model") -> tuple[list[str], list[str]]:
    """A part of what the Hub checks in the YAML in front of README.md.

    Args:
        text: content of README.md.
        type: "model" or "dataset".

    Returns:
        Errors and warnings.
    """
    found = FRONT_MATTER.match(text)
    if not found or not found[1].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the YAML metadata must be a mapping"], []
    errors = []
    for key in ("license", "pipeline_tag", "library_name", "license_name", "new_version", "base_model_relation"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    for key, known in {"license": LICENSES, "base_model_relation": RELATIONS}.items():
        if isinstance(data.get(key), str) and data[key] not in known:
            errors.append(f'"{key}" must be one of [{", ".join(known)}]')
    for key in ("tags", "datasets", "base_model", "language", "metrics"):
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key in ("datasets", "base_model"):
            wrong = [value for value in values if not REPOSITORY_ID.fullmatch(value)]
            errors += [f'"{key}" with value "{value}" is not valid: not the id of a repository' for value in wrong]
    if type == "model" and "model-index" in data:
        errors += check_model_index(data["model-index"])
    return errors, []


def check_model_index(index: object) -> list[str]:
    """Errors in a card's results: every one needs a task, a dataset with a name, and metrics with values."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []

    def required(where: str, value: object, *keys: str) -> bool:
        if not isinstance(value, dict):
            errors.append(f'"{where}" must be of type object')
            return False
        missing = [key for key in keys if value.get(key) in (None, "")]
        errors.extend(f'"{where}.{key}" is required' for key in missing)
        return not missing

    for number, model in enumerate(index):
        where = f"model-index[{number}]"
        if not required(where, model, "name", "results"):
            continue
        for position, result in enumerate(model["results"] if isinstance(model["results"], list) else [None]):
            inside = f"{where}.results[{position}]"
            if not required(inside, result, "task", "dataset", "metrics"):
                continue
            required(f"{inside}.task", result["task"], "type")
            required(f"{inside}.dataset", result["dataset"], "type", "name")
            for place, metric in enumerate(result["metrics"] if isinstance(result["metrics"], list) else [None]):
                required(f"{inside}.metrics[{place}]", metric, "type", "value")
    return errors
