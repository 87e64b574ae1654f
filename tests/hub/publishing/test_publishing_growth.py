"""Lineages that are published, and go on: what is new is added, and what is there points to it."""

import shutil
import threading
import time

import pytest
import yaml
from lineage_folders import ENSEMBLE, add_ensemble, lineage, network
from manifests import content, record, training

from born_again.hub.files import HubSettings, is_published, unpublished
from born_again.hub.publishing import HubPublisher, publish_lineage
from born_again.lineage.manifest import Manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return lineage(tmp_path_factory.mktemp("made") / "out", [network("lstm", seed) for seed in range(3)])


@pytest.fixture
def folder(made, tmp_path):
    """Of a teacher and a student; the second student is trained, and not written down."""
    folder = shutil.copytree(made, tmp_path / "out")
    manifest = Manifest.read(folder)
    manifest.content["spec"]["generations"] = 1
    manifest.generations.pop()
    manifest.save()
    return folder


def grow(folder, made) -> None:
    manifest = Manifest.read(folder)
    manifest.content["spec"]["generations"] = 2
    manifest.generations.append(Manifest.read(made).generations[2])
    manifest.save()


def states(folder) -> list[dict]:
    return [record["hub"] for record in Manifest.read(folder).generations]


def front_matter(hub, index) -> dict:
    card = hub.store.repositories["model", f"born-again/tiny-gen{index}"].at("main").files["README.md"].data.decode()
    return yaml.safe_load(card.split("---\n")[1])


def titles(hub, name) -> list[str]:
    return [commit.title for commit in hub.store.repositories["model", f"born-again/tiny-{name}"].history()][:-1]


def items(hub) -> list[str]:
    (collection,) = hub.store.collections.values()
    return [item["id"].removeprefix("born-again/tiny-") for item in collection.items]


def test_a_lineage_that_grows(logged_in_hub, folder, made):
    assert publish_lineage(folder, "born-again") == {}
    before = states(folder)
    assert items(logged_in_hub) == ["gen0", "gen1"]
    assert front_matter(logged_in_hub, 0)["new_version"] == "born-again/tiny-gen1"
    assert "new_version" not in front_matter(logged_in_hub, 1)

    grow(folder, made)
    assert unpublished(Manifest.read(folder)) == {"gen2": "not tried yet", "collection": "not tried yet"}
    assert publish_lineage(folder) == {}
    assert items(logged_in_hub) == ["gen0", "gen1", "gen2"]
    assert Manifest.read(folder).content["hub"]["newest"] == "born-again/tiny-gen2"
    assert [front_matter(logged_in_hub, index).get("new_version") for index in range(3)] == [
        "born-again/tiny-gen2",
        "born-again/tiny-gen2",
        None,
    ]
    # The record names the commit of the weights, whatever became of the card.
    assert [state["commit"] for state in states(folder)[:2]] == [state["commit"] for state in before]
    assert [
        state["card_sha256"] != old["card_sha256"] for state, old in zip(states(folder), before, strict=False)
    ] == [
        True,
        True,
    ]
    renewed = "The card points to the newest generation"
    assert titles(logged_in_hub, "gen0") == [renewed, renewed, "Generation 0 of tiny"]
    assert titles(logged_in_hub, "gen1") == [renewed, "Generation 1 of tiny"]
    assert titles(logged_in_hub, "gen2") == ["Generation 2 of tiny"]


def test_an_ensemble_that_comes_later_and_then_another(logged_in_hub, folder, made):
    assert publish_lineage(folder, "born-again") == {}
    add_ensemble(folder, [0, 1])
    assert list(unpublished(Manifest.read(folder))) == ["ensemble", "collection"]
    assert publish_lineage(folder) == {} and items(logged_in_hub) == ["gen0", "gen1", "ensemble"]
    grow(folder, made)
    add_ensemble(folder, [1, 2])
    assert list(unpublished(Manifest.read(folder))) == ["gen2", "ensemble", "collection"]
    assert publish_lineage(folder) == {} and items(logged_in_hub) == ["gen0", "gen1", "ensemble", "gen2"]
    assert titles(logged_in_hub, "ensemble") == ["Ensemble of generations 1, 2", "Ensemble of generations 0, 1"]
    assert unpublished(Manifest.read(folder)) == {}


def test_a_second_publish_writes_nothing(logged_in_hub, folder):
    add_ensemble(folder, [0, 1])
    assert publish_lineage(folder, "born-again") == {}
    start = len(logged_in_hub.requests)
    assert publish_lineage(folder, "born-again") == {} and logged_in_hub.made(start) == []
    # Nor does one that has lost what it knew, but for finding out.
    manifest = Manifest.read(folder)
    for index in range(2):
        manifest.update(index, hub=None)
    del manifest.content["hub"]
    manifest.save()
    commits = [len(repository.commits) for repository in logged_in_hub.store.repositories.values()]
    assert publish_lineage(folder, "born-again") == {}
    ours = {"create-repo", "create-collection", "add-collection-item"}  # each was answered that it is there
    asked = [request for request in logged_in_hub.requests[start:] if request.endpoint in ours]
    assert all(request.status == 409 for request in asked)
    assert [titles(logged_in_hub, name)[-1] for name in ("gen0", "gen1")] == [
        "Generation 0 of tiny",
        "Generation 1 of tiny",
    ]
    # The commit of the teacher, which its student's card names, was found again or is the one of the renewed card.
    assert len(commits) == 3 and items(logged_in_hub) == ["gen0", "gen1", "ensemble"]


