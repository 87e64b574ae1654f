"""The small Hub of the tests, as the real clients see it. Clients are never replaced, only what they talk to."""

import base64
import hashlib
import inspect
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import timm
import torch
from hub_fixtures import put_cifar100, redirected
from hub_server import HubServer
from hub_store import Account, check_card
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from born_again.hub.client import HTTP_LIBRARY
from born_again.models.image_classifier import create_image_classifier, load_image_classifier, save_image_classifier

REPO = "born-again/net-gen0"
CREATE, CARDS, LFS = ["create-repo"], ["validate-yaml"] * 2, ["lfs-batch", "lfs-upload", "lfs-verify"]
UPLOAD = [*CREATE, *CARDS, "preupload", *LFS, "commit"]
CARD = """---
license: apache-2.0
pipeline_tag: image-classification
tags: [born-again]
born_again: {generation: 0}
model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {type: uoft-cs/cifar100, name: CIFAR-100}
    metrics: [{type: accuracy, value: 0.5}]
---
# A network
"""


@pytest.fixture
def folder(tmp_path):
    """What a generation leaves: a card, a configuration and weights."""
    path = tmp_path / "gen0"
    path.mkdir()
    (path / "README.md").write_text(CARD)
    (path / "config.json").write_text('{"architecture": "net"}')
    weights = np.arange(50_000, dtype=np.float32)
    safetensors.numpy.save_file({"weight": weights}, path / "model.safetensors")
    return path


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def push(api, folder, **changes):
    api.create_repo(REPO, exist_ok=True)
    return api.upload_folder(repo_id=REPO, folder_path=folder, **changes)


def history(api):
    return [commit.title for commit in api.list_repo_commits(REPO)]


def test_a_pushed_folder_comes_back_byte_by_byte(hub, api, folder, tmp_path):
    commit = push(api, folder, commit_message="Generation 0")
    assert hub.made() == UPLOAD
    assert history(api) == ["Generation 0", "initial commit"]

    infos = {info.path: info for info in api.get_paths_info(REPO, [*UPLOAD, "README.md"], revision=commit.oid)}
    assert infos["README.md"].blob_id == git_hash(CARD.encode()) and infos["README.md"].lfs is None
    weights = (folder / "model.safetensors").read_bytes()
    (info,) = api.get_paths_info(REPO, "model.safetensors", revision=commit.oid)
    assert (info.lfs.size, info.size) == (len(weights), len(weights)) and info.blob_id != info.lfs.sha256
    assert info.lfs.sha256 == hashlib.sha256(weights).hexdigest()

    copy = snapshot_download(REPO, revision=commit.oid)
    for path in folder.iterdir():
        assert path.read_bytes() == Path(copy, path.name).read_bytes()
    path = hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path / "other")
    assert Path(path).read_bytes() == weights
    assert not [request for request in hub.requests if request.endpoint == "lfs-download" and request.authorized]
    assert hub.outside == [] and hub.leaks(hub.token) == []


def test_an_unchanged_folder_makes_no_commit_and_a_changed_file_travels_alone(hub, api, folder):
    first = push(api, folder)
    start = len(hub.requests)
    assert push(api, folder).oid == first.oid
    assert "commit" not in hub.made(start) and "lfs-upload" not in hub.made(start)

    (folder / "config.json").write_text("{}")
    start = len(hub.requests)
    second = push(api, folder, commit_message="Another configuration")
    lines = [json.loads(line) for line in hub.requests[-1].body.splitlines()]
    assert [line["value"].get("path") for line in lines] == [None, "config.json"]
    assert "lfs-upload" not in hub.made(start)
    repository = hub.store.repositories["model", REPO]
    assert repository.at(second.oid).parent == first.oid
    assert repository.at(first.oid).files["config.json"].data == b'{"architecture": "net"}'


@pytest.mark.parametrize(("how", "error"), [("500", HfHubHTTPError), ("drop", HTTP_LIBRARY.RemoteProtocolError)])
def test_a_commit_that_fails_leaves_no_commit(hub, api, folder, how, error):
    hub.fail("commit", how)
    with pytest.raises(error):
        push(api, folder)
    assert hub.made() == UPLOAD and hub.requests[-1].fault == how
    assert history(api) == ["initial commit"]


def test_a_gateway_answers_in_html(hub, api, folder):
    """Where huggingface_hub reads the answer before its status, the error is about JSON, and a ValueError."""
    hub.fail("create-repo", "502")
    with pytest.raises(HfHubHTTPError, match="502"):
        push(api, folder)
    hub.fail("validate-yaml", "503")
    with pytest.raises(json.JSONDecodeError):
        push(api, folder)


