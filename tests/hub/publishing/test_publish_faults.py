"""Each request of a publish fails once, in each way: the next publish leaves everything on the Hub, and once."""

import itertools
import logging
import math
import random
import shutil
import time

import pytest
from huggingface_hub import get_session
from published import (
    COLLECTION,
    GENERATION,
    LFS,
    PARTS,
    REQUESTS,
    check_published,
    check_state,
    hidden,
    small_lineage,
    weights,
)

from born_again.cli import main
from born_again.hub.client import HTTP_LIBRARY, HubError
from born_again.hub.files import unpublished
from born_again.hub.publishing import publish_lineage
from born_again.lineage.manifest import Manifest

FAULTS = ["500", "429", "401", "drop", "lost"]
RETRIED = ["preupload", *LFS]  # by huggingface_hub, unless the token is refused
# A plain pytest takes each request of the student, and those that nothing else is like: where most can go wrong with
# every fault, the others with two.
STUDENT = len(PARTS[0] + GENERATION)
USUAL = {0, *range(STUDENT, STUDENT + len(GENERATION)), *(REQUESTS.index(endpoint) for endpoint in COLLECTION)}
CASES = []
for index, endpoint in enumerate(REQUESTS):
    for number, how in enumerate(FAULTS):
        often = endpoint in ("lfs-upload", "commit", "create-collection") or (index + number) % 5 in (0, 2)
        marks = [] if index in USUAL and often else [pytest.mark.slow]
        CASES.append(pytest.param(index, how, id=f"{index}-{endpoint}-{how}", marks=marks))


@pytest.fixture
def fresh(logged_in_hub, waits):
    return logged_in_hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_lineage(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "out")


def attempt(hub, folder, made, caplog):
    """Publishes, and holds the folder against the Hub; what is left, None where the preflight refused."""
    caplog.set_level(logging.DEBUG, "born_again")
    caplog.clear()
    try:
        left = publish_lineage(folder, "born-again")
    except HubError as error:
        left, text = None, str(error)
        assert "hub_namespace" in text or "other weights" in text
    else:
        text = " ".join(left.values())
        assert all(left.values())
    assert hub.token not in text and hub.token not in caplog.text
    assert weights(folder) == weights(made) and hidden(folder) == []
    manifest = check_state(hub, folder)
    if left is None:
        assert unpublished(manifest)
    else:
        assert left == unpublished(manifest)
    return left


def heal(hub, folder, made, caplog):
    """Publishes without a fault: nothing is left, and then nothing is asked."""
    hub.clear_faults()
    assert attempt(hub, folder, made, caplog) == {}
    check_published(hub, folder)
    start = len(hub.requests)
    assert publish_lineage(folder) == {} and hub.made(start) == []


def test_what_a_publish_asks_for(fresh, folder, made, caplog):
    heal(fresh, folder, made, caplog)
    assert fresh.made() == REQUESTS


@pytest.mark.parametrize(("index", "how"), CASES)
def test_a_request_that_fails_once(fresh, folder, made, caplog, index, how):
    fresh.fail(index, how)
    left = attempt(fresh, folder, made, caplog)
    assert (fresh.requests[index].fault, fresh.requests[index].endpoint) == (how, REQUESTS[index])
    if REQUESTS[index] in RETRIED and how != "401" or (index, how) == (2, "401"):  # or where the preflight made it
        assert left == {}
    elif index < len(PARTS[0]):
        assert left is None
    else:
        reason, *others = left.values()
        assert set(others) <= {"not tried yet"} and "signature" not in reason and "?" not in reason
        assert ("hf auth login" in reason) == (how == "401") and ("Try again later" in reason) == (how != "401")
    assert "not the Hub's fault" not in caplog.text
    heal(fresh, folder, made, caplog)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (("commit", "lost"), ("paths-info", "500")),
        (("commit", "lost"), ("repo-info", "drop")),
        (("commit", "lost"), ("preupload", "401")),
        (("commit", "drop"), ("commit", "lost")),
        (("commit", "lost"), ("whoami", "429")),
        (("lfs-verify", "401"), ("lfs-batch", "401")),
        (("lfs-verify", "401"), ("commit", "lost")),
        (("create-repo", "lost"), ("create-repo", "lost")),
        (("create-collection", "lost"), ("add-collection-item", "lost")),
        (("add-collection-item", "lost"), ("collection", "drop")),
    ],
)
def test_the_retry_fails_too(fresh, folder, made, caplog, first, again):
    for fault in (first, again):
        fresh.clear_faults()
        fresh.fail(*fault)
        start = len(fresh.requests)
        assert attempt(fresh, folder, made, caplog) != {}
        assert [request.fault for request in fresh.requests[start:] if request.fault] == [fault[1]]
    heal(fresh, folder, made, caplog)


