"""A small Hub on the loopback interface, for the real huggingface_hub, datasets, transformers and timm.

    with HubServer() as hub:
        subprocess.run([...], env=hub.environment())        # another process
        HfApi(endpoint=hub.endpoint, token=hub.token)       # this one: see hub_fixtures.py

There are two origins, as on the Hub: the API, and a storage that keeps LFS contents under signed addresses and refuses
a request that carries a token. Every request gets an index and is kept in `hub.requests`; `hub.fail` makes chosen
requests fail. `hub.environment()` names the server as the proxy for every other address, so what would have left the
machine is refused and kept in `hub.outside`.

What it leaves out: Xet, multipart LFS uploads (a file of any size goes up in one part), pages of listings, pull
requests, .gitignore at upload, copies inside a commit, Spaces, search, the dataset viewer (404).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_store import Account, Blob, Collection, HubError, Repository, Store, check_card, now

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space", None: "model"}
REPOSITORY = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+(?:/[^/]+)??)"
PLAIN = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+(?:/[^/]+)??)"
SLUG = r"/api/collections/(?P<slug>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, str, re.Pattern, Callable]] = []
# What clients send for their own sake, at moments that no test can foresee: answered, but not numbered.
BACKGROUND = ("agent-harnesses", "telemetry")


@dataclass
class Request:
    """One request as it came, and how it was answered.

    Attributes:
        index: its place in `HubServer.requests`; -1 for what is kept elsewhere.
        endpoint: what it asks for, such as "commit" or "lfs-upload".
        path: with the query, as sent.
        status: of the answer; None where there was none.
        fault: what `HubServer.fail` made of it.
        account: whose token it carries.
        type: "model" or "dataset", of the repository it is about.
        id: of that repository.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    time: float
    endpoint: str = "unknown"
    index: int = -1
    status: int | None = None
    fault: str | None = None
    account: Account | None = None
    type: str = ""
    id: str = ""

    @property
    def authorized(self) -> bool:
        return "authorization" in self.headers

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def size(self) -> int:
        return len(self.body)

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("true", "1")

    def json(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise HubError(400, "The body is not JSON") from None


@dataclass
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]


@dataclass
class Fault:
    which: Callable[[Request], bool]
    how: str
    times: float
    seconds: float
    retry_after: int | None


def answer_json(content: object, status: int = 200, **headers: str) -> Answer:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    body = json.dumps(content, default=str).encode()  # a date in the YAML of a card is no JSON
    return Answer(status, body, {"Content-Type": "application/json", **names})


def refusal(error: HubError, **headers: str) -> Answer:
    answer = answer_json({"error": error.message, **error.body}, error.status, **headers)
    answer.headers["X-Error-Message"] = " ".join(error.message.split()).encode("ascii", "replace").decode()
    if error.code:
        answer.headers["X-Error-Code"] = error.code
    return answer


def route(endpoint: str, methods: str, pattern: str, origin: str = "api") -> Callable:
    """Registers a method of Api; earlier routes go first."""

    def register(function: Callable) -> Callable:
        for method in methods.split():
            ROUTES.append((endpoint, method, origin, re.compile(pattern), function))
        return function

    return register