def test_a_lost_answer_leaves_a_commit_that_the_client_knows_nothing_of(hub, api, folder):
    hub.fail(UPLOAD.index("commit"), "lost")
    with pytest.raises(HTTP_LIBRARY.RemoteProtocolError):
        push(api, folder, commit_message="Generation 0")
    assert hub.made() == UPLOAD and hub.requests[-1].status is None
    assert history(api) == ["Generation 0", "initial commit"]
    assert push(api, folder).oid == hub.store.repositories["model", REPO].at("main").oid
    assert len(history(api)) == 2


@pytest.mark.parametrize("how", ["500", "429", "drop", "lost"])
def test_the_client_tries_an_upload_again(hub, api, folder, waits, how):
    hub.fail("lfs-upload", how, times=2, retry_after=0 if how == "429" else None)
    push(api, folder)
    assert hub.made().count("lfs-upload") == 3
    assert waits == ([1, 1] if how == "429" else [1, 2])
    assert len(history(api)) == 2


def test_the_client_gives_an_upload_up(hub, api, folder, waits):
    hub.fail("lfs-upload", "500", times=math.inf)
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'"):
        push(api, folder)
    assert hub.made() == [*CREATE, *CARDS, "preupload", "lfs-batch", *["lfs-upload"] * 6] and len(waits) == 5
    hub.clear_faults()
    push(api, folder)


def test_a_token_that_is_revoked_on_the_way(hub, api, folder):
    hub.fail(lambda request: request.endpoint == "lfs-verify", "401")
    with pytest.raises(RuntimeError) as raised:
        push(api, folder)
    assert raised.value.__cause__.response.status_code == 401


def test_slow_answers_and_a_delay_for_all(hub, api):
    hub.fail("whoami", "slow", seconds=0.2)
    started = time.perf_counter()
    api.whoami()
    assert time.perf_counter() - started >= 0.2
    hub.delay = 0.1
    started = time.perf_counter()
    api.whoami()
    assert 0.1 <= time.perf_counter() - started
    hub.delay = 0.0
    hub.fail("whoami", "slow", seconds=30)
    with pytest.raises(HTTP_LIBRARY.TimeoutException):
        huggingface_hub.get_session().get(f"{hub.endpoint}/api/whoami-v2", timeout=0.1)


def test_an_unknown_fault_is_refused(hub):
    with pytest.raises(ValueError, match="'drop', 'lost' or 'slow', not 'explode'"):
        hub.fail(0, "explode")


def test_a_hub_that_goes_down_and_comes_back_keeps_what_it_has(hub, api, folder):
    push(api, folder)
    hub.stop()
    with pytest.raises(HTTP_LIBRARY.TransportError):
        api.model_info(REPO)
    hub.start()
    assert api.model_info(REPO).sha == hub.store.repositories["model", REPO].branches["main"]


def test_who_may_create_and_write(hub, api, folder):
    assert api.whoami()["orgs"][0]["roleInOrg"] == "admin"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as raised:
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()
    assert raised.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").create_repo("tester/net")
    with pytest.raises(HfHubHTTPError, match="don't have the rights to create a model under the namespace 'google'"):
        api.create_repo("google/net")
    with pytest.raises(HfHubHTTPError, match="You already created this model repo"):
        api.create_repo("tester/net") and api.create_repo("tester/net")
    assert api.create_repo("tester/net", exist_ok=True).repo_id == "tester/net"

    hub.store.put("model", "google/net", {"config.json": b"{}"})
    assert api.create_repo("google/net", exist_ok=True).repo_id == "google/net"
    hub.store.accounts["hf_reader"] = Account("tester", role="read")
    for id, token in {"google/net": hub.token, "tester/net": "hf_reader"}.items():
        with pytest.raises(HfHubHTTPError, match="Forbidden") as raised:
            api.upload_folder(repo_id=id, folder_path=folder, token=token)
        assert raised.value.response.status_code == 403


