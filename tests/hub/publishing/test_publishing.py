"""Lineages on their way to the Hub: what goes up, when, what is refused, and what is written down of it."""

import json
import shutil

import pytest
from hub_store import Blob
from hub_views import card, files, repos, states, titles

from born_again.hub.client import HubError
from born_again.hub.files import HubSettings, generation_files, render_cards
from born_again.hub.publishing import HubPublisher, publish_lineage
from born_again.lineage.manifest import Manifest
from born_again.report.figures import draw_curve

IMAGE_FILES = {
    ".gitattributes",
    "README.md",
    "cifar_network.py",
    "config.json",
    "lineage.json",
    "model.safetensors",
    "modeling_wide_resnet_cifar.py",
    "wide_resnet_cifar.py",
}


# ---- Preflight ----


def no_token(hub, patch):
    patch.delenv("HF_TOKEN")


def wrong_token(hub, patch):
    patch.setenv("HF_TOKEN", "hf_nobody")


def reader_of_the_organisation(hub, patch):
    hub.store.accounts[hub.token].orgs["born-again"] = "read"


def reading_token(hub, patch):
    hub.store.accounts[hub.token].role = "read"


def fine_grained_token(hub, patch):
    """One that may not write to a repository that is there already."""
    hub.store.accounts[hub.token].role = "fineGrained"
    hub.fail("create-repo", "403")
    hub.fail("auth-check", "403")


def no_answer(hub, patch):
    hub.fail("whoami", "drop")


def gateway(hub, patch):
    hub.fail("whoami", "503")


@pytest.mark.parametrize(
    ("trouble", "values", "message"),
    [
        (no_token, {}, "hub_namespace: 'born-again' cannot be published to: .*Log in with `hf auth login`"),
        (wrong_token, {}, "hub_namespace: .*Invalid user token.*Log in with `hf auth login`, or set HF_TOKEN"),
        (
            None,
            {"namespace": "nobody"},
            r"got 'nobody', expected 'tester' or an organisation of theirs \(born-again\)",
        ),
        (reader_of_the_organisation, {}, "'tester' may only read in 'born-again', expected the role of a contributor"),
        (reading_token, {}, "hub_token: the token of 'tester' may only read, expected one that may write"),
        (
            None,
            {"license": "apache2"},
            "hub_license: got 'apache2', expected one that the Hub knows, such as apache-2",
        ),
        (no_answer, {}, r"cannot be published to: http://127.0.0.1:\d+ cannot be reached .* Try again later"),
        (gateway, {}, "cannot be published to: .*503.* Try again later"),
    ],
)
def test_the_preflight_names_the_remedy_before_anything_is_made(
    logged_in_hub, monkeypatch, folder, trouble, values, message
):
    before = (folder / "lineage.json").read_bytes()
    if trouble is not None:
        trouble(logged_in_hub, monkeypatch)
    with pytest.raises(HubError, match=message) as caught:
        publish_lineage(folder, **{"namespace": "born-again", **values})
    assert "--hub_defer" not in str(caught.value)  # there is no training
    assert repos(logged_in_hub) == [] and logged_in_hub.store.collections == {}
    assert (folder / "lineage.json").read_bytes() == before


def test_a_fine_grained_token_is_asked_whether_it_may_write(logged_in_hub, monkeypatch, folder):
    logged_in_hub.store.make("model", "born-again/tiny-gen0")
    fine_grained_token(logged_in_hub, monkeypatch)
    with pytest.raises(HubError, match="403.* a token that may"):
        publish_lineage(folder, "born-again")
    assert "auth-check" in logged_in_hub.made()


@pytest.mark.parametrize("private", [True, False])
def test_the_preflight_makes_the_first_repository(logged_in_hub, folder, private):
    HubPublisher(Manifest.read(folder), HubSettings("tester", private=private)).preflight()
    ((_, repo),) = logged_in_hub.store.repositories.items()
    assert (repo.id, repo.private) == ("tester/tiny-gen0", private)
    (made,) = [request.json() for request in logged_in_hub.requests if request.endpoint == "create-repo"]
    assert made.get("visibility") == ("private" if private else None)  # or as the organisation has it
    assert states(folder) == [None, None]


def test_a_public_repository_is_not_taken_for_a_private_one(logged_in_hub, folder):
    logged_in_hub.store.make("model", "born-again/tiny-gen0")
    with pytest.raises(HubError, match="born-again/tiny-gen0 is public, expected a private repository; make it"):
        publish_lineage(folder, "born-again", private=True)
    logged_in_hub.store.repositories["model", "born-again/tiny-gen0"].private = True
    assert publish_lineage(folder, "born-again", private=True) == {}