def test_a_collection_with_another_title_is_gone_on_with(logged_in_hub, folder, made):
    assert publish_lineage(folder, "born-again") == {}
    (collection,) = logged_in_hub.store.collections.values()
    collection.title = "Networks that were born again"
    grow(folder, made)
    assert publish_lineage(folder) == {} and items(logged_in_hub) == ["gen0", "gen1", "gen2"]


def test_a_collection_that_was_deleted_is_made_anew(logged_in_hub, folder, made):
    assert publish_lineage(folder, "born-again") == {}
    logged_in_hub.store.collections.clear()
    grow(folder, made)
    assert publish_lineage(folder) == {} and items(logged_in_hub) == ["gen0", "gen1", "gen2"]
    ((slug, _),) = logged_in_hub.store.collections.items()
    assert Manifest.read(folder).content["hub"]["collection"]["slug"] == slug


def test_a_card_that_cannot_be_renewed_waits(logged_in_hub, folder):
    logged_in_hub.fail(lambda request: b"newest generation" in request.body, "500")
    assert list(publish_lineage(folder, "born-again")) == ["collection"]
    assert [state["status"] for state in states(folder)] == ["published"] * 2
    assert publish_lineage(folder) == {}
    assert front_matter(logged_in_hub, 0)["new_version"] == "born-again/tiny-gen1"


# ---- States ----

PUBLISHED = {"status": "published", "repo": "me/tiny-words-gen0", "commit": "0" * 40}
PENDING = {"status": "pending", "repo": "me/tiny-words-gen0", "commit": None, "message": "the Hub said no"}
ALL = [record(index, hub={**PUBLISHED, "repo": f"me/{index}"}) for index in range(4)]
GATHERED = {"status": "published", "slug": "me/tiny-1", "items": [f"me/{index}" for index in range(4)]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (content(training(0)), {}),
        (content(record(0), training(1)), {"gen0": "not tried yet"}),
        (content(record(0, hub=PENDING), record(1)), {"gen0": "the Hub said no", "gen1": "not tried yet"}),
        (content(record(0, hub=PUBLISHED), training(1)), {}),
        (content(record(0, hub={"status": "published"})), {"gen0": "not tried yet"}),  # nobody knows where
        (content(*ALL), {"collection": "not tried yet"}),
        (content(*ALL, hub={"collection": GATHERED}), {}),
        (content(*ALL, hub={"collection": {**GATHERED, "items": ["me/0"]}}), {"collection": "not tried yet"}),
        (content(*ALL, hub={"collection": {"status": "pending", "message": "full"}}), {"collection": "full"}),
        (
            content(*ALL, hub={"collection": GATHERED}, ensembles=[{**ENSEMBLE, "weights_sha256": ["0", "1"]}]),
            {"ensemble": "not tried yet", "collection": "not tried yet"},
        ),
        (
            content(
                *ALL,
                hub={"collection": GATHERED},
                ensembles=[{**ENSEMBLE, "weights_sha256": ["0", "1"], "metrics": {}}],
            ),
            {},
        ),
    ],
)
def test_what_is_not_on_the_hub(tmp_path, values, expected):
    assert unpublished(Manifest(tmp_path / "lineage.json", values)) == expected


def test_published_says_where():
    assert not any(map(is_published, [None, {}, PENDING, {"status": "published"}, {**PUBLISHED, "commit": None}]))
    assert is_published(PUBLISHED) and is_published(GATHERED)


def test_a_record_that_is_being_added_is_waited_for(tmp_path):
    """The training adds a record in two steps, under the lock."""
    manifest = Manifest(tmp_path / "lineage.json", content(record(0)))
    found = []
    thread = threading.Thread(target=lambda: found.append(unpublished(manifest)))
    with manifest.lock:
        manifest.generations.append({"index": 1})
        thread.start()
        time.sleep(0.05)
        manifest.generations[1].update(record(1))
    thread.join()
    assert found == [{"gen0": "not tried yet", "gen1": "not tried yet"}]


def test_a_generation_that_finishes_during_an_upload_waits_for_the_next_round(hub, made, tmp_path, caplog):
    folder = shutil.copytree(made, tmp_path / "out")
    manifest = Manifest.read(folder)
    manifest.update(2, status="training")
    publisher = HubPublisher(manifest, HubSettings("born-again"), hub.token)
    upload = publisher._hub.upload

    def slow(repo, *arguments):
        commit = upload(repo, *arguments)
        if repo.endswith("gen1"):
            manifest.update(2, status="finished")
            weights = [record["weights_sha256"] for record in manifest.generations[:2]]
            manifest.content["ensembles"] = [{**ENSEMBLE, "members": [0, 1], "weights_sha256": weights}]
        return commit

    publisher._hub.upload = slow
    assert "gen2" in publisher.publish() and "TypeError" not in caplog.text
    assert publisher.publish() == {}
