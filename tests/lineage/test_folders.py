"""Which checkpoint a training goes on from, and how it is made to survive a loss of power."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lineage import Crash, hashes, runner, spec

from born_again.lineage.folders import last_checkpoint, sync_checkpoint

ADAM = {"optim": "adamw_torch"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("trained") / "out"
    runner(folder, spec=spec(generations=0), changes=ADAM, keep_checkpoints=True).run()
    return folder


@pytest.fixture
def checkpoints(trained, tmp_path):
    """checkpoint-2, checkpoint-4 and checkpoint-6 of a real training, to be spoilt."""
    return Path(shutil.copytree(trained / "checkpoints" / "gen0", tmp_path / "gen0"))


@pytest.fixture
def refused(checkpoints, caplog):
    """Checks that the newest checkpoint is passed over, and that the log says why."""

    def check(why, used="checkpoint-4"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert last_checkpoint(checkpoints) == (used and checkpoints / used)
        assert "checkpoint-6 cannot be resumed from" in caplog.text and why in caplog.text, caplog.text

    return check


def by_processes(checkpoint, count, carried=False):
    """Gives a checkpoint the files that several processes write."""
    for rank in range(count):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
        if carried:
            path = checkpoint / f"carried_state_{rank}_of_{count}.safetensors"
            save_file({"windows": torch.tensor(rank)}, path)
    (checkpoint / "rng_state.pth").unlink()


def test_the_newest_whole_checkpoint_is_used(checkpoints, tmp_path, caplog):
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-10")
    state = checkpoints / "checkpoint-10" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 6', '"global_step": 10'))
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None and last_checkpoint(state) is None
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "config.json",
    ],
)
def test_a_checkpoint_with_a_part_of_a_file_is_passed_over(checkpoints, refused, name):
    path = checkpoints / "checkpoint-6" / name
    if name == "scaler.pt":
        shutil.copy(path.with_name("scheduler.pt"), path)
    content = path.read_bytes()
    for length in (0, 1, 7, 100, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:length])
        refused(name)
    path.write_bytes(bytes(len(content)))  # a length that reached the disk, of content that did not
    refused(name)
    path.unlink()
    if name in ("config.json", "scaler.pt"):
        assert last_checkpoint(checkpoints).name == "checkpoint-6"  # not every training has one
    else:
        refused(f"{name} is missing")
        path.mkdir()
        refused(f"{name} is missing")


def test_nothing_is_used_where_no_checkpoint_is_whole(checkpoints, refused):
    for path in checkpoints.glob("*/optimizer.pt"):
        path.unlink()
    refused("optimizer.pt is missing; save_only_model=True never writes it", used=None)


def test_the_training_goes_on_from_the_one_before_to_the_same_weights(trained, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        runner(folder, spec=spec(generations=0), changes=ADAM, crash=Crash(0, 5)).run()
    path = folder / "checkpoints" / "gen0" / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-500])
    runner(folder, spec=spec(generations=0), changes=ADAM).run()
    assert hashes(folder) == hashes(trained)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_hole_in_an_archive_is_seen(checkpoints, refused, name):
    path = checkpoints / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    refused(f"{name}: its part")


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ("{}", "global_step is None, expected 6"),
        ('{"global_step": 5}', "global_step is 5, expected 6"),
        ('{"global_step": 6.0}', "global_step is 6.0, expected 6"),
        ('{"global_step": true}', "global_step is True, expected 6"),
        ("[6]", "global_step is None, expected 6"),
        ("[" * 100_000, "trainer_state.json: cannot be read completely"),
    ],
)
def test_the_state_is_of_the_step_in_the_name(checkpoints, refused, state, why):
    (checkpoints / "checkpoint-6" / "trainer_state.json").write_text(state)
    refused(why)


def test_the_files_of_every_process_must_be_there(checkpoints, refused):
    newest = checkpoints / "checkpoint-6"
    by_processes(newest, 3)
    assert last_checkpoint(checkpoints) == newest
    (newest / "rng_state_1.pth").rename(newest / "kept")
    refused("rng_state_1.pth is missing")
    (newest / "kept").rename(newest / "rng_state_1.pth")
    (newest / "rng_state_2.pth").unlink()
    (newest / "rng_state_1.pth").unlink()
    refused("rng_state_1.pth is missing")  # rng_state_0.pth alone: one process would have given it no number


def test_what_every_process_carries_must_be_there(checkpoints, refused):
    newest = checkpoints / "checkpoint-6"
    by_processes(newest, 3, carried=True)
    assert last_checkpoint(checkpoints) == newest
    (newest / "rng_state_2.pth").rename(newest / "kept")
    refused("rng_state_2.pth is missing")
    (newest / "kept").rename(newest / "rng_state_2.pth")
    path = newest / "carried_state_2_of_3.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused("carried_state_2_of_3.safetensors: cannot be read completely")
    path.unlink()
    refused("carried_state_2_of_3.safetensors is missing")


def test_every_shard_that_an_index_names_must_be_there(checkpoints, refused):
    newest = checkpoints / "checkpoint-6"
    weights = load_file(newest / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for shard, of_it in shards.items():
        save_file({name: weights[name] for name in of_it}, newest / shard)
    (newest / "model.safetensors").unlink()
    refused("model.safetensors is missing")
    index = newest / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard in shards for name in shards[shard]}}))
    assert last_checkpoint(checkpoints) == newest
    second = newest / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-8])
    refused("model-00002-of-00002.safetensors: cannot be read completely")
    second.unlink()
    refused("model-00002-of-00002.safetensors is missing")
    for content in ('{"weight_map": {"a": 3}}', '{"weight_map": 3}', "3", '{"weight_map": {"a": "../../x"}}'):
        index.write_text(content)
        refused("is missing")


def test_what_is_no_checkpoint_of_a_trainer_does_no_harm(checkpoints, tmp_path, refused, caplog):
    for name in ("checkpoint-", "checkpoint-abc", "checkpoint-1e3", "checkpoint-007", "checkpoint--1", "checkpoint-٣"):
        shutil.copytree(checkpoints / "checkpoint-2", checkpoints / name)
    (checkpoints / "checkpoint-99").write_text("")
    outside = Path(shutil.copytree(checkpoints / "checkpoint-6", tmp_path / "elsewhere"))
    (checkpoints / "checkpoint-98").symlink_to(outside)
    (checkpoints / "checkpoint-97").symlink_to(checkpoints / "checkpoint-97")
    os.mkfifo(checkpoints / "checkpoint-96")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    for number in (99, 98, 97, 96):
        assert f"checkpoint-{number} cannot be resumed from (it is no folder)" in caplog.text
    weights = checkpoints / "checkpoint-6" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(outside / "model.safetensors")
    refused("model.safetensors is missing")
    weights.unlink()
    os.mkfifo(weights)  # opening it would wait for ever
    refused("model.safetensors is missing")


def test_nothing_is_unpickled(checkpoints, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Bomb(), checkpoints / "checkpoint-6" / name)
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
    assert not (tmp_path / "exploded").exists()


def test_archives_without_checksums_are_taken_by_their_structure(checkpoints, refused):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.zeros(100)}, path := checkpoints / "checkpoint-6" / "optimizer.pt")
        assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-6"
        path.write_bytes(path.read_bytes()[:-1])
        refused("optimizer.pt: cannot be read completely")
    finally:
        torch.serialization.set_crc32_options(before)


def test_a_checkpoint_is_synced_with_the_folders_above_it(trained, checkpoints, tmp_path, monkeypatch):
    checkpoint = tmp_path / "out" / "checkpoints" / "gen0" / "checkpoint-6"
    shutil.copytree(checkpoints / "checkpoint-6", checkpoint)
    (checkpoint / "adapter").mkdir()
    (checkpoint / "adapter" / "weights").write_text("")
    (checkpoint / "link").symlink_to(checkpoints / "checkpoint-6" / "config.json")
    (checkpoint / "linked").symlink_to(checkpoints)
    os.mkfifo(checkpoint / "pipe")
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    sync_checkpoint(checkpoint)
    paths = [path for path in (tmp_path / "out").rglob("*") if path.name not in ("link", "linked", "pipe")]
    assert synced == {path.stat().st_ino for path in [tmp_path / "out", *paths]}