def test_a_private_a_gated_and_a_missing_repository(hub, api):
    api.create_repo(REPO, private=True)
    hub.store.put("model", "google/gated", {"config.json": b"{}"}, gated=True)
    hub.store.accounts["hf_other"] = Account("other")
    assert api.model_info(REPO).private
    for token, status in {False: 401, "hf_other": 404}.items():
        for id in (REPO, "born-again/missing"):
            with pytest.raises(RepositoryNotFoundError) as raised:
                api.model_info(id, token=token)
            assert raised.value.response.status_code == status
            with pytest.raises(RepositoryNotFoundError):
                hf_hub_download(id, ".gitattributes", token=token)
        with pytest.raises(GatedRepoError):
            hf_hub_download("google/gated", "config.json", token=token)
    assert Path(hf_hub_download(REPO, ".gitattributes", token=hub.token)).stat().st_size

    api.update_repo_settings(REPO, private=False)
    assert api.repo_exists(REPO, token=False) and api.model_info("google/gated", token=False).gated == "auto"
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_half_a_request_is_not_carried_out(hub, api):
    api.create_repo(REPO)
    port = int(hub.endpoint.rsplit(":", 1)[1])
    start = f"POST /api/models/{REPO}/commit/main HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n"
    line = json.dumps({"key": "header", "value": {"summary": "Half"}}) + "\n"
    for rest in (
        f"Content-Length: 999\r\n\r\n{line}",
        f"Transfer-Encoding: chunked\r\n\r\n{len(line):x}\r\n{line}\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall((start + rest).encode())
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    whole = f"{start}Transfer-Encoding: chunked\r\n\r\n{len(line):x}\r\n{line}\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(whole.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert history(api) == ["Half", "initial commit"]


def test_branches_tags_and_what_does_not_exist(hub, api, folder):
    first = push(api, folder)
    api.create_branch(REPO, branch="try/one")
    api.create_tag(REPO, tag="v1", revision=first.oid)
    for create in (
        lambda **more: api.create_branch(REPO, branch="try/one", **more),
        lambda **m: api.create_tag(REPO, tag="v1", **m),
    ):
        with pytest.raises(HfHubHTTPError) as raised:
            create()
        assert raised.value.response.status_code == 409
    (folder / "config.json").write_text("{}")
    second = push(api, folder, revision="try/one", commit_message="On a branch")
    api.create_tag(REPO, tag="v1", revision="try/one", exist_ok=True)
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first.oid, "try/one": second.oid}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first.oid)]
    at = {
        revision: Path(hf_hub_download(REPO, "config.json", revision=revision)).read_text()
        for revision in ("v1", "try/one")
    }
    assert at == {"v1": '{"architecture": "net"}', "try/one": "{}"}

    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v2")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json")
    assert not api.file_exists(REPO, "missing.json") and api.file_exists(REPO, "config.json", revision="v1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="try/one")
    assert not api.revision_exists(REPO, "v1") and api.revision_exists(REPO, first.oid)


def test_a_commit_onto_a_parent_that_is_no_longer_the_head(hub, api, folder):
    first = push(api, folder)
    api.delete_file("config.json", REPO, parent_commit=first.oid)
    assert not api.file_exists(REPO, "config.json")
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as raised:
        push(api, folder, parent_commit=first.oid)
    assert raised.value.response.status_code == 412
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("config.json", REPO)


def test_listings(hub, api, folder):
    (folder / "code").mkdir()
    (folder / "code" / "net.py").write_text("")
    push(api, folder, commit_message="Generation 0")
    assert sorted(api.list_repo_files(REPO)) == [
        ".gitattributes",
        "README.md",
        "code/net.py",
        "config.json",
        "model.safetensors",
    ]
    paths = [entry.path for entry in api.list_repo_tree(REPO)]
    assert paths == [".gitattributes", "README.md", "code", "config.json", "model.safetensors"]
    (entry,) = api.list_repo_tree(REPO, "code", expand=True)
    assert (entry.path, entry.last_commit.title) == ("code/net.py", "Generation 0")
    with pytest.raises(EntryNotFoundError):
        [*api.list_repo_tree(REPO, "weights")]

    info = api.model_info(REPO, files_metadata=True)
    assert {entry.rfilename for entry in info.siblings if entry.lfs} == {"model.safetensors"}
    assert (info.pipeline_tag, info.card_data.license, info.tags) == (
        "image-classification",
        "apache-2.0",
        ["born-again"],
    )
    assert info.card_data["born_again"] == {"generation": 0}
    api.auth_check(REPO, write=True)


def test_a_part_of_a_file(hub, api, folder):
    push(api, folder)
    weights = (folder / "model.safetensors").read_bytes()
    url = huggingface_hub.hf_hub_url(REPO, "model.safetensors")
    session = huggingface_hub.get_session()
    for asked, expected in {"5-9": weights[5:10], "200000-": weights[200_000:], "-4": weights[-4:]}.items():
        answer = session.get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)
    assert session.get(url, headers={"Range": "bytes=9999999-"}).status_code == 416
    assert api.get_safetensors_metadata(REPO).parameter_count == {"F32": 50_000}