def test_nothing_is_asked_where_everything_is_published(logged_in_hub, folder):
    assert publish_lineage(folder, "born-again") == {}
    start, before = len(logged_in_hub.requests), (folder / "lineage.json").read_bytes()
    assert publish_lineage(folder) == {} == publish_lineage(folder, "born-again")
    assert logged_in_hub.made(start) == [] and (folder / "lineage.json").read_bytes() == before


# ---- What goes up ----


def test_what_goes_up_of_an_image_generation(logged_in_hub, folder):
    assert publish_lineage(folder, "born-again") == {}
    assert sorted(repos(logged_in_hub)) == ["born-again/tiny-gen0", "born-again/tiny-gen1"]
    for index in range(2):
        held = files(logged_in_hub, f"born-again/tiny-gen{index}")
        assert set(held) == IMAGE_FILES
        assert held["model.safetensors"].data == (folder / f"gen{index}/model.safetensors").read_bytes()
        settings = json.loads(held["config.json"].data)
        assert settings.pop("auto_map") and settings == json.loads((folder / f"gen{index}/config.json").read_text())
        told = json.loads(held["lineage.json"].data)
        assert [record["index"] for record in told["generations"]] == list(range(index + 1))
        assert "ensemble" not in told["hub"] and told["hub"]["namespace"] == "born-again"
        assert f'"hf-hub:born-again/tiny-gen{index}"' in held["README.md"].data.decode()
    (collection,) = logged_in_hub.store.collections.values()
    assert (collection.title, collection.owner, collection.private) == ("tiny: born again", "born-again", False)
    assert [(item["id"], item["note"]) for item in collection.items] == [
        ("born-again/tiny-gen0", "Generation 0, the teacher."),
        ("born-again/tiny-gen1", "Generation 1, taught by generation 0."),
    ]


def test_what_goes_up_of_a_language_model_and_an_ensemble(logged_in_hub, text_folder):
    assert publish_lineage(text_folder, "born-again") == {}
    held = files(logged_in_hub, "born-again/tiny-gen2")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(held)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert held[name].data == (text_folder / "gen2" / name).read_bytes()
    ensemble = files(logged_in_hub, "born-again/tiny-ensemble")
    assert set(ensemble) == {".gitattributes", "README.md", "ensemble.json"}
    known = states(text_folder)
    assert [(m["repo"], m["commit"]) for m in json.loads(ensemble["ensemble.json"].data)["members"]] == [
        (f"born-again/tiny-gen{index}", known[index]["commit"]) for index in (1, 2)
    ]
    assert card(logged_in_hub, "born-again/tiny-ensemble")["base_model"] == [
        "born-again/tiny-gen1",
        "born-again/tiny-gen2",
    ]
    (collection,) = logged_in_hub.store.collections.values()
    assert collection.items[-1]["id"] == "born-again/tiny-ensemble"


def test_nothing_but_what_is_on_the_list_goes_up(logged_in_hub, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a-well-kept-secret")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        ".env",
        "secret.txt",
        "README.md",
        "notes.json",
        "x.safetensors",
    ):
        (folder / "gen0" / name).write_text("a-well-kept-secret")
    for name in ("vocab.json", "tokenizer.json", "merges.txt"):  # names that are on it
        (folder / "gen0" / name).symlink_to(secret)
    (folder / "gen0/checkpoint-1").mkdir()
    (folder / "gen0/checkpoint-1/model.safetensors").write_text("a-well-kept-secret")
    assert publish_lineage(folder, "born-again") == {}
    assert set(files(logged_in_hub, "born-again/tiny-gen0")) == IMAGE_FILES
    assert logged_in_hub.leaks("a-well-kept-secret") == [] == logged_in_hub.leaks(logged_in_hub.token)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_in_the_place_of_what_must_go_up_is_refused(logged_in_hub, folder, tmp_path, name):
    shutil.move(folder / "gen0" / name, tmp_path / name)
    (folder / "gen0" / name).symlink_to(tmp_path / name)
    left = publish_lineage(folder, "born-again")
    assert f"{name}: is a link, expected the file itself" in left["gen0"] and left["gen1"] == "not tried yet"
    assert set(files(logged_in_hub, "born-again/tiny-gen0")) == {".gitattributes"}


def test_the_training_curve_goes_up(logged_in_hub, folder):
    assert draw_curve([{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}], folder / "gen0/training.png")
    assert publish_lineage(folder, "born-again") == {}
    held = files(logged_in_hub, "born-again/tiny-gen0")
    assert held["training.png"].data == (folder / "gen0/training.png").read_bytes()
    assert "](training.png)" in held["README.md"].data.decode()
    assert titles(logged_in_hub, "born-again/tiny-gen0")[1:] == ["Generation 0 of tiny", "initial commit"]


