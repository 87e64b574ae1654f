"""What a Hub under test must hold of a lineage's folder, whatever went wrong on the way there."""

import hashlib
from pathlib import Path

from hub_server import HubServer
from hub_store import Blob, Repository
from lineage_folders import WORDS, add_ensemble, lineage, network

from born_again.hub.files import collection_notes, ensemble_files, generation_files, is_published
from born_again.lineage.folders import WEIGHTS_NAME
from born_again.lineage.manifest import MANIFEST_NAME, Manifest, file_sha256

COMMIT = ["repo-info", "validate-yaml", "preupload", "commit", "paths-info"]
LFS = ["lfs-batch", "lfs-upload", "lfs-verify"]
GENERATION = ["create-repo", "paths-info", *COMMIT[:3], *LFS, *COMMIT[3:]]
COLLECTION = ["create-collection", *["add-collection-item"] * 3, "collection"]
# Of a teacher, one student and their ensemble; then the card of the teacher points to the student.
PARTS = [["whoami", "create-repo"], GENERATION, GENERATION, ["create-repo", *COMMIT], COMMIT, COLLECTION]
REQUESTS = [endpoint for part in PARTS for endpoint in part]
RENEWED = "The card points to the newest generation"


def small_lineage(folder: Path) -> Path:
    """Finished and not published: publishing it makes REQUESTS."""
    lineage(folder, [network("gpt2", seed) for seed in range(2)], words=[WORDS] * 2)
    add_ensemble(folder, [0, 1])
    return folder


def weights(folder: Path) -> list[bytes]:
    """The bytes of each generation's weights."""
    return [path.read_bytes() for path in sorted(folder.glob(f"gen*/{WEIGHTS_NAME}"))]


def hidden(folder: Path) -> list[str]:
    """What an interrupted writing has left in a lineage's folder, its lock among it."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def check_state(hub: HubServer, folder: Path) -> Manifest:
    """Holds what lineage.json says of the Hub against what is there; something may be missing."""
    manifest = Manifest.read(folder)
    held = manifest.content.get("hub") or {}
    for record in manifest.generations:
        state = record["hub"]
        if record["status"] == "finished":
            assert file_sha256(folder / f"gen{record['index']}" / WEIGHTS_NAME) == record["weights_sha256"]
        if is_published(state):
            assert record["status"] == "finished" and state["message"] is None
            files = generation_files(manifest, record["index"])
            del files["README.md"]  # it tells of what came later
            _check_commit(hub, state["repo"], state["commit"], files)
            cards = [commit.files["README.md"].data for commit in _history(hub, state["repo"])[:-1]]
            assert state["card_sha256"] in [hashlib.sha256(card).hexdigest() for card in cards]
        elif state is not None:
            assert state["status"] == "pending" and state["message"]
    if is_published(held.get("ensemble")):
        state, record = held["ensemble"], manifest.content["ensembles"][-1]
        assert state["weights_sha256"] == record["weights_sha256"]
        named = {"ensemble.json": ensemble_files(manifest, record)["ensemble.json"]}
        _check_commit(hub, state["repo"], state["commit"], named)
    if is_published(held.get("collection")):
        items = [item["id"] for item in hub.store.collections[held["collection"]["slug"]].items]
        assert items == held["collection"]["items"]
    # Nowhere but in the header that it is for.
    assert hub.token not in (folder / MANIFEST_NAME).read_text() and hub.leaks(hub.token) == [] and hub.outside == []
    return manifest


def check_published(hub: HubServer, folder: Path, others: int = 0) -> Manifest:
    """Everything is on the Hub, and once.

    Args:
        hub: that the lineage was published to, and nothing else.
        folder: of the lineage.
        others: commits that a generation may have beside its own and the newest card's.
    """
    manifest = check_state(hub, folder)
    held = manifest.content["hub"]
    assert all(is_published(record["hub"]) for record in manifest.generations) and is_published(held["collection"])
    repos = [record["hub"]["repo"] for record in manifest.generations]
    ensembles = [held["ensemble"]["repo"]] if manifest.content.get("ensembles") else []
    assert sorted(id for _, id in hub.store.repositories) == sorted([*repos, *ensembles])
    for index, (repo, record) in enumerate(zip(repos, manifest.generations, strict=True)):
        commits = _history(hub, repo)
        titles = [f"Generation {index} of {manifest.spec.name}", "initial commit"]
        newest = [] if index == len(repos) - 1 else [RENEWED]
        assert [commit.title for commit in commits][len(commits) - len(titles) :] == titles
        if not others:
            assert [commit.title for commit in commits] == [*newest, *titles]
        assert len(commits) <= len(newest) + len(titles) + others
        trees = [commit.files for commit in commits]
        assert all(tree != before for tree, before in zip(trees, trees[1:], strict=False))  # none is empty
        hashes = [tree[WEIGHTS_NAME].sha256 for tree in trees if WEIGHTS_NAME in tree]
        assert hashes == [record["weights_sha256"]] * (len(trees) - 1)
        # The head is what would be published now.
        files = generation_files(manifest, index)
        del files["lineage.json"]  # of the moment when it was published
        _check_commit(hub, repo, "main", files)
        assert record["hub"]["card_sha256"] == hashlib.sha256(files["README.md"]).hexdigest()
    for repo in ensembles:
        assert len(_history(hub, repo)) == 1 + len({str(r["members"]) for r in manifest.content["ensembles"]})
        _check_commit(hub, repo, "main", ensemble_files(manifest, manifest.content["ensembles"][-1]))
    (collection,) = hub.store.collections.values()
    assert collection.slug == held["collection"]["slug"] and collection.owner == held["namespace"]
    assert [(item["id"], item["note"]) for item in collection.items] == list(collection_notes(manifest).items())
    assert [item["id"] for item in collection.items] == [*repos, *ensembles]
    return manifest


def _repository(hub: HubServer, repo: str) -> Repository:
    return hub.store.repositories["model", repo]


def _history(hub: HubServer, repo: str) -> list:
    return [*_repository(hub, repo).history()]


def _check_commit(hub: HubServer, repo: str, commit: str, files: dict[str, bytes | Path]) -> None:
    """Every file is at a commit of the main branch, with the bytes that are here."""
    found = _repository(hub, repo).at(commit)
    assert found in _history(hub, repo)
    assert found.files.keys() - files.keys() <= {".gitattributes", "README.md", "lineage.json"}
    for name, content in files.items():
        blob: Blob = found.files[name]
        content = content if isinstance(content, bytes) else content.read_bytes()
        assert blob.data == content and blob.sha256 in (None, hashlib.sha256(content).hexdigest()), f"{repo}: {name}"
        assert blob.sha256 is not None or not name.endswith(".safetensors")