def test_a_collection_is_made_once_and_keeps_its_notes(hub, api, folder):
    push(api, folder)
    made = api.create_collection("Born again: CIFAR-100", namespace="born-again", exists_ok=True)
    again = api.create_collection("Born again: CIFAR-100", namespace="born-again", exists_ok=True)
    assert made.slug == again.slug and made.slug.startswith("born-again/born-again-cifar-100-")
    with pytest.raises(HfHubHTTPError):
        api.create_collection("Born again: CIFAR-100", namespace="born-again")
    with pytest.raises(HfHubHTTPError, match="rights"):
        api.create_collection("Born again", namespace="google")

    for note in ("generation 0", "another note"):
        found = api.add_collection_item(made.slug, REPO, "model", note=note, exists_ok=True)
    with pytest.raises(HfHubHTTPError):
        api.add_collection_item(made.slug, REPO, "model")
    with pytest.raises(RepositoryNotFoundError):
        api.add_collection_item(made.slug, "born-again/missing", "model")
    api.create_repo("born-again/net-gen1")
    api.add_collection_item(made.slug, "born-again/net-gen1", "model")
    api.update_collection_item(made.slug, found.items[0].item_object_id, note="the teacher")
    found = api.get_collection(made.slug)
    assert [(item.item_id, item.note) for item in found.items] == [
        (REPO, "the teacher"),
        ("born-again/net-gen1", None),
    ]
    assert [collection.slug for collection in api.list_collections(owner="born-again")] == [made.slug]
    api.delete_collection_item(made.slug, found.items[1].item_object_id)
    assert len(api.get_collection(made.slug).items) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: apache-2.0", "license: [unclosed", "bad YAML"),
        ("license: apache-2.0", "license: 2", '"license" must be a string'),
        ("license: apache-2.0", "license: mine", '"license" must be one of'),
        ("image-classification\ntags", "[a]\ntags", '"pipeline_tag" must be a string'),
        ("tags: [born-again]", "base_model: ../gen0/model", '"base_model" with value "../gen0/model" is not valid'),
        ("- name: net", "- title: net", r"model-index\[0\].name\" is required"),
        ("name: CIFAR-100", "split: test", r"model-index\[0\].results\[0\].dataset.name\" is required"),
        (", value: 0.5", "", r"results\[0\].metrics\[0\].value\" is required"),
    ],
)
def test_a_broken_card_is_refused(hub, api, folder, old, new, message):
    assert CARD.count(old) == 1
    (folder / "README.md").write_text(CARD.replace(old, new))
    with pytest.raises(ValueError, match=message):
        push(api, folder)
    assert hub.made() == ["create-repo", "validate-yaml"]


needs_validation_at_the_endpoint = pytest.mark.skipif(
    "https://huggingface.co" in inspect.getsource(ModelCard.validate).rpartition('"""')[2],
    reason="this huggingface_hub validates cards at huggingface.co alone",
)


@needs_validation_at_the_endpoint
def test_a_broken_card_is_refused_by_itself_and_in_a_commit(hub, api):
    broken = CARD.replace("apache-2.0", "mine")
    with pytest.raises(ValueError, match='Error: "license" must be one of'):
        ModelCard(broken).validate()
    api.create_repo(REPO)
    lines = [
        {"key": "header", "value": {"summary": "A card"}},
        {"key": "file", "value": {"path": "README.md", "content": base64.b64encode(broken.encode()).decode()}},
    ]
    address = f"{hub.endpoint}/api/models/{REPO}/commit/main"
    token = {"Authorization": f"Bearer {hub.token}"}
    answer = huggingface_hub.get_session().post(address, content="\n".join(map(json.dumps, lines)), headers=token)
    assert answer.status_code == 400 and "Invalid metadata in README.md" in answer.headers["X-Error-Message"]
    assert history(api) == ["initial commit"]


@needs_validation_at_the_endpoint
def test_cards_that_pass(hub, api):
    assert check_card(CARD) == ([], [])
    result = huggingface_hub.EvalResult("image-classification", "uoft-cs/cifar100", "CIFAR-100", "accuracy", 0.5)
    data = ModelCardData(model_name="net", eval_results=[result], base_model=REPO, license="mit", language="en")
    ModelCard(f"---\n{data.to_yaml()}\n---\n").validate()
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.create_repo(REPO)
        api.upload_file(path_or_fileobj=b"# No metadata", path_in_repo="README.md", repo_id=REPO)


