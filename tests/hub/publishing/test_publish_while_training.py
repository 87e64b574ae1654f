"""What goes wrong on the Hub while a lineage trains: its weights are those of one that knows no Hub."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
from example_scripts import EXAMPLES, load_example
from hub_server import HubServer
from published import check_published, check_state, hidden, weights

from born_again import BornAgainTrainingArguments
from born_again.data.images import load_images
from born_again.hub.client import HubError
from born_again.hub.files import unpublished
from born_again.hub.launch import resume_lineage, train
from born_again.hub.publishing import publish_lineage
from born_again.lineage.arguments import parse_arguments

SCRIPT = EXAMPLES / "run_cifar.py"
WORDS = (
    "--smoke --dataset digits --max_train_samples 32 --max_eval_samples 16 --generations 1 --num_train_epochs 1 "
    "--per_device_train_batch_size 16 --disable_tqdm True --bf16 False --threads 1 --name tiny"
).split()
PUSH = ["--push_to_hub", "True", "--hub_namespace", "born-again"]
DEFER = [*PUSH, "--hub_defer"]
HOW_TO_FINISH = "Everything is trained and saved in {0}; to publish the rest: born-again publish {0}"


@pytest.fixture(scope="module")
def script():
    return load_example("run_cifar")


@pytest.fixture(scope="module")
def run(script):
    data = load_images("digits", max_train_samples=32, max_eval_samples=16)

    def run(folder, *words):
        """The runner and the exit status."""
        torch.set_num_threads(1)  # sums depend on how many there are
        command = [*WORDS, "--output_dir", str(folder), *words]
        lineage, training = parse_arguments(
            (script.LineageArguments, BornAgainTrainingArguments), script.recipe, command
        )
        resume_lineage(lineage, training)
        runner = script.build_runner(script.lineage_spec(lineage, training), data, training, lineage)
        return runner, train(runner, training, "tiny")

    return run


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """A lineage that was trained without a Hub."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert run(folder)[1] == 0
    return folder


@pytest.fixture
def fresh(logged_in_hub, waits):
    return logged_in_hub


def facts(folder):
    """What a lineage is, without times and without the Hub."""
    content = json.loads((folder / "lineage.json").read_text())
    names = ("index", "status", "seed", "parent", "objective", "weights_sha256", "metrics", "steps", "teacher_fit")
    return [{name: record[name] for name in names} for record in content["generations"]], content.get("ensembles")


def check_unharmed(hub, folder, plain, runner):
    assert facts(folder) == facts(plain) and weights(folder) == weights(plain) and hidden(folder) == []
    assert {path.name for path in folder.iterdir()} == {path.name for path in plain.iterdir()}
    manifest = check_state(hub, folder)
    assert runner.unpublished == unpublished(manifest)


FAULTS = [
    ("lfs-upload", "500", 1),
    ("commit", "lost", 1),
    ("create-repo", "401", 2),  # the first is that of the preflight
]
MORE = [
    ("commit", "429", 1),
    ("paths-info", "drop", 2),  # the first asks what there is to bring back
]
MORE += [
    (endpoint, how, 1)
    for endpoint in ("lfs-verify", "preupload", "validate-yaml", "create-collection", "add-collection-item")
    for how in ("500", "429", "401", "drop", "lost")
]