def test_the_reports_picture_goes_up_where_it_is_asked_for_and_its_page_never(logged_in_hub, folder):
    for name in ("report.html", "report.png", "report_images.safetensors", "gen0/history.json"):
        (folder / name).write_bytes(b"drawn")
    assert publish_lineage(folder, "born-again") == {}
    assert set(files(logged_in_hub, "born-again/tiny-gen0")) == IMAGE_FILES
    assert "report" not in files(logged_in_hub, "born-again/tiny-gen0")["README.md"].data.decode()
    render_cards(folder)
    card = (folder / "gen0/README.md").read_text()
    assert "[The report](../report.html)" in card and "](../report.png)" in card
    manifest = Manifest.read(folder)
    manifest.content["hub"]["report"] = True
    found = generation_files(manifest, 0)
    assert found["report.png"].read_bytes() == b"drawn" and b"](report.png)" in found["README.md"]
    assert not {"report.html", "report_images.safetensors", "history.json"} & found.keys()


# ---- Verification, immutability, order ----


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("lost", [True, False])
def test_what_the_hub_does_not_hold_as_it_was_sent_is_not_published(logged_in_hub, folder, name, lost):
    def corrupt(request):
        repository = logged_in_hub.store.repositories.get(("model", "born-again/tiny-gen0"))
        if request.endpoint == "paths-info" and repository is not None and name in repository.at("main").files:
            held = repository.at("main").files
            if lost:
                del held[name]
            else:
                held[name] = Blob(b"x", held[name].sha256 and "0" * 64)
            return True
        return False

    logged_in_hub.fail(corrupt, "slow")
    left = publish_lineage(folder, "born-again")
    assert f": {name} is not what was uploaded. Try again later." in left["gen0"]
    state = states(folder)[0]
    assert (state["status"], state["commit"], state["repo"]) == ("pending", None, "born-again/tiny-gen0")
    assert state["message"] == left["gen0"] and "born-again/tiny-gen1" not in repos(logged_in_hub)
    if name == "model.safetensors" and not lost:  # then they are other weights, which are not overwritten
        del logged_in_hub.store.repositories["model", "born-again/tiny-gen0"]
    assert publish_lineage(folder) == {}
    assert files(logged_in_hub, "born-again/tiny-gen0")["config.json"].data != b"x"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_other_weights_are_not_overwritten(logged_in_hub, folder, name):
    commit = logged_in_hub.store.put("model", "born-again/tiny-gen0", {name: b"others", "README.md": b"# Mine\n"})
    left = publish_lineage(folder, "born-again")
    assert left["gen0"].startswith(f"born-again/tiny-gen0 already holds other weights ({name})")
    assert "--hub_name_pattern" in left["gen0"] and left["gen1"] == "not tried yet"
    assert logged_in_hub.store.repositories["model", "born-again/tiny-gen0"].at("main") is commit
    assert not {"lfs-upload", "commit"} & set(logged_in_hub.made())
    assert states(folder)[0]["status"] == "pending" and states(folder)[1] is None
    # Elsewhere it goes.
    assert publish_lineage(folder, name_pattern="{name}-second-gen{index}") == {}
    assert states(folder)[0]["repo"] == "born-again/tiny-second-gen0"


def test_the_same_weights_are_no_others(logged_in_hub, folder):
    weights = (folder / "gen0/model.safetensors").read_bytes()
    logged_in_hub.store.put("model", "born-again/tiny-gen0", {"model.safetensors": weights, "README.md": b"# Mine\n"})
    assert publish_lineage(folder, "born-again") == {}
    assert set(files(logged_in_hub, "born-again/tiny-gen0")) == IMAGE_FILES


def test_changed_weights_are_not_published(logged_in_hub, folder):
    (folder / "gen1/model.safetensors").write_bytes(b"others")
    left = publish_lineage(folder, "born-again")
    assert list(left) == ["gen1", "collection"] and "does not hash to what lineage.json holds" in left["gen1"]


def test_a_student_comes_after_its_teacher(logged_in_hub, folder):
    logged_in_hub.fail(lambda request: request.endpoint == "commit" and request.id.endswith("gen0"), "500")
    left = publish_lineage(folder, "born-again")
    assert list(left) == ["gen0", "gen1", "collection"] and left["gen1"] == "not tried yet" == left["collection"]
    assert repos(logged_in_hub) == ["born-again/tiny-gen0"]
    assert publish_lineage(folder) == {}
    commit = states(folder)[0]["commit"]
    about = card(logged_in_hub, "born-again/tiny-gen1")
    assert about["base_model"] == "born-again/tiny-gen0"
    assert about["born_again"]["parent"] | {"weights_sha256": ""} == {
        "generation": 0,
        "weights_sha256": "",
        "repo": "born-again/tiny-gen0",
        "commit": commit,
    }
    told = json.loads(files(logged_in_hub, "born-again/tiny-gen1")["lineage.json"].data)["generations"]
    assert [record["hub"]["commit"] for record in told] == [commit, None]
    assert "model.safetensors" in files(logged_in_hub, "born-again/tiny-gen0", commit)