def test_a_secret_is_found_wherever_it_went(hub, api):
    assert hub.leaks(hub.token) == []
    api.create_repo(REPO)
    for start in range(3):
        content = b"x" * start + hub.token.encode()
        api.upload_file(path_or_fileobj=content, path_in_repo=f"{start}.txt", repo_id=REPO)
        assert any(hub.token not in request.body.decode() for request in hub.requests)
        assert base64.b64encode(content) in hub.requests[-1].body
    assert len([place for place in hub.leaks(hub.token) if place.startswith("POST")]) == 6
    assert any(place.startswith("2.txt of born-again/net-gen0") for place in hub.leaks(hub.token))


def test_what_would_leave_the_machine_is_refused_and_seen(hub):
    session = huggingface_hub.get_session()
    assert session.get("http://datasets-server.127.0.0.1:1/info?dataset=a").status_code == 404
    with pytest.raises(HTTP_LIBRARY.ProxyError):
        session.get("https://example.com/")
    assert [request.path for request in hub.outside] == [
        "http://datasets-server.127.0.0.1:1/info?dataset=a",
        "example.com:443",
    ]
    assert hub.requests == []


def test_datasets_are_loaded_in_this_process(hub):
    old = put_cifar100(hub.store, train=8, test=4)
    put_cifar100(hub.store, train=12, test=4, oid="a" * 40)
    loaded = datasets.load_dataset("uoft-cs/cifar100", revision=old.oid)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 8, "test": 4}
    row = loaded["train"][3]
    assert row["img"].size == (32, 32) and (row["fine_label"], row["coarse_label"]) == (21, 4)
    assert loaded["train"].features["fine_label"].names[21] == "fine_21"
    assert len(datasets.load_dataset("uoft-cs/cifar100", revision="a" * 40, split="train")) == 12
    assert hub.outside == []


def test_datasets_are_loaded_in_another_process(hub):
    """Without a revision the client also asks the dataset viewer, which has nothing."""
    put_cifar100(hub.store)
    program = "import datasets; print([len(s) for s in datasets.load_dataset('uoft-cs/cifar100').values()])"
    done = subprocess.run(
        [sys.executable, "-c", program], env=hub.environment(), capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split("\n")[0] == "[40, 20]", done.stderr
    viewer = hub.endpoint.replace("://", "://datasets-server.")
    assert [request.path for request in hub.outside] == [f"{viewer}/info?dataset=uoft-cs/cifar100"]
    assert {request.token for request in hub.requests if request.endpoint != "lfs-download"} == {hub.token}


def test_this_process_is_logged_out_until_it_asks(hub):
    assert huggingface_hub.get_token() is None


def test_this_process_is_logged_in_when_it_asks(logged_in_hub):
    assert HfApi().whoami()["name"] == huggingface_hub.whoami()["name"] == "tester"
    assert huggingface_hub.create_repo(REPO).startswith(logged_in_hub.endpoint)


def test_everything_is_undone(tmp_path):
    """Afterwards this process is offline again, and the address of the server leads nowhere."""
    before = {name: getattr(constants, name) for name in vars(constants) if name.isupper()}
    proxy = os.environ.get("http_proxy")
    with HubServer(tmp_path) as server, redirected(server):
        assert constants.ENDPOINT == datasets.config.HF_ENDPOINT == HfApi().endpoint == server.endpoint
        assert HfApi().whoami(token=server.token)["name"] == "tester"
    assert {name: getattr(constants, name) for name in before} == before
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE and os.environ.get("http_proxy") == proxy
    with pytest.raises(OfflineModeIsEnabled):
        HfApi(endpoint=server.endpoint).model_info(REPO)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.endpoint.rsplit(":", 1)[1])))


def test_without_the_fixture_a_server_still_serves_plain_http():
    with HubServer() as server:
        home = server.home
        with HTTP_LIBRARY.Client(trust_env=False) as client:
            assert client.get(f"{server.endpoint}/api/whoami-v2").status_code == 401
            assert client.get(f"{server.endpoint}/api/nothing").status_code == 404
            assert client.post(f"{server.endpoint}/api/repos/create", content=b"{").status_code in (400, 401)
        server.reset()
        assert server.requests == []
    assert not home.exists()


def test_transformers_and_timm_load_what_was_pushed(hub, api, tmp_path):
    labels = ["a", "b"]
    model = create_image_classifier("test_wide_resnet_cifar", labels, [0.5] * 3, [0.25] * 3).eval()
    save_image_classifier(model, tmp_path / "net")
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "net")
    start = len(hub.requests)
    loaded = load_image_classifier(REPO, revision=commit.oid).eval()
    network = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    assert {"resolve", "lfs-download"} <= set(hub.made(start)) and hub.outside == []
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        assert torch.equal(loaded(pixels).logits, expected) and torch.equal(network(pixels), expected)
