"""Processes that publish are killed while a request is on its way: the next one leaves everything published, once."""

import json
import os
import shutil
import signal

import hub_server
import pytest
from lineage_folders import lineage, network
from publish_child import Children
from published import REQUESTS, check_published, check_state, hidden, small_lineage, weights

from born_again.hub.publishing import publish_lineage
from born_again.lineage.lock import LOCK_NAME

WORDS = (
    "--smoke --dataset digits --max_train_samples 32 --max_eval_samples 16 --generations 1 --num_train_epochs 2 "
    "--per_device_train_batch_size 16 --disable_tqdm True --bf16 False --threads 1 --name tiny"
).split()
PUSH = ["--push_to_hub", "True", "--hub_namespace", "born-again"]
KILLED = 128 + signal.SIGKILL
LARGE = 2**20  # bytes of a body, from which on it does not fit into what the system keeps for a connection


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def children(server, tmp_path_factory):
    children = Children(server.environment(), tmp_path_factory.mktemp("children") / "log")
    yield children
    children.close()


def kill(children):
    os.kill(children.pid, signal.SIGKILL)
    return True


def kill_at(hub, children, fits, carried_out):
    """Kills the child when a request has come; whether it is carried out all the same."""
    hub.fail(lambda request: fits(request) and kill(children), "lost" if carried_out else "drop")


def check_killed(hub, folder, before):
    assert weights(folder) == before and set(hidden(folder)) <= {LOCK_NAME}
    return check_state(hub, folder)


def heal(hub, folder):
    assert publish_lineage(folder, "born-again") == {} and hidden(folder) == []
    check_published(hub, folder)
    start = len(hub.requests)
    assert publish_lineage(folder) == {} and hub.made(start) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_lineage(tmp_path_factory.mktemp("made") / "out")


USUAL = [
    (REQUESTS.index("create-repo"), True),
    (REQUESTS.index("lfs-upload"), False),
    (REQUESTS.index("commit"), False),
    (REQUESTS.index("commit"), True),
    (REQUESTS.index("add-collection-item"), True),
]
POINTS = [
    pytest.param(index, done, id=f"{index}-{endpoint}{'-done' * done}", marks=[] if usual else [pytest.mark.slow])
    for index, endpoint in enumerate(REQUESTS)
    for done in (False, True)
    for usual in [(index, done) in USUAL]
]


@pytest.mark.parametrize(("index", "carried_out"), POINTS)
def test_killed_at_a_request(logged_in_hub, children, made, tmp_path, index, carried_out):
    folder = shutil.copytree(made, tmp_path / "out")
    kill_at(logged_in_hub, children, lambda request: request.index == index, carried_out)
    status = children.run(publish=[str(folder), "born-again"])
    assert status == KILLED and len(logged_in_hub.requests) == index + 1
    check_killed(logged_in_hub, folder, weights(made))
    heal(logged_in_hub, folder)


def test_killed_again_and_again(logged_in_hub, children, made, tmp_path):
    """At the third request of each start, then the fifth, and so on, until one start gets to the end."""
    folder = shutil.copytree(made, tmp_path / "out")
    starts = 0
    while True:
        last = len(logged_in_hub.requests) + 4 + 2 * starts
        logged_in_hub.clear_faults()
        kill_at(logged_in_hub, children, lambda request, last=last: request.index == last, carried_out=starts % 2 == 0)
        status = children.run(publish=[str(folder), "born-again"])
        check_killed(logged_in_hub, folder, weights(made))
        if status == 0:
            break
        assert status == KILLED
        starts += 1
    assert starts > 2
    heal(logged_in_hub, folder)