@pytest.mark.parametrize(
    ("endpoint", "how", "nth"), [*FAULTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_a_fault_while_training(fresh, run, plain, tmp_path, endpoint, how, nth):
    """It is tried again after the next generation, or at the end: nothing is left."""
    seen = []

    def fits(request):
        seen.extend([request] * (request.endpoint == endpoint))
        return request.endpoint == endpoint and len(seen) == nth

    fresh.fail(fits, how)
    runner, status = run(tmp_path / "out", *PUSH)
    assert [request.fault for request in fresh.requests if request.fault] == [how]
    check_unharmed(fresh, tmp_path / "out", plain, runner)
    assert (runner.unpublished, status) == ({}, 0)
    check_published(fresh, tmp_path / "out")


@pytest.mark.parametrize(
    ("endpoint", "how"),
    [
        ("commit", "500"),
        pytest.param("lfs-upload", "401", marks=pytest.mark.slow),
        pytest.param("paths-info", "drop", marks=pytest.mark.slow),
        pytest.param("commit", "lost", marks=pytest.mark.slow),
        pytest.param("create-collection", "429", marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_stays(fresh, run, plain, tmp_path, capsys, caplog, endpoint, how):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "out"
    # What is brought back, and the preflight, are asked for before.
    fresh.fail(lambda request: request.endpoint == endpoint and request.index > 2, how, times=math.inf)
    runner, status = run(folder, *DEFER)
    check_unharmed(fresh, folder, plain, runner)
    said = capsys.readouterr().err
    if (endpoint, how) != ("commit", "lost"):  # which gets further at each attempt
        assert status == 1 and runner.unpublished
        assert said.splitlines()[-1] == HOW_TO_FINISH.format(folder)
    assert all(f"Not published: {what}: {why}" in said for what, why in runner.unpublished.items())
    assert fresh.token not in said + caplog.text
    fresh.clear_faults()
    assert publish_lineage(folder) == {}
    check_published(fresh, folder)
    # The same command has nothing left to do.
    start = len(fresh.requests)
    assert run(folder, *DEFER)[1] == 0 and fresh.made(start) == []


@pytest.mark.slow
def test_a_hub_that_is_down_from_the_first_generation_on(fresh, run, plain, tmp_path, capsys):
    folder = tmp_path / "out"
    fresh.fail(lambda request: request.endpoint == "commit", "drop", times=math.inf)
    try:
        fresh.fail(lambda request: request.endpoint == "lfs-upload" and bool(fresh._stopping.set()), "drop")
        runner, status = run(folder, *PUSH)
        assert status == 1 and set(runner.unpublished) == {"gen0", "gen1", "collection"}
        assert facts(folder) == facts(plain)
        assert capsys.readouterr().err.splitlines()[-1] == HOW_TO_FINISH.format(folder)
    finally:
        fresh.stop()
        fresh.start()
    fresh.clear_faults()
    assert publish_lineage(folder) == {}
    check_published(fresh, folder)


def test_a_hub_that_refuses_connections_with_defer(fresh, run, plain, tmp_path, capsys, caplog):
    folder = tmp_path / "out"
    fresh.stop()
    try:
        runner, status = run(folder, *DEFER)
        assert facts(folder) == facts(plain) and weights(folder) == weights(plain) and hidden(folder) == []
        assert status == 1 and set(runner.unpublished) == {"gen0", "gen1", "collection"}
        assert "refused" in runner.unpublished["gen0"] and "Try again later." in runner.unpublished["gen0"]
        assert capsys.readouterr().err.splitlines()[-1] == HOW_TO_FINISH.format(folder)
        # Again, with all trained: it tries, and says the same.
        assert run(folder, *DEFER)[1] == 1 and facts(folder) == facts(plain)
    finally:
        fresh.start()
    assert run(folder, *DEFER)[1] == 0
    check_published(fresh, folder)
    assert facts(folder) == facts(plain)


def test_a_hub_that_refuses_connections_without_defer(fresh, run, plain, tmp_path):
    """It says so before anything is trained, and what it leaves is fit to go on from."""
    folder = tmp_path / "out"
    fresh.stop()
    try:
        with pytest.raises(HubError, match="hub_defer|cannot be restored"):
            run(folder, *PUSH)
        assert not folder.exists() or not weights(folder) and hidden(folder) == []
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    finally:
        fresh.start()
    assert run(folder, *PUSH)[1] == 0
    check_published(fresh, folder)
    assert facts(folder) == facts(plain)


@pytest.mark.parametrize("how", ["500", "429", "401", "drop", "lost"])
@pytest.mark.parametrize("endpoint", ["paths-info", "whoami", "create-repo"])
def test_a_preflight_that_fails_trains_nothing(fresh, run, tmp_path, endpoint, how):
    folder = tmp_path / "out"
    fresh.fail(endpoint, how)
    with pytest.raises(HubError, match="hub_defer|cannot be restored") as raised:
        run(folder, *PUSH)
    assert fresh.token not in str(raised.value) and ("hf auth login" in str(raised.value)) == (how == "401")
    assert not folder.exists() or {path.name for path in folder.iterdir()} <= {"lineage.json"}
    if (folder / "lineage.json").exists():
        assert json.loads((folder / "lineage.json").read_text())["generations"] == []


@pytest.mark.slow
def test_the_last_line_and_the_exit_status_of_the_script(tmp_path):
    """As a user sees it, from another process."""
    folder = tmp_path / "out"
    with HubServer(tmp_path / "hub_home") as hub:
        hub.fail("commit", "500", times=math.inf)
        command = [sys.executable, str(SCRIPT), *WORDS, "--output_dir", str(folder)]
        done = subprocess.run([*command, *PUSH], env=hub.environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and hub.token not in done.stdout + done.stderr
        assert done.stderr.splitlines()[-1] == HOW_TO_FINISH.format(folder)
        assert "Traceback" not in done.stderr
        hub.stop()
        fresh = [*command[:-1], str(tmp_path / "other"), *PUSH]
        done = subprocess.run(fresh, env=hub.environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and "hub_defer" in done.stderr and "Traceback" not in done.stderr