def file_bytes(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """A file or the range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked or not (asked[1] or asked[2]):
        return Answer(200, data, headers)
    first = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
    last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
    if first > last:
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Answer(206, data[first : last + 1], headers)


class Api:
    """The endpoints. Every method gets the request and parts of the path."""

    def __init__(self, server: HubServer) -> None:
        self.server = server
        self.store = server.store

    def readable(self, request: Request, files: bool = False) -> Repository:
        return self.store.find(request.type, request.id, request.account, files=files)

    def writable(self, request: Request) -> Repository:
        return self.store.find_for_writing(request.type, request.id, request.account)

    def changeable(self, request: Request, slug: str) -> Collection:
        collection = self.store.collection(slug, request.account)
        self.store.check_permissions(request.account, collection.owner, "change a collection")
        return collection

    def place(self, repository: Repository, sha256: str) -> str:
        """Of an LFS content in the storage, with what stands for a signature."""
        return f"{repository.type}/{quote(repository.id, safe='')}/{sha256}?signature=1"

    @route("whoami", "GET", r"/api/whoami-v2")
    def whoami(self, request: Request) -> Answer:
        account = request.account
        if account is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "id": n, "name": n, "fullname": n, "roleInOrg": r} for n, r in account.orgs.items()]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
        names = {"id": account.name, "name": account.name, "fullname": account.name}
        return answer_json({"type": "user", **names, "orgs": orgs, "auth": auth})

    @route("agent-harnesses", "GET", r"/api/agent-harnesses")
    def agent_harnesses(self, request: Request) -> Answer:
        return answer_json({"standardEnvVars": [], "harnesses": {}})

    @route("telemetry", "GET HEAD POST", r"/api/telemetry/.*")
    def telemetry(self, request: Request) -> Answer:
        return answer_json({})

    @route("validate-yaml", "POST", r"/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Answer:
        asked = request.json()
        errors, warnings = check_card(asked["content"], asked.get("repoType", "model"))
        status = 400 if errors else 200
        if request.headers.get("accept") == "text/plain":
            lines = [f"- Error: {error}" for error in errors] + [f"- Warning: {warning}" for warning in warnings]
            return Answer(status, "\n".join(lines).encode(), {"Content-Type": "text/plain"})
        content = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return answer_json(content, status)

    @route("create-repo", "POST", r"/api/repos/create")
    def create_repo(self, request: Request) -> Answer:
        asked = request.json()
        type = asked.get("type", "model")
        namespace = asked.get("organization") or (request.account.name if request.account else "")
        author = self.store.check_permissions(request.account, namespace, f"create a {type}").name
        id = f"{namespace}/{asked['name']}"
        private = asked.get("private") or asked.get("visibility") == "private"
        found = self.store.repositories.get((type, id))
        repository = found or self.store.make(type, id, bool(private), author=author)
        url = f"{self.server.endpoint}/{repository.prefix}{id}"
        if found:
            raise HubError(409, f"You already created this {type} repo: {id}", url=url)
        return answer_json({"url": url, "name": id})

    @route("delete-repo", "DELETE", r"/api/repos/delete")
    def delete_repo(self, request: Request) -> Answer:
        asked = request.json()
        namespace = asked.get("organization") or (request.account.name if request.account else "")
        key = (asked.get("type", "model"), f"{namespace}/{asked['name']}")
        self.store.find_for_writing(*key, request.account)
        del self.store.repositories[key]
        return answer_json({})

    @route("settings", "PUT", REPOSITORY + "/settings")
    def settings(self, request: Request) -> Answer:
        repository = self.writable(request)
        asked = request.json()
        repository.private = asked.get("visibility", "private" if repository.private else "public") == "private"
        repository.gated = bool(asked.get("gated", repository.gated))
        return answer_json(asked)

    @route("auth-check", "GET", REPOSITORY + "/auth-check(?P<write>/write)?")
    def auth_check(self, request: Request, write: str | None) -> Answer:
        self.writable(request) if write else self.readable(request)
        return answer_json({})

    @route("preupload", "POST", REPOSITORY + "/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, revision: str) -> Answer:
        repository = self.writable(request)
        present = repository.at(revision).files
        files = []
        for file in request.json()["files"]:
            path = file["path"]
            lfs = repository.in_lfs(path, file["size"], base64.b64decode(file["sample"]))
            known = {"oid": present[path].etag} if path in present else {}
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
        return answer_json({"files": files, "commitOid": repository.at(revision).oid})

    @route("lfs-batch", "POST", PLAIN + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request) -> Answer:
        repository = self.writable(request)
        objects = []
        for file in request.json()["objects"]:
            # No actions for contents that are there already: the client then sends nothing.
            if file["oid"] not in repository.objects:
                upload = {"href": f"{self.server.storage}/upload/{self.place(repository, file['oid'])}"}
                verify = {"href": f"{self.server.endpoint}/api/lfs-verify/{self.place(repository, file['oid'])}"}
                file = {**file, "actions": {"upload": upload, "verify": verify}}
            objects.append({**file, "authenticated": True})
        return answer_json({"transfer": "basic", "objects": objects})

    @route("lfs-upload", "PUT", r"/upload/(?P<type>\w+)/(?P<id>[^/]+)/(?P<sha256>\w+)", "storage")
    def lfs_upload(self, request: Request, sha256: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "The contents do not match their hash")
        self.store.repositories[request.type, request.id].objects[sha256] = request.body
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    @route("lfs-download", "GET HEAD", r"/objects/(?P<type>\w+)/(?P<id>[^/]+)/(?P<sha256>\w+)", "storage")
    def lfs_download(self, request: Request, sha256: str) -> Answer:
        data = self.store.repositories[request.type, request.id].objects[sha256]
        return file_bytes(request, data, {"ETag": f'"{sha256}"'})

    @route("lfs-verify", "POST", r"/api/lfs-verify/(?P<type>\w+)/(?P<id>[^/]+)/(?P<sha256>\w+)")
    def lfs_verify(self, request: Request, sha256: str) -> Answer:
        data = self.writable(request).objects.get(sha256)
        if data is None or len(data) != request.json()["size"]:
            raise HubError(404, "The contents were not uploaded")
        return answer_json({})

    @route("commit", "POST", REPOSITORY + "/commit/(?P<revision>[^/]+)")
    def commit(self, request: Request, revision: str) -> Answer:
        repository = self.writable(request)
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if "create_pr" in request.query:
            raise HubError(400, "This small Hub has no pull requests")
        head = repository.at(revision)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        if not head.oid.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            self.change(repository, files, line["key"], line["value"])
        if files.get("README.md") != head.files.get("README.md") and "README.md" in files:
            errors, _ = check_card(files["README.md"].data.decode(), repository.type)
            if errors:
                raise HubError(400, "Invalid metadata in README.md. " + "; ".join(errors))
        author = request.account.name if request.account else ""
        made = repository.write(revision, files, header["summary"], header.get("description", ""), author)
        url = f"{self.server.endpoint}/{repository.prefix}{request.id}/commit/{made.oid}"
        return answer_json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def change(self, repository: Repository, files: dict[str, Blob], key: str, value: dict) -> None:
        """One line of a commit."""
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repository.objects:
                raise HubError(400, f"LFS pointer of {path} pointed to a file that does not exist: {value['oid']}")
            files[path] = Blob(repository.objects[value["oid"]], value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            inside = path.rstrip("/") + "/" if key == "deletedFolder" else None
            gone = [name for name in files if name == path or (inside and name.startswith(inside))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise HubError(400, f"Unknown line in a commit: {key}")

    @route("tree", "GET", REPOSITORY + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, request: Request, revision: str, path: str | None) -> Answer:
        repository = self.readable(request)
        commit = repository.at(revision)
        start = f"{path}/" if path else ""
        names = set()
        for name in commit.files:
            if name.startswith(start):
                parts = name.removeprefix(start).split("/")
                names |= {start + "/".join(parts[: depth + 1]) for depth in range(len(parts))}
        if path and not names:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        if not request.flag("recursive"):
            names = {name for name in names if "/" not in name.removeprefix(start)}
        return answer_json([repository.file_info(commit, name, request.flag("expand")) for name in sorted(names)])

    @route("paths-info", "POST", REPOSITORY + "/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, revision: str) -> Answer:
        repository = self.readable(request)
        commit = repository.at(revision)
        asked = parse_qs(request.body.decode())
        folders = {name[:end] for name in commit.files for end in range(len(name)) if name[end] == "/"}
        # What does not exist is left out of the answer.
        names = [path for path in asked.get("paths", []) if path in commit.files or path in folders]
        expand = asked.get("expand", [""])[0].lower() == "true"
        return answer_json([repository.file_info(commit, name, expand) for name in names])

    @route("commits", "GET", REPOSITORY + "/commits/(?P<revision>[^/]+)")
    def commits(self, request: Request, revision: str) -> Answer:
        history = [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in self.readable(request).history(revision)
        ]
        return answer_json(history, X_Total_Count=str(len(history)))

    @route("refs", "GET", REPOSITORY + "/refs")
    def refs(self, request: Request) -> Answer:
        repository = self.readable(request)
        refs: dict[str, list] = {"branches": [], "converts": [], "tags": []}
        for name, oid in repository.branches.items():
            short = name.removeprefix("refs/convert/")
            full, group = (name, "converts") if short != name else (f"refs/heads/{name}", "branches")
            refs[group].append({"name": short, "ref": full, "targetCommit": oid})
        refs["tags"] = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": o} for n, o in repository.tags.items()]
        return answer_json({**refs, "pullRequests": []})

    @route("create-branch", "POST", REPOSITORY + "/branch/(?P<name>[^/]+)")
    def create_branch(self, request: Request, name: str) -> Answer:
        repository = self.writable(request)
        if name in repository.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{name}")
        repository.branches[name] = repository.at(request.json().get("startingPoint", "main")).oid
        return answer_json({})

    @route("create-tag", "POST", REPOSITORY + "/tag/(?P<revision>[^/]+)")
    def create_tag(self, request: Request, revision: str) -> Answer:
        repository = self.writable(request)
        name = request.json()["tag"]
        if name in repository.tags:
            raise HubError(409, f"Tag reference exists already: {name}")
        repository.tags[name] = repository.at(revision).oid
        return answer_json({})

    @route("delete-branch", "DELETE", REPOSITORY + "/(?P<what>branch)/(?P<name>[^/]+)")
    @route("delete-tag", "DELETE", REPOSITORY + "/(?P<what>tag)/(?P<name>[^/]+)")
    def delete_ref(self, request: Request, what: str, name: str) -> Answer:
        repository = self.writable(request)
        refs = repository.branches if what == "branch" else repository.tags
        if refs.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return answer_json({})

    @route("repo-info", "GET", REPOSITORY + "(?:/revision/(?P<revision>[^/]+))?")
    def repo_info(self, request: Request, revision: str | None) -> Answer:
        repository = self.readable(request)
        return answer_json(repository.info(revision or "main", request.flag("blobs")))

    @route("resolve", "GET HEAD", PLAIN + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request: Request, revision: str, path: str) -> Answer:
        repository = self.readable(request, files=True)
        commit = repository.at(revision)
        known = {"X-Repo-Commit": commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            return refusal(HubError(404, "Entry not found", "EntryNotFound"), **known)
        if blob.sha256 is None:
            return file_bytes(request, blob.data, {**known, "ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data)), "ETag": f'"{blob.oid}"'}
        place = f"{self.server.storage}/objects/{self.place(repository, blob.sha256)}"
        return Answer(302, b"", {**known, **linked, "Location": place})

    @route("list-collections", "GET", r"/api/collections")
    def list_collections(self, request: Request) -> Answer:
        shown = []
        for collection in self.store.collections.values():
            items = {f"{item['type']}s/{item['id']}" for item in collection.items}
            wanted = collection.owner in request.query.get("owner", [collection.owner])
            wanted = wanted and items.issuperset(request.query.get("item", []))
            if wanted and (not collection.private or (request.account and request.account.may_read(collection.owner))):
                shown.append({key: value for key, value in collection.as_json().items() if key != "position"})
        return answer_json(shown)

    @route("create-collection", "POST", r"/api/collections")
    def create_collection(self, request: Request) -> Answer:
        asked = request.json()
        owner, title = asked["namespace"], asked["title"]
        self.store.check_permissions(request.account, owner, "create a collection")
        for found in self.store.collections.values():
            if (found.owner, found.title) == (owner, title):
                raise HubError(409, "This collection exists already", slug=found.slug)
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{owner}/{name}-{uuid.uuid4().hex[:24]}"
        made = Collection(slug, title, owner, asked.get("description"), bool(asked.get("private")))
        self.store.collections[slug] = made
        return answer_json(made.as_json())

    @route("collection", "GET PATCH DELETE", SLUG)
    def collection(self, request: Request, slug: str) -> Answer:
        if request.method == "GET":
            return answer_json(self.store.collection(slug, request.account).as_json())
        collection = self.changeable(request, slug)
        if request.method == "DELETE":
            del self.store.collections[slug]
            return answer_json({})
        asked = request.json()
        collection.title = asked.get("title", collection.title)
        collection.description = asked.get("description", collection.description)
        collection.private = asked.get("private", collection.private)
        return answer_json({"success": True, "data": collection.as_json()})

    @route("add-collection-item", "POST", SLUG + "/items")
    def add_collection_item(self, request: Request, slug: str) -> Answer:
        collection = self.changeable(request, slug)
        asked = request.json()
        id, type = asked["item"]["id"], asked["item"]["type"]
        if type in ("model", "dataset"):
            self.store.find(type, id, request.account)
        if any((item["id"], item["type"]) == (id, type) for item in collection.items):
            raise HubError(409, f"The collection has {id} already")
        item = {"_id": uuid.uuid4().hex[:24], "id": id, "type": type, "note": asked.get("note")}
        collection.items.append(item)
        collection.updated = now()
        return answer_json(collection.as_json())

    @route("collection-item", "PATCH DELETE", SLUG + "/items/(?P<item>[^/]+)")
    def collection_item(self, request: Request, slug: str, item: str) -> Answer:
        collection = self.changeable(request, slug)
        place = next((place for place, entry in enumerate(collection.items) if entry["_id"] == item), None)
        if place is None:
            raise HubError(404, "Collection item not found")
        found = collection.items.pop(place)
        if request.method == "PATCH":
            asked = request.json()
            found["note"] = asked.get("note", found["note"])
            collection.items.insert(asked.get("position", place), found)
        return answer_json({"success": True})


class Listener(ThreadingHTTPServer):
    """One origin. Connections are remembered, so that stopping also ends those a client keeps for later."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, owner: HubServer, origin: str, port: int) -> None:
        self.owner, self.origin, self.open = owner, origin, set()
        super().__init__(("127.0.0.1", port), Handler)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """A client that went away is no news; an error in the server is."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in [*self.open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence: HubServer keeps the requests."""

    def read(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if len(data) < length:
            # A client that was killed: half a request must not be carried out.
            raise ConnectionError("The client went away")
        return data

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while True:
            length = int(self.rfile.readline().split(b";")[0] or b"-1", 16)
            body += self.read(max(length, 0))
            if not self.rfile.readline() or length < 0:
                raise ConnectionError("The client went away")
            if length == 0:
                return body

    def handle_one(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = b"" if self.command == "CONNECT" else self.read_body()
        request = Request(self.command, self.path, headers, body, time.time())
        answer = self.server.owner.serve(request, self.server.origin)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = handle_one


class HubServer:
    """A Hub with its API on one port and its storage on another.

    Args:
        home: folder for the caches of clients (HF_HOME of `environment`); a temporary one by default.

    Attributes:
        store: what the Hub holds, to fill and to look into.
        token: of the account "tester", made up for this server, so that no cache knows it.
        endpoint: address of the API.
        storage: address of the storage.
        requests: all requests to both, in order; `requests[i].index == i`.
        outside: what clients tried to reach beyond this server, through the proxy that `environment` names.
        delay: seconds that every request waits before anything is done.
    """

    def __init__(self, home: str | os.PathLike[str] | None = None) -> None:
        self._temporary = home is None
        self.home = Path(tempfile.mkdtemp(prefix="hub-") if home is None else home)
        self.token = f"hf_loopback{uuid.uuid4().hex}"
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._ports = [0, 0]
        self.reset()

    def reset(self) -> None:
        """Forgets repositories, requests and faults; addresses and the token stay."""
        with self._lock:
            self.store = Store(self.token)
            self._api = Api(self)
            self.requests: list[Request] = []
            self.outside: list[Request] = []
            self._faults: list[Fault] = []
            self.delay = 0.0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> HubServer:
        """Starts, or starts again on the same ports with everything kept."""
        self._stopping = threading.Event()
        for place, origin in enumerate(("api", "storage")):
            listener = Listener(self, origin, self._ports[place])
            self._ports[place] = listener.server_address[1]
            self._listeners.append(listener)
            threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Closes both ports and every connection; clients are then refused."""
        self._stopping.set()
        while self._listeners:
            self._listeners.pop().close()

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._temporary:
            shutil.rmtree(self.home, ignore_errors=True)

    def fail(
        self,
        which: int | str | Callable[[Request], bool],
        how: str,
        times: float = 1,
        *,
        seconds: float = 0.0,
        retry_after: int | None = None,
    ) -> None:
        """Makes requests fail. Of several faults that fit a request, the first that was asked for is used.

        Args:
            which: the index of a request in `requests`, the name of an endpoint, or a predicate of the request.
            how: a status such as "500", "429", "401" (502 to 504 come with HTML, as from a gateway); "drop", the
                connection is closed and nothing is done; "lost", the request is carried out and the connection then
                closed unanswered; "slow", it waits `seconds`.
            times: how often; math.inf for always.
            seconds: for "slow".
            retry_after: seconds in the header Retry-After, which the client waits for and one more.
        """
        if not (how in ("drop", "lost", "slow") or re.fullmatch("[45][0-9][0-9]", how)):
            raise ValueError(f"how is a status from 400 on, 'drop', 'lost' or 'slow', not {how!r}")

        def fits(request: Request) -> bool:
            if callable(which):
                return which(request)
            return which in (request.index, request.endpoint)

        with self._lock:
            self._faults.append(Fault(fits, how, times, seconds, retry_after))

    def clear_faults(self) -> None:
        with self._lock:
            self._faults.clear()

    def serve(self, request: Request, origin: str) -> Answer | None:
        """Answers one request; None closes the connection."""
        if request.method == "CONNECT" or request.path.startswith("http"):
            self.outside.append(request)
            return refusal(HubError(404, "Nothing is reachable but the Hub under test"))
        work = self._find(request, origin)
        with self._lock:
            fault = self._number(request)
        waits = self.delay + (fault.seconds if fault and fault.how == "slow" else 0.0)
        if self._stopping.wait(waits) or (fault and fault.how == "drop"):
            return None
        if fault and fault.how.isdigit():
            answer = self._injected(fault)
        else:
            answer = self._carry_out(request, origin, work)
        if fault and fault.how == "lost":
            return None
        request.status = answer.status
        return answer

    def _number(self, request: Request) -> Fault | None:
        if request.endpoint in BACKGROUND:
            return None
        request.index = len(self.requests)
        self.requests.append(request)
        for fault in self._faults:
            if fault.times > 0 and fault.which(request):
                fault.times -= 1
                request.fault = fault.how
                return fault
        return None

    def _injected(self, fault: Fault) -> Answer:
        later = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        if fault.how in ("502", "503", "504"):
            return Answer(int(fault.how), b"<html>Bad gateway</html>", {"Content-Type": "text/html", **later})
        messages = {"401": "Invalid credentials in Authorization header", "429": "Too many requests"}
        return refusal(HubError(int(fault.how), messages.get(fault.how, "A fault that the test asked for")), **later)

    def _find(self, request: Request, origin: str) -> Callable[[], Answer]:
        """What the route for a request does, with the parts of the path filled in."""
        path = urlsplit(request.path).path
        for endpoint, method, at, pattern, function in ROUTES:
            found = pattern.fullmatch(path) if (method, at) == (request.method, origin) else None
            if found:
                parts = {name: part and unquote(part) for name, part in found.groupdict().items()}
                request.endpoint = endpoint
                request.type = parts.pop("type", None) or KINDS[parts.pop("kind", None)]
                request.id = parts.pop("id", "")
                return functools.partial(function, self._api, request, **parts)
        return lambda: refusal(HubError(404, f"Unknown address: {request.method} {path}"))

    def _carry_out(self, request: Request, origin: str, work: Callable[[], Answer]) -> Answer:
        with self._lock:
            try:
                if origin == "storage" and request.authorized:
                    # As S3 does; a client must not hand the token on to where a redirect leads.
                    raise HubError(400, "Only one auth mechanism allowed")
                request.account = self.store.account(request.token)
                return work()
            except HubError as error:
                return refusal(error)
            except (KeyError, TypeError, ValueError) as error:
                return refusal(HubError(400, f"{type(error).__name__}: {error}"))

    def made(self, since: int = 0) -> list[str]:
        """The endpoints of the requests from an index on."""
        return [request.endpoint for request in self.requests[since:]]

    def leaks(self, secret: str) -> list[str]:
        """Where a secret was sent or kept, plain or in base64, apart from the header Authorization of requests.

        Looks into addresses, the other headers, bodies, and the messages and files of every commit.
        """
        forms = [secret.encode()]
        for shift in range(3):
            # The characters that hold nothing but the secret, wherever in a text it begins.
            text = base64.b64encode(b"\0" * shift + secret.encode())
            forms.append(text[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6])

        def tells(data: bytes) -> bool:
            return any(form in data for form in forms)

        places = [f"{request.method} {request.path}" for request in self.outside if request.authorized]
        for request in self.requests + self.outside:
            headers = {name: value for name, value in request.headers.items() if name != "authorization"}
            if tells(f"{unquote(request.path)} {headers}".encode() + request.body):
                places.append(f"{request.method} {request.path}")
        for repository in self.store.repositories.values():
            for commit in repository.commits.values():
                texts = {"the message": f"{commit.title}\n{commit.message}".encode()}
                texts |= {path: blob.data for path, blob in commit.files.items()}
                places += [f"{name} of {repository.id} at {commit.oid}" for name in texts if tells(texts[name])]
        return places

    def environment(
        self, home: str | os.PathLike[str] | None = None, token: str | None = "", **changes: str
    ) -> dict[str, str]:
        """The whole environment for a process whose clients talk to this server and to nothing else.

        Args:
            home: HF_HOME, another folder for a client without the caches of the others.
            token: HF_TOKEN, this server's by default; None for a process that is not logged in.
            **changes: further variables.
        """
        ours = re.compile(r"(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS)_\w+|\w+_proxy", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
        folder = Path(home or self.home)
        token = self.token if token == "" else token
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder),
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            # datasets counts loads with a request to S3.
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            **self.proxies(),
            **({"HF_TOKEN": token} if token else {}),
            **changes,
        }

    def proxies(self) -> dict[str, str]:
        names = {name: self.endpoint for name in ("http_proxy", "https_proxy", "all_proxy")}
        names["no_proxy"] = "127.0.0.1"
        return {**names, **{name.upper(): value for name, value in names.items()}}