def test_killed_in_the_middle_of_the_weights(logged_in_hub, children, tmp_path, monkeypatch):
    """Of 19 MB, a fourth of one has been read."""
    folder = lineage(tmp_path / "out", [network("gpt2", seed, words=600_000) for seed in range(2)])
    before, read, cut = weights(folder), hub_server.Handler.read, []

    def read_some(handler, length):
        if length < LARGE or handler.command != "PUT" or cut:
            return read(handler, length)
        begun = read(handler, LARGE // 4)
        cut.append(kill(children))
        return begun + read(handler, length - len(begun))

    monkeypatch.setattr(hub_server.Handler, "read", read_some)
    assert children.run(publish=[str(folder), "born-again"]) == KILLED
    assert logged_in_hub.made()[-1] == "lfs-batch" and cut  # the upload never came to be a request
    assert logged_in_hub.store.repositories["model", "born-again/tiny-gen0"].objects == {}
    check_killed(logged_in_hub, folder, before)
    heal(logged_in_hub, folder)


# ---- While training ----


@pytest.fixture(scope="module")
def plain(children, tmp_path_factory):
    """A lineage that was trained without a Hub."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert children.run(train=[*WORDS, "--output_dir", str(folder)]) == 0
    return folder


def check_trained(folder, plain):
    contents = [json.loads((place / "lineage.json").read_text()) for place in (folder, plain)]
    names = ("index", "status", "weights_sha256", "metrics", "steps", "seed", "parent")
    facts = [[{name: record[name] for name in names} for record in content["generations"]] for content in contents]
    assert facts[0] == facts[1] and weights(folder) == weights(plain)


def at(endpoint, repo):
    return lambda request: request.endpoint == endpoint and request.id in ("", repo)


@pytest.mark.parametrize(
    ("endpoint", "generation", "carried_out"),
    [
        ("lfs-upload", 0, False),
        pytest.param("commit", 0, True, marks=pytest.mark.slow),
        pytest.param("commit", 0, False, marks=pytest.mark.slow),
        pytest.param("paths-info", 0, False, marks=pytest.mark.slow),
        pytest.param("create-repo", 0, True, marks=pytest.mark.slow),
        pytest.param("lfs-verify", 1, True, marks=pytest.mark.slow),
        pytest.param("commit", 1, True, marks=pytest.mark.slow),
        pytest.param("create-collection", 1, True, marks=pytest.mark.slow),
        pytest.param("add-collection-item", 1, False, marks=pytest.mark.slow),
    ],
)
def test_killed_while_training(logged_in_hub, children, plain, tmp_path, endpoint, generation, carried_out):
    """The same command goes on to the same weights, and publishes what is missing."""
    folder = tmp_path / "out"
    command = [*WORDS, *PUSH, "--output_dir", str(folder)]
    kill_at(logged_in_hub, children, at(endpoint, f"born-again/tiny-gen{generation}"), carried_out)
    assert children.run(train=command) == KILLED
    logged_in_hub.clear_faults()
    if (folder / "lineage.json").exists():
        check_state(logged_in_hub, folder)
    assert children.run(train=command) == 0, children.log.read_text()[-4000:]
    check_trained(folder, plain)
    assert hidden(folder) == []
    check_published(logged_in_hub, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- On the way back ----


@pytest.mark.parametrize(
    ("endpoint", "generation"),
    [
        pytest.param(endpoint, generation, marks=pytest.mark.slow)
        for endpoint in ("lfs-download", "resolve", "repo-info")
        for generation in (0, 1)
    ],
)
def test_killed_while_it_is_brought_back(logged_in_hub, children, plain, tmp_path, endpoint, generation):
    """A lineage that was published, into a new folder: all of it or nothing."""
    published = shutil.copytree(plain, tmp_path / "published")
    assert publish_lineage(published, "born-again") == {}
    folder, start = tmp_path / "out", len(logged_in_hub.requests)
    command = [*WORDS, *PUSH, "--output_dir", str(folder)]
    repo = f"born-again/tiny-gen{generation}"
    kill_at(logged_in_hub, children, lambda request: request.index >= start and at(endpoint, repo)(request), False)
    assert children.run(train=command) == KILLED
    assert not folder.exists() or set(hidden(folder)) == {path.name for path in folder.iterdir()}
    logged_in_hub.clear_faults()
    assert children.run(train=command) == 0, children.log.read_text()[-4000:]
    check_trained(folder, plain)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "published"} and hidden(folder) == []
    check_published(logged_in_hub, folder)
