"""What a test sees of a small Hub that a lineage was published to, and of the lineage's own account of it."""

from pathlib import Path

import yaml
from hub_server import HubServer
from hub_store import Blob

from born_again.lineage.manifest import Manifest


def files(hub: HubServer, repo: str, revision: str = "main") -> dict[str, Blob]:
    return hub.store.repositories["model", repo].at(revision).files


def card(hub: HubServer, repo: str, revision: str = "main") -> dict:
    return yaml.safe_load(files(hub, repo, revision)["README.md"].data.decode().split("---\n")[1])


def repos(hub: HubServer) -> list[str]:
    return [id for _, id in hub.store.repositories]


def states(folder: Path) -> list[dict]:
    return [record["hub"] for record in Manifest.read(folder).generations]


def titles(hub: HubServer, repo: str) -> list[str]:
    return [commit.title for commit in hub.store.repositories["model", repo].history()]
