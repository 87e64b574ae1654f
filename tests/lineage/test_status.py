"""What a lineage's folder says of itself, while nothing runs and while something does."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from manifests import content, record, training
from tiny_lineage import STEPS, Crash, runner

from born_again.lineage import lock, status
from born_again.lineage.lock import LOCK_NAME, FolderLock, lock_holder
from born_again.lineage.manifest import LineageError, file_sha256
from born_again.lineage.status import lineage_status

posix_only = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")

HOLDER = """
import sys
from born_again.lineage.lock import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
COMMAND = """
import contextlib, sys
from born_again.cli import main  # as the console script does
assert main(["status", sys.argv[1]]) == 0
with contextlib.suppress(SystemExit):
    main(["--help"])
print(*sys.modules)
"""


def alone(code: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lineage(folder: Path, *records, **changes) -> Path:
    """A folder with lineage.json, and the weights it names."""
    values = content(*records, **changes)
    folder.mkdir(parents=True)
    for own in values["generations"]:
        if own["status"] == "finished":
            place = folder / f"gen{own['index']}"
            place.mkdir(parents=True)
            (place / "model.safetensors").write_text(f"weights {own['index']}")
            own["weights_sha256"] = file_sha256(place / "model.safetensors")
    for ensemble in values.get("ensembles", []):
        ensemble["weights_sha256"] = [values["generations"][index]["weights_sha256"] for index in ensemble["members"]]
    (folder / "lineage.json").write_text(json.dumps(values))
    return folder


def snapshot(folder: Path) -> dict:
    paths = [folder, *folder.rglob("*")]
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_ino, path.lstat().st_size) for path in paths}


@pytest.fixture(scope="module")
def crashed(tmp_path_factory) -> Path:
    """Generation 0 is trained, 1 was killed after step 5 of 6; read only."""
    folder = tmp_path_factory.mktemp("crashed") / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, crash=Crash(1, 5)).run()
    (folder / LOCK_NAME).unlink(missing_ok=True)
    return folder


# ---- How far it is, and what is next ----


def test_a_folder_of_nothing_yet(tmp_path):
    expected = {"action": "train", "generation": 0, "checkpoint": None, "text": "train generation 0 from its start"}
    for name in (None, LOCK_NAME, ".lineage.json.abcd1234"):
        if name:
            (tmp_path / name).write_text("")
        facts = lineage_status(tmp_path)
        assert facts["name"] is None and facts["students"] is None and facts["generations"] == []
        assert facts["next"] == expected and facts["running"] is None


def test_a_finished_lineage(tmp_path):
    second = {"test": {"accuracy": 0.925, "nll": 0.25}, "validation": {"nll": 1.0}}
    records = [record(0), record(1, metrics=second), record(2, metrics={"test": {"nll": None}}), record(3)]
    facts = lineage_status(lineage(tmp_path / "out", *records))
    assert (facts["name"], facts["model"], facts["dataset"]) == ("tiny-words", "bert", "words")
    assert (facts["objective"], facts["seed"], facts["students"]) == ("ban+l", 3, 3)
    assert facts["next"] == {
        "action": "nothing",
        "generation": None,
        "checkpoint": None,
        "text": "nothing: all 4 generations are trained",
    }
    generations = facts["generations"]
    assert [own["index"] for own in generations] == [0, 1, 2, 3]
    assert {own["status"] for own in generations} == {"finished"}
    assert [own["seed"] for own in generations] == [3, 4, 5, 6]
    assert [own["objective"] for own in generations] == ["label", "ban+l", "ban+l", "ban+l"]
    assert generations[1]["metrics"] == second
    assert [own["gain"] for own in generations] == [None, pytest.approx(2.5), None, None]
    assert [own["weights"] for own in generations] == ["present"] * 4
    assert (generations[1]["seconds"], generations[1]["steps"]) == (12.4, 6)
    assert facts["missing_weights"] == facts["changed_weights"] == facts["set_aside"] == facts["ensembles"] == []


def test_the_gain_of_a_text_is_of_its_perplexity(tmp_path):
    metrics = [{"test": {"nll": 4.0, "perplexity": value, "accuracy": 0.1}} for value in (90.5, 80.25)]
    facts = lineage_status(lineage(tmp_path / "out", *(record(index, metrics=metrics[index]) for index in (0, 1))))
    assert facts["generations"][1]["gain"] == pytest.approx(10.25)