@pytest.mark.parametrize(
    ("endpoint", "how"),
    [
        pytest.param(endpoint, how, marks=[] if how == usual else [pytest.mark.slow])
        for endpoint, usual in zip(sorted({*REQUESTS}), itertools.cycle(["500", "drop", "401"]), strict=False)
        for how in ("500", "drop", "401")
    ],
)
def test_a_request_that_never_succeeds(fresh, folder, made, caplog, capsys, endpoint, how):
    fresh.fail(endpoint, how, times=math.inf)
    left = attempt(fresh, folder, made, caplog)
    assert left != {}
    status = main(["publish", str(folder), "--namespace", "born-again"])
    said = capsys.readouterr()
    assert status == (2 if left is None else 1) and fresh.token not in said.out + said.err
    assert all(f"not published: {name}: " in said.out for name in [*(left or {})][1:])
    assert left is not None or "hub_namespace: 'born-again' cannot be published to" in said.err
    heal(fresh, folder, made, caplog)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))])
def test_many_requests_fail(fresh, folder, made, caplog, seed):
    """One in ten, and more often the more is asked: every attempt may get further, none goes back."""
    dice = random.Random(seed)
    before, rounds, left = set(), 0, None
    while left != {}:
        fresh.clear_faults()
        start = len(fresh.requests)
        for how in FAULTS:
            drawn = {start + index for index in range(60) if dice.random() < 0.02}
            fresh.fail(lambda request, drawn=drawn: request.index in drawn, how, times=math.inf)
        left = attempt(fresh, folder, made, caplog)
        states = [record["hub"] or {} for record in Manifest.read(folder).generations]
        now = {state["commit"] for state in states if state.get("status") == "published"}
        assert before <= now
        before, rounds = now, rounds + 1
        assert rounds < 60
    heal(fresh, folder, made, caplog)


def test_slow_answers(fresh, folder, made, caplog):
    for endpoint in ("whoami", "lfs-upload", "commit", "paths-info", "collection"):
        fresh.fail(endpoint, "slow", seconds=0.1)
    heal(fresh, folder, made, caplog)
    assert fresh.made() == REQUESTS


@pytest.mark.parametrize(
    "endpoint",
    [
        pytest.param(endpoint, marks=[] if endpoint in ("lfs-upload", "commit") else [pytest.mark.slow])
        for endpoint in sorted({*REQUESTS})
    ],
)
def test_a_hub_that_goes_silent_is_not_waited_for_for_ever(fresh, folder, made, caplog, monkeypatch, endpoint):
    """What comes too late is carried out all the same, and must not undo or repeat what was done in between."""
    monkeypatch.setattr("born_again.hub.client._TIMEOUT", HTTP_LIBRARY.Timeout(0.3))
    monkeypatch.setattr(get_session(), "timeout", HTTP_LIBRARY.Timeout(None))
    fresh.fail(endpoint, "slow", seconds=1.5)
    began = time.monotonic()
    left = attempt(fresh, folder, made, caplog)
    assert time.monotonic() - began < 1.5
    get_session().timeout = HTTP_LIBRARY.Timeout(30.0)
    assert (left == {}) == (endpoint in RETRIED) and attempt(fresh, folder, made, caplog) == {}
    time.sleep(max(0.0, began + 1.9 - time.monotonic()))
    heal(fresh, folder, made, caplog)


def test_a_token_that_is_revoked_and_given_back(fresh, folder, made, caplog):
    accounts = dict(fresh.store.accounts)
    fresh.fail(lambda request: request.endpoint == "commit" and fresh.store.accounts.clear(), "401")
    left = attempt(fresh, folder, made, caplog)
    assert "hf auth login" in left["gen0"] and fresh.requests[-1].endpoint == "commit"
    assert attempt(fresh, folder, made, caplog) is None
    fresh.store.accounts.update(accounts)
    heal(fresh, folder, made, caplog)


def test_the_hub_is_down_and_comes_back(fresh, folder, made, caplog):
    assert "gen0" in attempt_while_down(fresh, folder, made, caplog, "preupload")
    assert "collection" in attempt_while_down(fresh, folder, made, caplog, "create-collection")
    heal(fresh, folder, made, caplog)


def attempt_while_down(hub, folder, made, caplog, endpoint):
    """From a request on nothing answers; then nothing listens any more."""
    down = []
    hub.fail(lambda request: bool(down) or request.endpoint == endpoint and not down.append(request), "drop", math.inf)
    left = attempt(hub, folder, made, caplog)
    hub.stop()
    try:
        assert attempt(hub, folder, made, caplog) is None
    finally:
        hub.start()
        hub.clear_faults()
    return left