def test_a_generation_that_has_not_begun_and_one_without_a_checkpoint(tmp_path):
    facts = lineage_status(lineage(tmp_path / "one", record(0)))
    assert [own["status"] for own in facts["generations"]] == ["finished", "waiting", "waiting", "waiting"]
    assert [own["seed"] for own in facts["generations"]] == [3, 4, 5, 6]
    assert facts["next"]["text"] == "train generation 1 from its start"
    facts = lineage_status(lineage(tmp_path / "two", record(0), training(1)))
    assert [own["status"] for own in facts["generations"]] == ["finished", "interrupted", "waiting", "waiting"]
    assert (facts["next"]["action"], facts["next"]["generation"]) == ("train", 1)


def test_an_interrupted_generation_and_what_goes_on(crashed):
    facts = lineage_status(crashed)
    assert facts["generations"][1]["status"] == "interrupted"
    assert facts["generations"][1]["checkpoint"] == {"name": "checkpoint-4", "step": 4, "max_steps": STEPS}
    assert facts["generations"][0]["checkpoint"] is None
    assert facts["next"] == {
        "action": "resume",
        "generation": 1,
        "checkpoint": "checkpoint-4",
        "text": "resume generation 1 from checkpoint-4",
    }


def test_a_checkpoint_that_is_not_whole_does_not_count(crashed, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(crashed, folder)
    (folder / "checkpoints/gen1/checkpoint-4/trainer_state.json").write_text('{"max')
    assert lineage_status(folder)["generations"][1]["checkpoint"]["step"] == 2


def test_a_teacher_from_elsewhere_is_taken(tmp_path):
    from born_again.lineage.spec import spec_sha256

    spec = {**content()["spec"], "teacher": "someone/network"}
    first = training(0, objective="external", seed=None)
    facts = lineage_status(lineage(tmp_path / "out", first, spec=spec, spec_sha256=spec_sha256(spec)))
    assert facts["next"]["text"] == "take someone/network as generation 0"
    assert facts["generations"][0]["seed"] is None


# ---- What is wrong, and what is left to do ----


def test_weights_that_are_gone_stop_the_next_run(tmp_path):
    folder = lineage(tmp_path / "out", record(0), record(1), training(2))
    (folder / "gen1/model.safetensors").unlink()
    facts = lineage_status(folder)
    assert facts["missing_weights"] == [1] and facts["generations"][1]["weights"] == "missing"
    assert facts["next"]["action"] == "refuse"
    assert facts["next"]["text"] == "refuse: gen1/model.safetensors is missing; put the file back"


def test_weights_that_are_changed_are_seen_where_asked_for(tmp_path):
    folder = lineage(tmp_path / "out", *map(record, range(4)))
    (folder / "gen2/model.safetensors").write_text("other")
    assert lineage_status(folder)["next"]["action"] == "nothing"
    facts = lineage_status(folder, verify=True)
    assert (facts["changed_weights"], facts["missing_weights"]) == ([2], [])
    assert "refuse: gen2/model.safetensors does not hash" in facts["next"]["text"]


def test_published_is_what_says_so(tmp_path):
    hubs = [{"status": "published", "repo": "a/b"}, {"status": "pending", "message": "no network"}, None]
    facts = lineage_status(lineage(tmp_path / "out", *(record(index, hub=hub) for index, hub in enumerate(hubs))))
    assert facts["unpublished"] == [1, 2]
    assert [own["published"] for own in facts["generations"]][:3] == [True, False, False]
    assert facts["generations"][0]["hub"] == hubs[0]


def test_ensembles_and_what_was_set_aside(tmp_path):
    ensemble = {"members": [0, 1], "average": "probabilities", "metrics": {"test": {"nll": 0.1}}}
    folder = lineage(tmp_path / "out", record(0), record(1), ensembles=[ensemble])
    for name in ("gen2.replaced-1", "gen2.replaced-10", "gen2.replaced-x", "checkpoints/gen1.replaced-1"):
        (folder / name).mkdir(parents=True)
    (folder / "lineage.replaced-1.json").write_text("{}")
    facts = lineage_status(folder)
    names = ["checkpoints/gen1.replaced-1", "gen2.replaced-1", "gen2.replaced-10", "lineage.replaced-1.json"]
    assert facts["set_aside"] == names
    (entry,) = facts["ensembles"]
    assert entry.items() >= ensemble.items() and entry["published"] is False and len(entry["weights_sha256"]) == 2


def test_what_is_no_lineage(tmp_path):
    with pytest.raises(FileNotFoundError, match="output_dir: .*nowhere is no folder, expected that of a lineage"):
        lineage_status(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(LineageError, match="has no lineage.json, expected the folder of a lineage; give the output_"):
        lineage_status(tmp_path)
    (tmp_path / "lineage.json").write_text(json.dumps(content(generations=7)))
    with pytest.raises(LineageError, match="field 'generations' is wrong, expected a list, got 7"):
        lineage_status(tmp_path)


# ---- While something runs ----


@posix_only
def test_a_run_is_seen_with_its_process_and_no_more_once_it_is_killed(tmp_path):
    folder = lineage(tmp_path / "out", record(0), training(1))
    process = alone(HOLDER, folder)
    try:
        assert process.stdout.readline() == "held\n"
        before = snapshot(folder)
        facts = lineage_status(folder)
        assert facts["running"]["pid"] == process.pid and facts["running"]["certain"] is True
        assert facts["running"]["host"] and facts["running"]["since"].startswith("20")
        assert facts["generations"][1]["status"] == "training"
        with pytest.raises(LineageError, match=f"in use by process {process.pid}"):  # it was not taken away
            FolderLock(folder).__enter__()
        assert snapshot(folder) == before
    finally:
        process.kill()
        process.communicate()
    assert (folder / LOCK_NAME).exists()
    facts = lineage_status(folder)
    assert facts["running"] is None and facts["generations"][1]["status"] == "interrupted"
    assert (folder / LOCK_NAME).exists()


@posix_only
def test_a_run_that_begins_while_it_is_asked_for_is_not_refused(tmp_path):
    """Who asks has a shared lock for a moment."""
    (tmp_path / LOCK_NAME).write_text("")
    asker = os.open(tmp_path / LOCK_NAME, os.O_RDONLY)
    lock.fcntl.flock(asker, lock.fcntl.LOCK_SH)
    timer = threading.Timer(0.015, os.close, [asker])
    timer.start()
    with FolderLock(tmp_path):
        assert lock_holder(tmp_path)["pid"] == os.getpid()
    timer.join()


@posix_only
def test_two_may_ask_at_once(tmp_path):
    (tmp_path / LOCK_NAME).write_text("")
    other = os.open(tmp_path / LOCK_NAME, os.O_RDONLY)
    lock.fcntl.flock(other, lock.fcntl.LOCK_SH)
    assert lock_holder(tmp_path) is None
    os.close(other)


@pytest.mark.parametrize("text", ["", "[]", "[" * 4000, "\xff", '{"pid": "1", "host": 2}'])
def test_a_holder_that_has_not_said_who_it_is(tmp_path, text):
    with FolderLock(tmp_path):
        (tmp_path / LOCK_NAME).write_text(text, encoding="latin-1")
        nobody = dict.fromkeys(("pid", "host", "since", "command"))
        assert lock_holder(tmp_path) == {**nobody, "certain": os.name == "posix"}


@posix_only
def test_a_system_that_knows_no_locks_leaves_a_doubt(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    (tmp_path / LOCK_NAME).write_text('{"pid": 7}')
    for change in (("fcntl", None), ("fcntl.flock", unsupported)):
        with monkeypatch.context() as patch:
            patch.setattr(f"born_again.lineage.lock.{change[0]}", change[1])
            assert lock_holder(tmp_path).items() >= {"pid": 7, "certain": False}.items()
    assert lock_holder(tmp_path) is None


@posix_only
def test_neither_a_pipe_nor_a_link_in_the_place_of_the_lock_is_followed(tmp_path):
    os.mkfifo(tmp_path / LOCK_NAME)
    assert lock_holder(tmp_path) is None  # and it does not wait for a writer
    (tmp_path / LOCK_NAME).unlink()
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    assert lock_holder(tmp_path)["certain"] is False
    assert not (tmp_path / "elsewhere").exists()


# ---- What it costs ----


def test_nothing_is_written(crashed):
    before = snapshot(crashed)
    lineage_status(crashed, verify=True)
    assert snapshot(crashed) == before


def test_the_command_loads_no_library_that_takes_seconds(crashed):
    said, _ = alone(COMMAND, crashed).communicate("")
    assert "resume generation 1 from checkpoint-4" in said and "usage: born-again" in said
    loaded = set(said.splitlines()[-1].split())
    assert "born_again.lineage.checkpoints" in loaded
    assert not loaded & {"torch", "transformers", "datasets", "timm", "accelerate", "pandas", "matplotlib"}


def test_the_names_are_those_of_the_runner():
    from born_again.lineage import runner as home

    assert (status.WEIGHTS_NAME, status.CHECKPOINTS_NAME) == (home.WEIGHTS_NAME, home.CHECKPOINTS_NAME)
